"""One autograd node for a linear layer with a low-rank change:

    u = W x + s · B A drop(x)        y = c ∘ u + b        c: (out,), 1 where nothing rescales rows

Kept for backward: x itself (its storage is shared by all layers that read it) where A trains, h = A drop(x), and, where
c trains, the output, which activations keep anyway. Casts are made again, dropout is drawn again from its seed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltatune import kernels
from deltatune.kernels.dropout import dropper, new_seed

Backward = TypeVar("Backward", bound=Callable[..., Any])


class Product(Protocol):
    """A frozen weight W `(out, in)` that is no ordinary tensor, with products of its own."""

    def linear(self, x: Tensor, bias: Tensor | None, pair: tuple[Tensor, Tensor], s: float) -> Tensor:
        """x Wᵀ + bias + s · h p, for `pair` h `(T, r)` and p `(r, out)`."""

    def back(self, g: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """g W + dh a, for `pair` dh `(T, r)` and a `(r, in)`."""

    def operator(self, x: Tensor, bias: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
        """x Wᵀ + bias + h bᵀ for `x: (…, in)` as a registered operator, with gradients of all but W."""


def low_rank_linear(
    x: Tensor,
    base: Tensor | tuple[Tensor | Product, Tensor | None],
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    p: float = 0.0,
    c: Tensor | None = None,
) -> Tensor:
    """The changed layer's output.

    Args:
        x: `(…, in)`.
        base: the layer's own output `(…, out)`, or its weight `(out, in)` and bias, whose product is then made here.
            A weight may also be a `Product`.
        a: `(r, in)`. b: `(out, r)`; of any dtype. scale: s.
        p: probability of dropout on the input of `a`.
        c: `(out,)`, only with a weight; there must be no dropout then.
    """
    y, w, bias = (base, None, None) if isinstance(base, Tensor) else (None, *base)
    if torch.is_grad_enabled() or p:
        numbers = (scale, p, new_seed() if p else 0, kernels.mode() == "lean")
        return cast(Tensor, _LowRankLinear.apply(x, y, w, bias, a, b, c, numbers))  # type: ignore[no-untyped-call]
    return _forward(x, y, w, bias, a, b, c, scale, x)[0]


def _forward(
    x: Tensor,
    y: Tensor | None,
    w: Tensor | Product | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scale: float,
    dropped: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y, h); `scale` has the rescaling of dropout in it."""
    dtype = x.dtype if y is None else y.dtype
    b = b.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    h = F.linear(dropped.reshape(rows.shape).to(dtype), a.to(dtype))  # (T, r)
    if y is not None:
        return own_shape(torch.addmm(y.reshape(-1, y.shape[-1]), h, b.mT, alpha=scale), x), h
    assert w is not None
    out = _linear(w, rows, bias if c is None else None, h, b, scale)
    if c is not None:
        out.mul_(c.to(dtype))
        if bias is not None:
            out.add_(bias)
    return own_shape(out, x), h


def own_shape(rows: Tensor, x: Tensor) -> Tensor:
    """The output `(T, out)` in the shape of the input. It is no view for autograd, which forbids operations in place
    (`nn.ReLU(inplace=True)`) on views that a node returns; nobody else may hold `rows`."""
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])  # type: ignore[no-any-return]


def without_autocast(backward: Backward) -> Backward:
    """Backward of a node in the types of its forward, wherever it is called."""

    @functools.wraps(backward)
    def run(ctx: Any, *dys: Any) -> Any:
        with _no_autocast(next((dy.device.type for dy in dys if dy is not None), "cpu")):
            return backward(ctx, *dys)

    return cast(Backward, run)


def _no_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class _Kept(torch.autograd.Function):
    """A node for nothing but what it has kept: reading that fails where it was changed in place, and with it would the
    rest of what a node keeps."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *outs: Tensor) -> Tensor:
        ctx.save_for_backward(*outs)
        ctx.versions = [out._version for out in outs]  # autograd looks at none where hooks (a checkpoint's) keep them
        return anchor.new_empty(0)


def keep(anchor: Tensor, outs: Sequence[Tensor]) -> Any:
    """Keeps a node's outputs for `kept`; `anchor` is any tensor that trains."""
    with torch.enable_grad():
        return _Kept.apply(anchor, *(out.detach() for out in outs)).grad_fn  # type: ignore[no-untyped-call]


def kept(ctx: Any) -> tuple[Tensor, ...] | None:
    """What `keep` has put there, once; None where it is gone or was changed in place (`nn.ReLU(inplace=True)`)."""
    node, ctx.kept = ctx.kept, None  # else it would be there as long as the graph
    if node is None:
        return None
    try:
        outs = tuple(node.saved_tensors)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None
    return outs if [out._version for out in outs] == node.versions else None


