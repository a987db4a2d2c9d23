"""Blocks, attention and feed-forward layers, found from a model's structure and not from its name.

A block is a member of a `ModuleList` that holds attention; of lists within lists the outermost counts. What of a block
lies outside its attention is its feed-forward part.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from deltatune.core.ops import find_op
from deltatune.core.roles import role_of
from deltatune.core.sites import (
    Site,
    base_modules,
    is_linear,
    is_multihead,
    is_norm,
    short_names,
    targets,
    weight_sites,
)
from deltatune.core.weights import WeightRef
from deltatune.errors import TargetError

if TYPE_CHECKING:
    from deltatune.config import TargetedConfig


@dataclass(frozen=True)
class Block:
    """One layer of a transformer.

    Attributes:
        path: where it is. index: its number in its stack. stack: the path of the list that it is in.
    """

    path: str
    index: int
    stack: str


def is_attention(module: nn.Module) -> bool:
    """By the name of its class, as published code has it."""
    return any("attention" in cls.__name__.lower() for cls in type(module).__mro__)


def find_blocks(model: nn.Module) -> list[Block]:
    """Every block, in the model's order; an encoder's before its decoder's where the model has them so.

    Raises:
        TargetError: there are none.
    """
    modules = dict(base_modules(model))
    attending = [p for p, m in modules.items() if is_attention(m)]
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    holding = [p for p in lists if any(a.startswith(f"{p}.") for a in attending)]
    inside = [p for p in holding if any(a.startswith(f"{p}.") and a.count(".") == p.count(".") + 1 for a in attending)]
    outer = [p for p in holding if p not in inside and not any(p.startswith(f"{q}.") for q in holding)]
    blocks = [Block(f"{p}.{name}", i, p) for p in outer for i, name in enumerate(modules[p]._modules)]
    if not blocks:
        raise TargetError(
            f"no block is found in this {type(model).__name__}: none of its ModuleLists has members with attention; "
            "name the modules to adapt in target_modules"
        )
    return blocks


def below(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The base's own modules inside one."""
    return [(f"{path}.{p}" if p else path, m) for p, m in base_modules(model.get_submodule(path))]


def feedforward(model: nn.Module, block: Block) -> list[str]:
    """The linear layers of a block outside its attention, in order; a router's are left out."""
    inner = below(model, block.path)
    attention = [p for p, m in inner if p != block.path and (is_attention(m) or is_multihead(m))]
    return [
        p
        for p, m in inner
        if find_op(m) is not None and is_linear(m) and not any(f"{p}.".startswith(f"{a}.") for a in attention)
    ]


def width(model: nn.Module, block: Block) -> int | None:
    """The size of a block's hidden states; None if it is unknown."""
    return width_of(model.get_submodule(block.path))


def width_of(module: nn.Module) -> int | None:
    """The size of the hidden states in a module, from its norms; None if it has none."""
    sizes = [len(m.get_parameter("weight")) for _, m in base_modules(module) if is_norm(m)]
    return max(sizes, default=None)


def out_in(module: nn.Module) -> tuple[int, int]:
    """The sizes of a linear layer's matrix."""
    out, inp = WeightRef(module).shape[-2:]
    return int(out), int(inp)


def feedforward_outputs(model: nn.Module, block: Block) -> list[str]:
    """The layers that end the feed-forward part: they lead back to the block's width."""
    layers, d = feedforward(model, block), width(model, block)
    back = [p for p in layers if out_in(model.get_submodule(p))[0] == d != out_in(model.get_submodule(p))[1]]
    return back or layers[-1:]


def fused_experts(model: nn.Module, block: Block) -> list[str]:
    """The fused `(experts, out, in)` parameters of a block that lead back to its width, by name."""
    found = []
    for path, module in below(model, block.path):
        stacks = [n for n, p in module._parameters.items() if p is not None and p.ndim == 3]
        found += [f"{path}.{stacks[-1]}"] if len(stacks) > 1 else []
    return found


def attention_layers(model: nn.Module, roles: Sequence[str]) -> list[str]:
    """The layers of these roles (`"k"`, `"v"`, …), or the fused projection they are in."""
    kinds = [p for p, m in base_modules(model) if p and find_op(m) is not None]
    wanted = (*roles, "qkv")
    return [p for p in kinds if role_of(p.rpartition(".")[2]) in wanted]


def chosen_sites(model: nn.Module, config: TargetedConfig, paths: Sequence[str]) -> list[Site]:
    """The sites of modules that the structure gave, under a configuration's other rules; named as files will name
    them."""
    named = copy.copy(config)
    named.target_modules = set(short_names(model, paths).values())
    return weight_sites(model, targets(model, named))
