"""Blocks, attention and feed-forward layers, found from a model's structure and not from its name.

A block is a member of a `ModuleList` that holds attention; of lists within lists the outermost counts. What of a block
lies outside its attention is its feed-forward part. Parts that the user named by their roles (`core/named.py`) are
taken at that word.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from deltatune.core.named import UNNAMED, Named, missing
from deltatune.core.ops import find_op
from deltatune.core.roles import role_of
from deltatune.core.sites import Site, base_modules, is_linear, is_multihead, short_names, targets, weight_sites
from deltatune.core.weights import WeightRef
from deltatune.errors import TargetError

if TYPE_CHECKING:
    from deltatune.config import TargetedConfig


@dataclass(frozen=True)
class Block:
    """One layer of a transformer.

    Attributes:
        path: where it is. index: its number in its stack. stack: the path of the module that it is in; None for a
            module that is no block of a transformer.
    """

    path: str
    index: int
    stack: str | None


def is_attention(module: nn.Module) -> bool:
    """By the name of its class, as published code has it."""
    return any("attention" in cls.__name__.lower() for cls in type(module).__mro__)


def find_blocks(model: nn.Module, named: Named = UNNAMED) -> list[Block]:
    """Every block, in the model's order; an encoder's before its decoder's where the model has them so.

    Raises:
        TargetError: there are none.
    """
    if "blocks" in named:
        return _blocks(named.inside("blocks", ""))
    modules = dict(base_modules(model))
    attending = [p for p, m in modules.items() if is_attention(m)]
    if "attention" in named:
        attending = [*named.inside("attention", ""), *named.inside("cross_attention", "")]
    lists = [p for p, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    holding = [p for p in lists if any(a.startswith(f"{p}.") for a in attending)]
    inside = [p for p in holding if any(a.startswith(f"{p}.") and a.count(".") == p.count(".") + 1 for a in attending)]
    outer = [p for p in holding if p not in inside and not any(p.startswith(f"{q}.") for q in holding)]
    blocks = [Block(f"{p}.{name}", i, p) for p in outer for i, name in enumerate(modules[p]._modules)]
    if not blocks:
        raise missing(model, "blocks")
    return blocks


def _blocks(paths: Sequence[str]) -> list[Block]:
    """Blocks that the user named, numbered within what holds them."""
    counts: dict[str, int] = {}
    found = []
    for path in paths:
        around = next((p for p in paths if path.startswith(f"{p}.")), None)
        if around is not None:
            raise TargetError(f"roles['blocks'] names {around!r} and {path!r}, which is inside it; name one of them")
        stack = path.rpartition(".")[0]
        found.append(Block(path, counts.get(stack, 0), stack))
        counts[stack] = counts.get(stack, 0) + 1
    return found


def attention_parts(model: nn.Module, block: Block, named: Named = UNNAMED) -> list[str]:
    """The attentions of a block, to itself and to an encoder; outermost only.

    Raises:
        TargetError: there is none in a block that the user named.
    """
    if "attention" in named:
        return [*named.inside("attention", block.path), *named.inside("cross_attention", block.path)]
    inner = below(model, block.path)
    every = [p for p, m in inner if p != block.path and (is_attention(m) or is_multihead(m))]
    if not every and "blocks" in named:
        raise missing(model, "attention", block.path)
    return [p for p in every if not any(p.startswith(f"{q}.") for q in every)]


def below(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The base's own modules inside one."""
    return [(f"{path}.{p}" if p else path, m) for p, m in base_modules(model.get_submodule(path))]


def feedforward(model: nn.Module, block: Block, named: Named = UNNAMED) -> list[str]:
    """The linear layers of a block outside its attention, in order; a router's are left out."""
    inner = below(model, block.path)
    layers = [p for p, m in inner if find_op(m) is not None and is_linear(m)]
    if "feedforward" in named:
        parts = named.inside("feedforward", block.path)
        return [p for p in layers if any(f"{p}.".startswith(f"{q}.") for q in parts)]
    attention = attention_parts(model, block, named)
    return [p for p in layers if not any(f"{p}.".startswith(f"{a}.") for a in attention)]


def width(model: nn.Module, block: Block, named: Named = UNNAMED) -> int | None:
    """The size of a block's hidden states; None if it is unknown."""
    return width_of(model.get_submodule(block.path), block.path, named)


def width_of(module: nn.Module, path: str = "", named: Named = UNNAMED) -> int | None:
    """The size of the hidden states in a module, from its norms; None if it has none.

    Args:
        path: of the module, where norms are named.
    """
    inner = [(f"{path}.{p}" if path and p else path or p, m) for p, m in base_modules(module)]
    norms = [m for p, m in inner if named.is_norm(p, m)]
    sizes = [len(v) for m in norms for v in m._parameters.values() if v is not None and v.ndim == 1]
    return max(sizes, default=None)


def out_in(module: nn.Module) -> tuple[int, int]:
    """The sizes of a linear layer's matrix."""
    out, inp = WeightRef(module).shape[-2:]
    return int(out), int(inp)


def feedforward_outputs(model: nn.Module, block: Block, named: Named = UNNAMED) -> list[str]:
    """The layers that end the feed-forward part: they lead back to the block's width."""
    if "feedforward_output" in named:
        return named.inside("feedforward_output", block.path)
    layers, d = feedforward(model, block, named), width(model, block, named)
    back = [p for p in layers if out_in(model.get_submodule(p))[0] == d != out_in(model.get_submodule(p))[1]]
    return back or layers[-1:]


def fused_experts(model: nn.Module, block: Block) -> list[str]:
    """The fused `(experts, out, in)` parameters of a block that lead back to its width, by name."""
    found = []
    for path, module in below(model, block.path):
        stacks = [n for n, p in module._parameters.items() if p is not None and p.ndim == 3]
        found += [f"{path}.{stacks[-1]}"] if len(stacks) > 1 else []
    return found


#: role of a layer in attention -> the same as users name it
PROJECTIONS = {"q": "query", "k": "key", "v": "value"}


def attention_layers(model: nn.Module, roles: Sequence[str], named: Named = UNNAMED) -> list[str]:
    """The layers of these roles (`"k"`, `"v"`, …), or the fused projection they are in.

    Raises:
        TargetError: there is none of a role.
    """
    kinds = [p for p, m in base_modules(model) if p and find_op(m) is not None]
    found: set[str] = set()
    for role in roles:
        word = PROJECTIONS[role]
        hits = named.inside(word, "")
        if word not in named:
            hits = [p for p in kinds if role_of(p.rpartition(".")[2]) in (role, "qkv")]
            if not hits:
                parts = named.inside("attention", "") or [p for p, m in base_modules(model) if is_attention(m)]
                raise missing(model, word, next(iter(parts), ""))
        found.update(hits)
    return [p for p, _ in base_modules(model) if p in found]


def chosen_sites(model: nn.Module, config: TargetedConfig, paths: Sequence[str]) -> list[Site]:
    """The sites of modules that the structure gave, under a configuration's other rules; named as files will name
    them."""
    named = copy.copy(config)
    named.target_modules = set(short_names(model, paths).values())
    return weight_sites(model, targets(model, named))
