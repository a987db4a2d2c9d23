"""Sparse changes: a few entries of a weight train, kept and saved as positions and values.

    W' = W + Δ        Δ zero but at `indices`, where it is `values`

The optimiser holds moments of the values only, and nothing of the weight's size is kept for backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.core.edits import Delta
from deltatune.core.ops import LinearOp, TransposedOp, VectorOp
from deltatune.core.weights import WeightRef


class SparseDelta(Delta):
    """The trained entries of one weight.

    Args:
        ref: the weight, `(*batch, out, in)`.
        indices: flat positions in it, `(n,)`, or one row per axis, `(axes, n)`; distinct.
        values: `(n,)`; zeros if None.
        name: of the two tensors, `<name>_indices` and `<values_name>`.
    """

    def __init__(
        self,
        ref: WeightRef,
        indices: Tensor,
        values: Tensor | None = None,
        *,
        name: str = "sparse",
        values_name: str = "sparse_values",
    ) -> None:
        super().__init__(ref)
        tail = f"_{ref.leaf}" if isinstance(ref.op, VectorOp) else ""  # a bias lives beside its weight
        kind = torch.int32 if ref.shape.numel() < 2**31 else torch.int64
        start = torch.zeros(indices.shape[-1], device=ref.device) if values is None else values
        self.values = self.tensor(f"{values_name}{tail}", start, leaf=None)
        self.indices = self.tensor(f"{name}_indices{tail}", indices.to(ref.device, kind), leaf=None, buffer=True)
        #: the layer multiplies its last axis by the matrix
        self.plain = ref.bypass and ref.rows is None and type(ref.op) in (LinearOp, TransposedOp)

    def flat(self) -> Tensor:
        """The positions in the flattened weight, `(n,)`."""
        index = self.indices.weight.long()
        return index if index.ndim == 1 else ravel(index, self.ref.shape)

    def merged(self, w: Tensor) -> Tensor:
        return w.flatten().index_add(0, self.flat(), self.values.weight.to(w.dtype)).view_as(w)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        dtype = x.dtype if x.is_floating_point() else self.ref.dtype
        values, flat = self.values.weight.to(dtype), self.flat()
        if self.plain and not torch.compiler.is_compiling():  # a compiler chooses by itself what to keep
            change: Tensor = SparseLinear.apply(x, values, flat, tuple(self.ref.shape))  # type: ignore[no-untyped-call]
            return change
        return self.ref.apply(x, dense(values, flat, self.ref.shape))


def dense(values: Tensor, flat: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """`values` at their positions of a tensor of zeros."""
    size = torch.Size(shape)
    return values.new_zeros(size.numel()).index_copy(0, flat, values).view(size)


def ravel(index: Tensor, shape: torch.Size) -> Tensor:
    """`(axes, n)` positions as flat ones."""
    flat = index[0]
    for row, size in zip(index[1:], shape[1:], strict=True):
        flat = flat * size + row
    return flat


class SparseLinear(torch.autograd.Function):
    """`x Δᵀ` that keeps positions and values for backward, and not Δ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, values, flat)
        ctx.shape = shape
        return F.linear(x, dense(values, flat, shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, values, flat) = grads, ctx.saved_tensors
        wanted_x, wanted_v = ctx.needs_input_grad[:2]
        of_x = grad @ dense(values, flat, ctx.shape) if wanted_x else None
        of_v = None
        if wanted_v:
            of_v = (grad.flatten(0, -2).mT @ x.flatten(0, -2)).flatten().index_select(0, flat)
        return of_x, of_v, None, None


def largest(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The positions of the `keep` largest scores of all tensors together: name -> flat positions, rising."""
    chosen = torch.cat([s.flatten() for s in scores.values()]).topk(keep, sorted=False).indices.sort().values
    found, start = {}, 0
    for name, score in scores.items():
        inside = chosen[(chosen >= start) & (chosen < start + score.numel())] - start
        found[name] = inside
        start += score.numel()
    return found