def _linear(w: Tensor | Product, x: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, s: float) -> Tensor:
    """x Wᵀ + bias + s · h bᵀ."""
    if isinstance(w, Tensor):
        return F.linear(x, w, bias).addmm_(h, b.mT, alpha=s)
    return w.linear(x, bias, (h, b.mT), s)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        w: Tensor | Product | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        numbers: tuple[float, float, int, bool],
    ) -> Tensor:
        scale, p, seed, lean = numbers
        with _no_autocast(x.device.type):
            dropped, s = x, scale
            if p:
                copy = x.clone(memory_format=torch.contiguous_format)
                dropped, s = dropper(x.shape, x.device, p, seed)(copy), scale / (1 - p)
            out, h = _forward(x, y, w, bias, a, b, c, s, dropped)
        need_c = ctx.needs_input_grad[6]
        need_x = ctx.needs_input_grad[4] or need_c
        dense = isinstance(w, Tensor)
        ctx.save_for_backward(x if need_x else None, w if dense else None, a, b, c, h, bias if need_c else None)
        ctx.kept = keep(cast(Tensor, c), [out]) if need_c and not lean else None
        ctx.product = None if dense else w
        ctx.numbers, ctx.like, ctx.dtype = (s, p, seed), (x.shape, x.dtype, x.device), out.dtype
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, c, h, bias = ctx.saved_tensors
        (out,) = kept(ctx) or (None,)
        w = w if ctx.product is None else ctx.product
        s, p, seed = ctx.numbers
        shape, x_dtype, device = ctx.like
        need_x, need_y, _, need_bias, need_a, need_b, need_c, _ = ctx.needs_input_grad
        dtype = ctx.dtype
        g = dy.reshape(-1, dy.shape[-1])
        d_bias = g.sum(0) if need_bias else None
        if x is not None:
            x = x.reshape(-1, shape[-1]).to(dtype)
        dc = grad_of_c(g, x, w, a, b, c, h, out, bias, s) if need_c else None
        if c is not None:
            g = g * c.to(dtype)
        db = torch.empty_like(b).copy_((h.mT @ g).mT).mul_(s) if need_b else None  # in B's own memory order
        dh = g @ b.to(dtype) * s if need_a or need_x else None  # (T, r)
        drop = dropper(torch.Size([g.shape[0], shape[-1]]), device, p, seed) if p and dh is not None else None
        dx = da = None
        if need_a:
            assert dh is not None
            da = (dh.mT @ (x if drop is None else drop(x.clone()))).to(a.dtype)
        if need_x:
            assert dh is not None
            dx = _grad_of_x(g, w, dh, a.to(dtype), drop).view(shape).to(x_dtype)
        return dx, dy if need_y else None, None, d_bias, da, db, dc, None


def _grad_of_x(g: Tensor, w: Tensor | Product | None, dh: Tensor, a: Tensor, drop: Any) -> Tensor:
    """Wᵀ g + drop(Aᵀ dh)."""
    if w is not None and not isinstance(w, Tensor):
        return w.back(g, (dh, a)) if drop is None else w.back(g).add_(drop(dh @ a))
    if drop is not None:
        ours: Tensor = drop(dh @ a)
        return ours if w is None else ours.addmm_(g, w)
    return dh @ a if w is None else torch.mm(g, w).addmm_(dh, a)


def grad_of_c(
    g: Tensor,
    x: Tensor | None,
    w: Tensor | Product,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    h: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    s: float,
) -> Tensor:
    """Σ g ∘ u over positions, from the output (u = (y - b) / c), or from u made again."""
    if out is None:
        assert x is not None
        u = _linear(w, x, None, h, b.to(h.dtype), s)
        return (g * u).sum(0).to(c.dtype)
    total = (g * out.reshape(g.shape)).sum(0, dtype=c.dtype)
    if bias is not None:
        total = total - bias * g.sum(0, dtype=c.dtype)
    zero = c == 0
    if not bool(zero.any()):
        return total / c
    assert x is not None  # rows that c silences say nothing of their u
    rows = zero.nonzero().flatten()
    if isinstance(w, Tensor):
        u = _linear(w[rows], x, None, h, b[rows].to(h.dtype), s)
    else:
        u = _linear(w, x, None, h, b.to(h.dtype), s)[:, rows]
    return torch.where(zero, 0, total / torch.where(zero, 1, c)).index_copy(
        0, rows, (g[:, rows] * u).sum(0).to(c.dtype)
    )
