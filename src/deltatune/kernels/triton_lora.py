"""The low-rank change of a mixed batch on a GPU, for rows sorted by adapter (Punica, arXiv 2310.18547; S-LoRA,
arXiv 2311.03285).

    h[t] = A[n] x[t]        y[t] = B[n] h[t]        n: the adapter of token t

    backward:  dh = gᵀB[n]    dx = dh A[n]    dA[n] = Σ_t dh[t]ᵀ x[t]    dB[n] = Σ_t g[t]ᵀ h[t]

Layout: `x: (T, in)`, its tokens in one run an adapter; `a: (n, R, in)` and `b: (n, out, R)` of any strides, padded to
one rank R; `sizes` and `ranks` say how long the runs are and which rank each adapter has. Nothing is multiplied beyond
an adapter's rank, and tokens without adapter are not in `x`.

All four products of tokens and matrices are one kernel, `_rows`: a program makes `M × BJ` outputs of one run, M tokens
of it (16, 32 or 64, by the runs' mean length) and BJ columns (16 to 64), 64 numbers of the inner axis at a time (the
rank's 16 to 64). Where few programs would run (decoding), the inner axis of `h` is dealt out to up to 16 of them, and
whoever reads h adds their parts, in float32 and in a fixed order. The two gradients of weights are `_outer`: a program
makes 64 × 64 numbers (16 to 64 along the rank) of one adapter and walks its run, 32 tokens at a time, so an adapter
without tokens gets zeros and nothing depends on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltatune.kernels.gpu import INTERPRETED, bucket

#: programs that keep a GPU busy, up to which an inner axis is split; and numbers of it at a time
BUSY, MOST_PARTS, INNER = 128, 16, 64


#: the interpreter multiplies the bit patterns of bfloat16, so there it gets float32, in which the products are exact
WIDENED = (torch.bfloat16,) if INTERPRETED else ()


@triton.jit
def dot(p, q, acc, PRECISION: tl.constexpr):
    """acc + p q, accumulated in float32."""
    if PRECISION == "widened":
        return tl.dot(p.to(tl.float32), q.to(tl.float32), acc, input_precision="ieee")
    else:  # noqa: RET505 (compiled as one branch or the other)
        return tl.dot(p, q, acc, input_precision=PRECISION)


@triton.jit
def _rows(
    x, w, out, tiles, ranks, J, L, n_tiles,
    x_part, x_row, w_n, w_j, w_l, out_part, out_row,
    LIMIT_J: tl.constexpr, LIMIT_L: tl.constexpr, X_PARTS: tl.constexpr, PARTS: tl.constexpr,
    M: tl.constexpr, BJ: tl.constexpr, BL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, j] = Σ_l x[t, l] w[n, j, l]; either axis of w may be the rank, which then ends at the adapter's own."""
    tile, j0, part = tl.program_id(0), tl.program_id(1) * BJ, tl.program_id(2)
    n, end = tl.load(tiles + tile).to(tl.int64), tl.load(tiles + 2 * n_tiles + tile)
    rows = tl.load(tiles + n_tiles + tile) + tl.arange(0, M)
    inside, t = rows[:, None] < end, rows.to(tl.int64)[:, None]
    j, l = j0 + tl.arange(0, BJ)[None, :], tl.arange(0, BL)  # noqa: E741
    stop_j, stop_l = J, L
    if LIMIT_J:
        stop_j = tl.load(ranks + n)
    if LIMIT_L:
        stop_l = tl.load(ranks + n)
    acc = tl.zeros((M, BJ), dtype=tl.float32)
    if j0 < stop_j:
        for l0 in range(part * BL, stop_l, PARTS * BL):
            across, down = (l0 + l)[None, :], (l0 + l)[:, None]
            at = x + t * x_row + across
            xs = tl.load(at, mask=inside & (across < stop_l), other=0.0)
            for k in tl.static_range(1, X_PARTS):
                xs += tl.load(at + k * x_part, mask=inside & (across < stop_l), other=0.0)
            ws = tl.load(w + n * w_n + j * w_j + down * w_l, mask=(j < stop_j) & (down < stop_l), other=0.0)
            acc = dot(xs.to(ws.dtype), ws, acc, PRECISION)
    tl.store(out + part * out_part + t * out_row + j, acc.to(out.dtype.element_ty), mask=inside & (j < J))


