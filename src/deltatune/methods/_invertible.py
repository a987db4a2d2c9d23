"""Invertible adapters of MAD-X (arXiv 2005.00052): a map after the embeddings, undone before the head.

    NICE:  o1 = F(e2) + e1,  o2 = G(o1) + e2        e = [e1, e2], halves of the features
    Glow:  o1 = exp(a) · e1 + t, (a, t) = F(e2);  o2 = exp(b) · e2 + u, (b, u) = G(o1)        (arXiv 1807.03039)

F and G are two-layer networks. `undo` is the exact inverse, which the output embedding's input goes through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltatune.core.edits import Args, Edit, Kwargs
from deltatune.core.sites import Site, base_modules, is_norm
from deltatune.errors import ConfigError
from deltatune.methods._bottleneck import Dense, activation, initial


class Invertible(Edit):
    """At the module that embeds tokens: adds `do(y) - y`. `d` features, networks of `d / 2 / factor` units."""

    reads_output = True
    no_merge = "maps embeddings and not a weight"

    def __init__(self, kind: str, size: int, factor: float, non_linearity: str) -> None:
        super().__init__()
        half, m = size // 2, int(size / 2 / factor)
        if size % 2 or m < 1:
            raise ConfigError(
                f"inv_adapter halves the {size} features and divides them by inv_adapter_reduction_factor={factor:g}: "
                "that leaves no unit, or an odd half"
            )
        self.act, self.glow = activation(non_linearity), kind == "glow"
        out = size if self.glow else half
        self.nets = [
            (
                Dense(self, f"invertible_{name}_in", initial("bert", m, half, False)),
                Dense(self, f"invertible_{name}_out", initial("bert", out, m, True)),
            )
            for name in "FG"
        ]

    def _net(self, i: int, x: Tensor) -> Tensor:
        inner, outer = self.nets[i]
        return outer(self.act(inner(x)))

    def _couple(self, i: int, x: Tensor, by: Tensor, sign: int) -> Tensor:
        shift = self._net(i, by)
        if not self.glow:
            return x + sign * shift
        scale, shift = shift.chunk(2, -1)
        return torch.exp(scale) * x + shift if sign > 0 else (x - shift) * torch.exp(-scale)

    def do(self, e: Tensor) -> Tensor:
        e1, e2 = e.to(self.slots[0].weight.dtype).chunk(2, -1)
        o1 = self._couple(0, e1, e2, 1)
        return torch.cat([o1, self._couple(1, e2, o1, 1)], -1)

    def undo(self, o: Tensor) -> Tensor:
        o1, o2 = o.to(self.slots[0].weight.dtype).chunk(2, -1)
        e2 = self._couple(1, o2, o1, -1)
        return torch.cat([self._couple(0, o1, e2, -1), e2], -1)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.do(y) - y


class Undone(Edit):
    """At the output embedding: its input goes through the inverse."""

    no_merge = Invertible.no_merge
    follows = True

    def __init__(self, source: Invertible) -> None:
        super().__init__()
        self.source = source

    def pre(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        (x,) = args if args else kwargs.values()
        return (self.source.undo(x).to(x.dtype),), {}


def invertible(model: nn.Module, kind: str, factor: float, non_linearity: str) -> list[tuple[Site, list[Edit]]]:
    """The edits of a model: after its embeddings, and before its output embedding where it has one.

    Raises:
        ConfigError: the model has no input embedding.
    """
    getter = getattr(model, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    if not isinstance(table, nn.Embedding):  # a vision model gives the module that projects patches
        raise ConfigError(f"{type(model).__name__} embeds no tokens, so inv_adapter has no place; leave it out")
    modules = dict(base_modules(model))
    path = next(p for p, m in modules.items() if m is table)
    parent = path.rpartition(".")[0]
    children = modules[parent]._modules.values()
    # BERT's embeddings end with a norm, and what follows reads that
    whole = any(is_norm(c) for c in children if c is not None) and not any(
        isinstance(c, nn.ModuleList) for c in children
    )
    whole = whole and not any(isinstance(m, nn.ModuleList) for m in modules[parent].modules())
    edit = Invertible(kind, table.weight.shape[-1], factor, non_linearity)
    made: list[tuple[Site, list[Edit]]] = [(Site(parent if whole else path, None, pattern="invertible"), [edit])]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        end = next(p for p, m in modules.items() if m is head)
        made.append((Site(end, None, pattern="invertible"), [Undone(edit)]))
    return made
