"""The sub-layers of a transformer's blocks: where attention and feed-forward end, and the norms after them.

    x1 = x + Attn(x);  y = x1 + FFN(x1)                  pre-norm: a norm before each sub-layer
    x1 = LN(x + Attn(x));  y = LN(x1 + FFN(x1))          post-norm: a norm after each sum

Found from the structure: a sub-layer's *output* is the last layer that leads back to the block's width (with the
dropout behind it where that is a module of its own); a *norm* is the one that is called on the sum, told from the
order in which the block's code names its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from deltatune.core import structure
from deltatune.core.calls import SUM, calls
from deltatune.core.roles import role_of
from deltatune.core.sites import base_modules, is_linear, is_multihead, is_norm
from deltatune.core.structure import Block, find_blocks, is_attention
from deltatune.errors import TargetError

ATTENTION, CROSS, FEEDFORWARD = "attention", "cross", "feedforward"


@dataclass(frozen=True)
class SubLayer:
    """One sub-layer of a block.

    Attributes:
        kind: `"attention"`, `"cross"` or `"feedforward"`. block: where it is.
        output: the module whose output goes into the residual sum.
        reads: the module whose first input is the sub-layer's input.
        norm: the norm that is called on the sum; None in pre-norm models.
        residual: the module whose first input is what the sub-layer's output is added to: `reads`, or in pre-norm
            models the norm before it.
        size: of the hidden states.
    """

    kind: str
    block: Block
    output: str
    reads: str
    norm: str | None
    size: int
    residual: str = ""


def find_sublayers(model: nn.Module) -> list[SubLayer]:
    """Every attention and feed-forward sub-layer, block by block, in the order of the call.

    Raises:
        TargetError: the model has no blocks, or a block's part is not found; says which.
    """
    return [sub for block in find_blocks(model) for sub in _of_block(model, block)]


def _of_block(model: nn.Module, block: Block) -> list[SubLayer]:
    modules = dict(structure.below(model, block.path))
    size = structure.width(model, block)
    if size is None:
        raise _missing(model, block, "norm")
    found = []
    for path in _attentions(modules, block):
        kind = CROSS if _is_cross(path.removeprefix(f"{block.path}.")) else ATTENTION
        out = _attention_output(modules, path)
        if out is None:
            raise _missing(model, block, "output projection of attention")
        norm = _norm_after(modules, block, out)
        before = path if norm is not None else _norm_before(modules, block, out) or path
        found.append(SubLayer(kind, block, _with_dropout(modules, out), path, norm, size, before))
    out, reads = _feedforward(model, modules, block)
    norm = _norm_after(modules, block, out)
    before = reads if norm is not None else _norm_before(modules, block, out) or reads
    return [*found, SubLayer(FEEDFORWARD, block, _with_dropout(modules, out), reads, norm, size, before)]


def _missing(model: nn.Module, block: Block, role: str) -> TargetError:
    return TargetError(
        f"no {role} is found in {block.path!r} of this {type(model).__name__}; name the modules whose output the "
        "adapter changes in target_modules"
    )


def _attentions(modules: dict[str, nn.Module], block: Block) -> list[str]:
    """The attention parts of a block, outermost only."""
    every = [p for p, m in modules.items() if p != block.path and (is_attention(m) or is_multihead(m))]
    return [p for p in every if not any(p.startswith(f"{q}.") for q in every)]


def _is_cross(path: str) -> bool:
    """Attention to an encoder, as published code names it."""
    low = path.lower().replace("_", "")
    return any(word in low for word in ("cross", "encoderattn", "encdec")) or low == "layer.1"


def _attention_output(modules: dict[str, nn.Module], path: str) -> str | None:
    """The last linear layer of an attention that is no query, key or value."""
    if is_multihead(modules[path]):  # it reads its output layer's weight and never calls the layer
        return path
    inside = [p for p, m in modules.items() if f"{p}.".startswith(f"{path}.") and (is_linear(m) or is_multihead(m))]
    ends = [p for p in inside if role_of(p.rpartition(".")[2]) is None and not p.rpartition(".")[2].startswith("pos")]
    return ends[-1] if ends else None


def _feedforward(model: nn.Module, modules: dict[str, nn.Module], block: Block) -> tuple[str, str]:
    """(the end, the start) of the feed-forward part; experts count as one module."""
    layers = structure.feedforward(model, block)
    ends = [p for p in structure.feedforward_outputs(model, block) if is_linear(modules[p])] if layers else []
    experts = structure.fused_experts(model, block)
    if len(ends) == 1 and not experts:
        first = layers[0]
        parent = first.rpartition(".")[0]
        # a module that holds the whole part, and nothing else, reads what the part reads
        whole = ends[0].startswith(f"{parent}.") and parent != block.path and _norms_in(modules, parent) == []
        return ends[0], parent if whole else first
    inner = experts or ends
    if not inner:
        raise _missing(model, block, "feed-forward part")
    child = inner[0].removeprefix(f"{block.path}.").partition(".")[0]
    return f"{block.path}.{child}", f"{block.path}.{child}"


def _norms_in(modules: dict[str, nn.Module], path: str) -> list[str]:
    return [p for p, m in modules.items() if p.startswith(f"{path}.") and is_norm(m)]


def _with_dropout(modules: dict[str, nn.Module], path: str) -> str:
    """The dropout behind a layer, where both stand beside a norm and so in one small module."""
    parent = path.rpartition(".")[0]
    beside = {p: m for p, m in modules.items() if p.rpartition(".")[0] == parent}
    drops = [p for p, m in beside.items() if "dropout" in type(m).__name__.lower()]
    if len(drops) == 1 and len(beside) == 3 and any(is_norm(m) for m in beside.values()):
        return drops[0]
    return path


def _norm_after(modules: dict[str, nn.Module], block: Block, out: str) -> str | None:
    """The norm called on the sum of a part's output and what came in; None where norms stand before the parts.

    A block of the former kind ends with a norm; one whose norms are before its parts, or on their outputs alone
    (OLMo 2), ends with a sum.
    """
    norms = {p for p, m in modules.items() if is_norm(m)}
    order = calls(modules[block.path], block.path, {*norms, out})
    if out not in order or next((e for e in reversed(order) if e in norms or e == SUM), SUM) == SUM:
        return None
    return next((e for e in order[order.index(out) + 1 :] if e in norms), None)


def _norm_before(modules: dict[str, nn.Module], block: Block, out: str) -> str | None:
    """The norm whose output a sub-layer reads, in a pre-norm block."""
    norms = {p for p, m in modules.items() if is_norm(m)}
    order = calls(modules[block.path], block.path, {*norms, out})
    for event in reversed(order[: order.index(out)] if out in order else []):
        if event == SUM:
            return None
        if event in norms:
            return event
    return None


def named_outputs(model: nn.Module, paths: Sequence[str]) -> list[SubLayer]:
    """Modules that the user named, as sub-layers that end with them."""
    modules = dict(base_modules(model))
    return [SubLayer(FEEDFORWARD, Block(p, i, ""), p, p, None, output_size(modules[p], p)) for i, p in enumerate(paths)]


def output_size(module: nn.Module, path: str) -> int:
    """How many features a module gives.

    Raises:
        TargetError: it cannot be told.
    """
    if is_linear(module) and not is_multihead(module):
        return structure.out_in(module)[0]
    for name in ("embed_dim", "embedding_dim", "hidden_size", "normalized_shape"):
        value = getattr(module, name, None)
        if isinstance(value, (int, tuple)):
            return int(value if isinstance(value, int) else value[-1])
    norms = [len(m.get_parameter("weight")) for _, m in base_modules(module) if is_norm(m)]
    linears = [structure.out_in(m)[0] for _, m in base_modules(module) if is_linear(m) and not is_multihead(m)]
    if norms or linears:
        return norms[-1] if norms else linears[-1]
    raise TargetError(
        f"{path!r}, a {type(module).__name__}, has no last axis of a known size, so no bottleneck fits behind it; "
        "name a linear layer, an embedding, an attention or a block"
    )
