"""The sub-layers of a transformer's blocks: where attention and feed-forward end, and the norms after them.

    x1 = x + Attn(x);  y = x1 + FFN(x1)                  pre-norm: a norm before each sub-layer
    x1 = LN(x + Attn(x));  y = LN(x1 + FFN(x1))          post-norm: a norm after each sum

Found from the structure: a sub-layer's *output* is the last layer that leads back to the block's width (with the
dropout behind it where that is a module of its own); a *norm* is the one that is called on the sum, told from the
order in which the block's code names its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from deltatune.core import structure
from deltatune.core.calls import SUM, calls
from deltatune.core.named import UNNAMED, Named, missing
from deltatune.core.roles import role_of
from deltatune.core.sites import base_modules, is_linear, is_multihead, is_norm
from deltatune.core.structure import Block, attention_parts, find_blocks, is_attention
from deltatune.errors import TargetError

ATTENTION, CROSS, FEEDFORWARD = "attention", "cross", "feedforward"
#: kind of sub-layer -> the role of the norm behind it
NORMS = {
    ATTENTION: "norm_after_attention",
    CROSS: "norm_after_cross_attention",
    FEEDFORWARD: "norm_after_feedforward",
}


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
        adds: the module whose output, as it is, is a summand of the sub-layer's own residual sum: `output`, or a norm
            behind it (Gemma 2); None where there is no such sum (parts that run side by side, scaled ones).
    """

    kind: str
    block: Block
    output: str
    reads: str
    norm: str | None
    size: int
    residual: str = ""
    adds: str | None = None


def find_sublayers(model: nn.Module, named: Named = UNNAMED) -> list[SubLayer]:
    """Every attention and feed-forward sub-layer, block by block, in the order of the call.

    Raises:
        TargetError: the model has no blocks, or a block's part is not found; says which.
    """
    return [sub for block in find_blocks(model, named) for sub in _Parts(model, block, named).all()]