@triton.jit
def _outer(
    p, q, out, offsets, ranks, H, J, p_row, q_row, out_n, out_i, out_j,
    LIMIT_I: tl.constexpr, LIMIT_J: tl.constexpr,
    BT: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[n, i, j] = Σ p[t, i] q[t, j] over the run of n; zero beyond its rank."""
    n, i0, j0 = tl.program_id(0), tl.program_id(1) * BI, tl.program_id(2) * BJ
    i, j = i0 + tl.arange(0, BI), j0 + tl.arange(0, BJ)
    start, end = tl.load(offsets + n), tl.load(offsets + n + 1)
    stop_i, stop_j = H, J
    if LIMIT_I:
        stop_i = tl.load(ranks + n)
    if LIMIT_J:
        stop_j = tl.load(ranks + n)
    acc = tl.zeros((BI, BJ), dtype=tl.float32)
    if (i0 < stop_i) & (j0 < stop_j):
        for t0 in range(start, end, BT):
            rows = t0 + tl.arange(0, BT)
            t = rows.to(tl.int64)
            across, down = rows[None, :] < end, rows[:, None] < end
            ps = tl.load(p + t[None, :] * p_row + i[:, None], mask=across & (i < stop_i)[:, None], other=0.0)
            qs = tl.load(q + t[:, None] * q_row + j[None, :], mask=down & (j < stop_j)[None, :], other=0.0)
            acc = dot(ps, qs, acc, PRECISION)
    at = out + n.to(tl.int64) * out_n + i.to(tl.int64)[:, None] * out_i + j[None, :] * out_j
    tl.store(at, acc.to(out.dtype.element_ty), mask=(i < H)[:, None] & (j < J)[None, :])


# ---------------------------------------------------------------------- how the work is cut
def precision(dtype: torch.dtype) -> str:
    """Products of float32 are exact unless torch's own are not."""
    if dtype in WIDENED:
        return "widened"
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def block(n: int, most: int = 64) -> int:
    """A power of two of at least 16, the least that a tensor core takes, for an axis of `n`."""
    return max(16, min(most, bucket(n)))


def rows_at_once(sizes: Sequence[int]) -> int:
    """M: tokens of a program."""
    return block(-(-sum(sizes) // len(sizes)))


def parts_of(sizes: Sequence[int], rank: int, inner: int) -> int:
    """How many programs share the inner axis of h: a power of two, 1 where the tokens alone keep a GPU busy."""
    m = rows_at_once(sizes)
    programs = sum(-(-k // m) for k in sizes) * -(-rank // block(rank))
    most = min(MOST_PARTS, -(-inner // INNER), -(-BUSY // max(programs, 1)))
    return 1 << (int(most).bit_length() - 1)


@lru_cache(maxsize=256)
def _tables(sizes: tuple[int, ...], ranks: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(adapter, first token, end of the run) of every tile `(3, tiles)`; where runs begin `(n + 1,)`; ranks `(n,)`."""
    m = rows_at_once(sizes)
    offsets = [0]
    for k in sizes:
        offsets.append(offsets[-1] + k)
    tiles = [(n, t, offsets[n + 1]) for n, k in enumerate(sizes) for t in range(offsets[n], offsets[n] + k, m)]
    numbers = ([list(c) for c in zip(*tiles, strict=True)], offsets, ranks)
    first, second, third = (torch.tensor(v, dtype=torch.int32, device=device) for v in numbers)
    return first, second, third


class Runs:
    """One cut of `(T, …)` tokens into runs, and the kernels on it; `most` is the rank R of what is padded."""

    def __init__(self, sizes: tuple[int, ...], ranks: tuple[int, ...], most: int, device: torch.device) -> None:
        self.sizes, self.limited = sizes, min(ranks) < most
        self.tiles, self.offsets, self.ranks = _tables(sizes, ranks, device)

    def rows(self, x: Tensor, w: Tensor, *, inner_is_rank: bool, parts: int = 1) -> Tensor:
        """`(parts, T, J)`, to be added up, for `x: (x_parts, T, L)` and `w: (n, J, L)`."""
        tokens, (_, outs, inner) = x.shape[1], w.shape
        out = x.new_empty(parts, tokens, outs, dtype=torch.float32 if parts > 1 else w.dtype)
        n_tiles, bj = self.tiles.shape[1], block(outs)
        _rows[(n_tiles, triton.cdiv(outs, bj), parts)](
            x, w, out, self.tiles, self.ranks, outs, inner, n_tiles,
            x.stride(0), x.stride(1), *w.stride(), out.stride(0), out.stride(1),
            LIMIT_J=self.limited and not inner_is_rank, LIMIT_L=self.limited and inner_is_rank,
            X_PARTS=x.shape[0], PARTS=parts, M=rows_at_once(self.sizes), BJ=bj, BL=block(inner, INNER),
            PRECISION=precision(w.dtype),
        )  # fmt: skip
        return out

    def outer(self, p: Tensor, q: Tensor, like: Tensor, *, rank_first: bool) -> Tensor:
        """`(n, I, J)` in the memory order of `like`, for `p: (T, I)` and `q: (T, J)`."""
        out = torch.empty_like(like)
        n, i, j = out.shape
        bi, bj = block(i), block(j)
        _outer[(n, triton.cdiv(i, bi), triton.cdiv(j, bj))](
            p, q, out, self.offsets, self.ranks, i, j, p.stride(0), q.stride(0), *out.stride(),
            LIMIT_I=self.limited and rank_first, LIMIT_J=self.limited and not rank_first,
            BT=32, BI=bi, BJ=bj, PRECISION=precision(out.dtype),
        )  # fmt: skip
        return out


# ---------------------------------------------------------------------- forward and backward
def forward(x: Tensor, a: Tensor, b: Tensor, sizes: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(y `(T, out)`, h `(parts, T, R)`)."""
    runs, parts = Runs(sizes, ranks, a.shape[1], x.device), parts_of(sizes, a.shape[1], a.shape[2])
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        h = runs.rows(_lines(x)[None], a, inner_is_rank=False, parts=parts)
        return runs.rows(h, b, inner_is_rank=True)[0], h


def backward(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, sizes: tuple[int, ...], ranks: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, da, db)."""
    runs, g = Runs(sizes, ranks, a.shape[1], x.device), _lines(g)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        dh = runs.rows(g[None], b.mT, inner_is_rank=False)
        dx = runs.rows(dh, a.mT, inner_is_rank=True)[0]
        da = runs.outer(dh[0], _lines(x), a, rank_first=True)
        hs = h[0] if len(h) == 1 else h.sum(0).to(b.dtype)
        return dx, da, runs.outer(g, hs, b, rank_first=False)


def _lines(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, sizes: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
        y, h = forward(x, a, b, sizes, ranks)
        ctx.save_for_backward(x, a, b, h)
        ctx.runs = (sizes, ranks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(g, *ctx.saved_tensors, *ctx.runs), None, None)


# The same for compiled code, to which it is one opaque operator.
@torch.library.custom_op("deltatune::grouped_low_rank", mutates_args=())
def _grouped(x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    return forward(x, a, b, tuple(sizes), tuple(ranks))


@_grouped.register_fake
def _(x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    parts = parts_of(sizes, a.shape[1], a.shape[2])
    h = x.new_empty(parts, x.shape[0], a.shape[1], dtype=torch.float32 if parts > 1 else a.dtype)
    return x.new_empty(x.shape[0], b.shape[1], dtype=b.dtype), h


@torch.library.custom_op("deltatune::grouped_low_rank_backward", mutates_args=())
def _grouped_back(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, sizes: Sequence[int], ranks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(g, x, a, b, h, tuple(sizes), tuple(ranks))


@_grouped_back.register_fake
def _(
    g: Tensor, x: Tensor, a: Tensor, b: Tensor, h: Tensor, sizes: Sequence[int], ranks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.sizes, ctx.ranks = inputs
    ctx.save_for_backward(*tensors, output[1])


def _back(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*_grouped_back(g, *ctx.saved_tensors, ctx.sizes, ctx.ranks), None, None)


_grouped.register_autograd(_back, setup_context=_keep)


def grouped_low_rank(x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """Every run's own `x A[n]ᵀ B[n]ᵀ`, `(T, out)`.

    Args:
        x: `(T, in)` of float32, bfloat16 or float16; a: `(n, R, in)`, b: `(n, out, R)` of the same dtype.
        sizes: tokens of each run, in all T; a run may be empty. ranks: of each adapter, at most R.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, _grouped(x, a, b, list(sizes), list(ranks))[0])
    return cast(Tensor, _Grouped.apply(x, a, b, tuple(sizes), tuple(ranks)))  # type: ignore[no-untyped-call]
