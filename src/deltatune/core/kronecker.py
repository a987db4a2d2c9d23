"""Deltas that are a Kronecker product: `merged(w) = w + a ⊗ b`, never formed when the layer runs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from deltatune.core.edits import Delta
from deltatune.core.ops import kronecker


class Kronecker(Delta):
    """`factors` is all that a method has to say."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """`a: (*batch, l, m)` and `b: (*batch, out / l, in / m)`, scale included."""
        raise NotImplementedError

    def merged(self, w: Tensor) -> Tensor:
        a, b = self.factors()
        return w + kronecker(a.to(w.dtype), b.to(w.dtype))

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.ref.kron(x, *self.factors())

    def group(self) -> Hashable | None:
        if not self.ref.bypass or type(self).update is not Kronecker.update:
            return None
        return (Kronecker, self.ref.place, *(factor.shape for factor in self.factors()))

    def update_rows(self, edits: Sequence[Kronecker], sizes: Sequence[int], x: Tensor, y: Tensor | None) -> Tensor:
        a, b = (torch.stack(factors) for factors in zip(*[edit.factors() for edit in edits], strict=True))
        rows = torch.arange(len(edits), device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
        return self.ref.kron_rows(x, a[rows], b[rows])