class _Parts:
    """The sub-layers of one block."""

    def __init__(self, model: nn.Module, block: Block, named: Named) -> None:
        self.model, self.block, self.named = model, block, named
        self.modules = dict(structure.below(model, block.path))
        self.attentions = attention_parts(model, block, named)
        self.norms = {p for p, m in self.modules.items() if named.is_norm(p, m)}
        if not self.norms and "norm" not in named:  # without, a sum that is normed looks like one that is not
            raise missing(model, "norm", block.path)
        self.linears = {p for p, m in self.modules.items() if is_linear(m)}

    def all(self) -> list[SubLayer]:
        return [*(self.attention(p) for p in self.attentions), self.feedforward()]

    def part(self, kind: str, output: str, reads: str) -> SubLayer:
        norm = self._norm_after(output)
        if NORMS[kind] in self.named:
            norm = next(iter(self.named.inside(NORMS[kind], self.block.path)), None)
        before = reads if norm is not None else self._norm_before(output, reads) or reads
        size = structure.width(self.model, self.block, self.named) or output_size(self.modules[output], output)
        end = self._with_dropout(output)
        added = self._added(output)
        return SubLayer(kind, self.block, end, reads, norm, size, before, end if added == output else added)

    # ------------------------------------------------------------------ attention
    def attention(self, path: str) -> SubLayer:
        inner = path.removeprefix(f"{self.block.path}.")
        cross = _is_cross(inner) if "attention" not in self.named else path in self.named.inside("cross_attention", "")
        outputs = self.named.inside("attention_output", path) or self._attention_outputs(path)
        if not outputs:
            raise missing(self.model, "attention_output", path)
        sub = self.part(CROSS if cross else ATTENTION, outputs[-1], path)
        if not sub.residual.startswith(f"{path}."):
            return sub
        # T5's holds the norm before it, too: what reads the norm's output is inside
        within = [p for p, m in self.modules.items() if p.startswith(f"{path}.") and is_attention(m)]
        return replace(sub, reads=next((p for p in within if sub.output.startswith(f"{p}.")), path))

    def _attention_outputs(self, path: str) -> list[str]:
        """The linear layers of an attention that are no query, key or value, in the order of calls if known."""
        modules = self.modules
        if is_multihead(modules[path]):  # it reads its output layer's weight and never calls the layer
            return [path]
        inside = [p for p, m in modules.items() if f"{p}.".startswith(f"{path}.") and (is_linear(m) or is_multihead(m))]
        others = {p for role in ("query", "key", "value") for p in self.named.inside(role, path)}
        leaves = {p: p.rpartition(".")[2] for p in inside}
        ends = [p for p in inside if role_of(leaves[p]) is None and not leaves[p].startswith("pos") and p not in others]
        if "attention" not in self.named:
            return ends
        order = calls(modules[path], path, set(ends))
        return [p for p in order if p in ends] or ends

    # ------------------------------------------------------------------ feed-forward
    def feedforward(self) -> SubLayer:
        named, path = self.named, self.block.path
        whole, end = named.inside("feedforward", path), named.inside("feedforward_output", path)
        if not whole and not end:
            return self.part(FEEDFORWARD, *self._feedforward())
        ends = end or [p for p in structure.feedforward_outputs(self.model, self.block, named) if p in self.modules]
        reads = whole[0] if whole else structure.feedforward(self.model, self.block, named)[0]
        return self.part(FEEDFORWARD, ends[0] if len(ends) == 1 else reads, reads)

    def _feedforward(self) -> tuple[str, str]:
        """(the end, the start) of the feed-forward part; experts count as one module."""
        model, modules, block = self.model, self.modules, self.block
        layers = structure.feedforward(model, block, self.named)
        ends = [p for p in structure.feedforward_outputs(model, block, self.named) if is_linear(modules[p])]
        experts = structure.fused_experts(model, block)
        if layers and len(ends) == 1 and not experts:
            first = layers[0]
            parent = first.rpartition(".")[0]
            # a module that holds the whole part, and nothing else, reads what the part reads
            whole = ends[0].startswith(f"{parent}.") and parent != block.path
            whole = whole and not any(p.startswith(f"{parent}.") for p in self.norms)
            return ends[0], parent if whole else first
        inner = experts or ends
        if not inner:
            raise missing(model, "feedforward", block.path)
        child = inner[0].removeprefix(f"{block.path}.").partition(".")[0]
        return f"{block.path}.{child}", f"{block.path}.{child}"

    # ------------------------------------------------------------------ what stands around
    def _with_dropout(self, path: str) -> str:
        """The dropout behind a layer, where both stand beside a norm and so in one small module."""
        parent = path.rpartition(".")[0]
        beside = {p: m for p, m in self.modules.items() if p.rpartition(".")[0] == parent}
        drops = [p for p, m in beside.items() if "dropout" in type(m).__name__.lower()]
        if len(drops) == 1 and len(beside) == 3 and any(p in self.norms for p in beside):
            return drops[0]
        return path

    def _order(self, out: str) -> list[str]:
        return calls(self.modules[self.block.path], self.block.path, {*self.norms, *self.linears, out})

    def _norm_after(self, out: str) -> str | None:
        """The norm called on the sum of a part's output and what came in; None where norms stand before the parts.

        A block of the former kind ends with a norm; one whose norms are before its parts, or on their outputs alone
        (OLMo 2), ends with a sum.
        """
        order = self._order(out)
        if out not in order or next((e for e in reversed(order) if e in self.norms or e == SUM), SUM) == SUM:
            return None
        return next((e for e in order[order.index(out) + 1 :] if e in self.norms), None)

    def _added(self, out: str) -> str | None:
        """What of a part is added to the residual: its output, or the norm of it; None if it is not added alone."""
        order = self._order(out)
        rest = order[order.index(out) + 1 :] if out in order else []
        if len(rest) > 1 and rest[0] in self.norms and rest[1] == SUM:
            return rest[0]
        return out if rest and rest[0] == SUM else None

    def _norm_before(self, out: str, reads: str) -> str | None:
        """The norm whose output a sub-layer reads, in a pre-norm block; not one of its own queries and keys."""
        order = self._order(out)
        first = (i for i, e in enumerate(order) if e == out or (e in self.linears and f"{e}.".startswith(f"{reads}.")))
        for event in reversed(order[: next(first, 0)]):
            if event == SUM:
                return None
            if event in self.norms:
                return event
        return None


def _is_cross(path: str) -> bool:
    """Attention to an encoder, as published code names it."""
    low = path.lower().replace("_", "")
    return any(word in low for word in ("cross", "encoderattn", "encdec")) or low == "layer.1"


def named_outputs(model: nn.Module, paths: Sequence[str]) -> list[SubLayer]:
    """Modules that the user named, as sub-layers that end with them."""
    modules = dict(base_modules(model))
    sizes = [output_size(modules[p], p) for p in paths]
    return [SubLayer(FEEDFORWARD, Block(p, i, None), p, p, None, sizes[i]) for i, p in enumerate(paths)]


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
