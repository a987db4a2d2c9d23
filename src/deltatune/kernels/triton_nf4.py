"""The product of a weight in NF4 with its low-rank change beside it, on a GPU, without forming W (arXiv 2305.14314).

    y = x Wᵀ + b + s · h Bᵀ, h = x Aᵀ        backward: dx = g W + dh A, dh = s · g B

Layout, as in `deltatune.stores.nf4` and in files of bitsandbytes: the numbers of `W: (out, in)` row-major, number i in
byte i // 2, the even one in the high half; blocks of `block` numbers (64 by default), which need not end where rows do.
A block's scale is float32, or under double quantisation `map[absmax] · absmax2 + offset` with `absmax` of 8 bits in
blocks of 256. A number is rounded to the dtype that the weight had before it is multiplied, as `dequantize_nf4` does.

Both directions are one kernel: a program makes M × BJ outputs (M = 16, 32 or 64 tokens; BJ = 32 columns for up to 16
tokens, else 64), reads BL = 32 numbers of the inner axis at a time and unpacks that tile of W in registers. Where rows
are whole blocks and a tile is within one, it has one scale per row of W, else one per number. Every tile of tokens
unpacks W again, so with many tokens unpacking once and a plain product may be faster; `kernels.use("measure")` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltatune.kernels.triton_lora import block, dot, precision
from deltatune.stores.nf4 import ABSMAX_BLOCK, NF4, Nf4, dynamic_map

INNER = 32


@triton.jit
def _scale(at, absmax, absmax2, offset, codes8, inside, DOUBLE: tl.constexpr, BLOCK2: tl.constexpr):
    """The float32 scales of blocks `at`."""
    if DOUBLE:
        code = tl.load(absmax + at, mask=inside, other=0).to(tl.int32)
        return tl.load(codes8 + code) * tl.load(absmax2 + at // BLOCK2, mask=inside, other=0.0) + tl.load(offset)
    else:  # noqa: RET505 (compiled as one branch or the other)
        return tl.load(absmax + at, mask=inside, other=0.0)


@triton.jit
def _product(
    x, packed, absmax, absmax2, offset, codes, codes8, bias, h, p, y,
    T, J, L, inputs, R, s, x_row, h_row, p_r, p_j, y_row,
    BACK: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, PAIR: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, BY_ROW: tl.constexpr, INDEX: tl.constexpr, DTYPE: tl.constexpr,
    M: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[t, j] = Σ_l x[t, l] W[j, l] (W[l, j] if BACK) + bias[j] + s Σ_r h[t, r] p[r, j]."""
    t, j0 = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None], tl.program_id(1) * BJ
    j = j0 + tl.arange(0, BJ)[None, :]
    acc = tl.zeros((M, BJ), dtype=tl.float32)
    for l0 in range(0, L, BL):
        l = l0 + tl.arange(0, BL)  # noqa: E741
        down = l[:, None]
        inside = (down < L) & (j < J)
        if BACK:
            at, start = down.to(INDEX) * inputs + j, down.to(INDEX) * inputs + j0
        else:
            at, start = j.to(INDEX) * inputs + down, j.to(INDEX) * inputs + l0
        byte = tl.load(packed + (at >> 1), mask=inside, other=0).to(tl.int32)
        w = tl.load(codes + tl.where((at & 1) == 0, byte >> 4, byte & 15))
        if BY_ROW:
            rows = (down < L) if BACK else (j < J)
            w *= _scale(start // BLOCK, absmax, absmax2, offset, codes8, rows, DOUBLE, BLOCK2)
        else:
            w *= _scale(at // BLOCK, absmax, absmax2, offset, codes8, inside, DOUBLE, BLOCK2)
        w = tl.where(inside, w, 0.0).to(DTYPE)
        xs = tl.load(x + t * x_row + l[None, :], mask=(t < T) & (l[None, :] < L), other=0.0)
        acc = dot(xs, w.to(xs.dtype), acc, PRECISION)
    if PAIR:
        change = tl.zeros((M, BJ), dtype=tl.float32)
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            hs = tl.load(h + t * h_row + r[None, :], mask=(t < T) & (r[None, :] < R), other=0.0)
            ps = tl.load(p + r[:, None] * p_r + j * p_j, mask=(r[:, None] < R) & (j < J), other=0.0)
            change = dot(hs, ps, change, PRECISION)
        acc += s * change
    if BIAS:
        acc += tl.load(bias + j, mask=j < J, other=0.0).to(tl.float32)
    tl.store(y + t * y_row + j, acc.to(y.dtype.element_ty), mask=(t < T) & (j < J))


@lru_cache(maxsize=16)
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    return NF4.to(device), dynamic_map().to(device)


NAMES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product(
    x: Tensor,
    q: Nf4,
    bias: Tensor | None = None,
    pair: tuple[Tensor, Tensor] | None = None,
    s: float = 1.0,
    *,
    back: bool = False,
) -> Tensor:
    """`x Wᵀ + bias + s h p` for `x: (T, in)`; with `back`, `x W + s h p` for `x: (T, out)`.

    Args:
        pair: h `(T, r)` and p `(r, out)`, or `(r, in)` with `back`; in the dtype of `x`.
    """
    out, inputs = q.shape
    outs, inner = (inputs, out) if back else (out, inputs)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(x.shape[0], outs)
    m, codes = block(x.shape[0]), _codes(x.device)
    bj = block(outs, 32 if m == 16 else 64)
    across = bj if back else INNER  # how much of a row of W a tile holds
    h, p = (x, x) if pair is None else pair
    h = h if h.stride(-1) == 1 else h.contiguous()
    offset, absmax2 = (q.absmax if t is None else t for t in (q.offset, q.absmax2))  # unread where there is none
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _product[(triton.cdiv(x.shape[0], m), triton.cdiv(outs, bj))](
            x, q.packed, q.absmax, absmax2, offset, *codes, x if bias is None else bias, h, p, y,
            x.shape[0], outs, inner, inputs, h.shape[1], s, x.stride(0), h.stride(0), *p.stride(), y.stride(0),
            BACK=back, DOUBLE=q.offset is not None, BIAS=bias is not None, PAIR=pair is not None,
            BLOCK=q.block, BLOCK2=ABSMAX_BLOCK, BY_ROW=inputs % q.block == 0 and q.block % across == 0,
            INDEX=tl.int32 if out * inputs < 2**31 else tl.int64, DTYPE=NAMES[q.dtype],
            M=m, BJ=bj, BL=INNER, BR=block(h.shape[1]), PRECISION=precision(x.dtype),
        )  # fmt: skip
    return y


@dataclass(frozen=True)
class Nf4Product:
    """The products that a frozen weight takes part in; see `deltatune.kernels.low_rank.Product`."""

    q: Nf4

    def linear(self, x: Tensor, bias: Tensor | None, pair: tuple[Tensor, Tensor], s: float) -> Tensor:
        return product(x, self.q, bias, pair, s)

    def back(self, g: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return product(g, self.q, pair=pair, back=True)

    def operator(self, x: Tensor, bias: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
        """x Wᵀ + bias + h bᵀ for `x: (…, in)`, with gradients of all but W; for compiled code."""
        q = self.q
        numbers = (q.packed, q.absmax, q.offset, q.absmax2, list(q.shape), q.dtype, q.block)
        y: Tensor = _linear(x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1]), b, bias, *numbers)
        return y.view(*x.shape[:-1], -1)


@torch.library.custom_op("deltatune::nf4_low_rank", mutates_args=())
def _linear(
    x: Tensor,
    h: Tensor,
    b: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    absmax2: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block: int,
) -> Tensor:
    return product(x, Nf4(packed, absmax, torch.Size(shape), dtype, block, offset, absmax2), bias, (h, b.mT))


@_linear.register_fake
def _(x: Tensor, h: Tensor, b: Tensor, bias: Tensor | None, *numbers: Any) -> Tensor:
    return x.new_empty(x.shape[0], b.shape[0])


@torch.library.custom_op("deltatune::nf4_back", mutates_args=())
def _linear_back(
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    absmax2: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block: int,
) -> Tensor:
    return product(g, Nf4(packed, absmax, torch.Size(shape), dtype, block, offset, absmax2), back=True)


@_linear_back.register_fake
def _(g: Tensor, packed: Tensor, absmax: Tensor, offset: Any, absmax2: Any, shape: Sequence[int], *rest: Any) -> Tensor:
    return g.new_empty(g.shape[0], shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, h, b, bias, packed, absmax, offset, absmax2, *ctx.about = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(h, b, packed, absmax, offset, absmax2)


def _back(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    h, b, *numbers = ctx.saved_tensors
    dx = _linear_back(g, *numbers, *ctx.about) if ctx.needs_input_grad[0] else None
    d_bias = g.sum(0).to(ctx.bias) if ctx.needs_input_grad[3] else None
    return dx, g @ b, g.mT @ h, d_bias, *[None] * 7


_linear.register_autograd(_back, setup_context=_keep)
