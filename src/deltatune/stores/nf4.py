"""NF4, the 4-bit normal float of QLoRA (arXiv 2305.14314), in plain PyTorch; bit for bit what bitsandbytes gives.

A weight is flattened row-major and cut in blocks of 64; a block keeps its largest magnitude c in float32 and, for
each number, the index of the code nearest to w / c (the lower one at a midpoint). Two indices share a byte, the
earlier one in the high half. Double quantisation stores c - mean(c) in 8 bits, in blocks of 256; there bitsandbytes'
CPU kernel rounds to a grid of 65,536 before it looks for the nearest code, so about one in a thousand of its 8-bit
codes is the second nearest, and ours is the nearest. Reading its codes is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.stores.grid import in_blocks, moved

#: the codes as bitsandbytes has them; `normal_float(4)` computes them to 1e-7
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
BLOCK, ABSMAX_BLOCK = 64, 256


@lru_cache
def normal_float(bits: int) -> Tensor:
    """The `2**bits` quantiles of a normal distribution, scaled to [-1, 1], zero among them and one more above it."""
    half = 2 ** (bits - 1)
    offset = 0.9677083  # what bitsandbytes uses, (1 - 1/32 + 1 - 1/30) / 2

    def quantiles(n: int) -> Tensor:
        at = torch.linspace(offset, 0.5, n + 1, dtype=torch.float64, device="cpu")[:-1]
        found: Tensor = torch.special.ndtri(at)
        return found

    values = torch.cat([quantiles(half), torch.zeros(1, dtype=torch.float64, device="cpu"), -quantiles(half - 1)])
    values = values.sort().values / values.max()
    return values.float()


@lru_cache
def dynamic_map() -> Tensor:
    """The 256 codes of bitsandbytes' signed 8-bit map: seven decades, finer towards 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = ((edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)).tolist()
        values += means + [-m for m in means]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


# ---------------------------------------------------------------------- blocks and codes
def to_codes(w: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(index of the nearest code per number, `(n,)`; largest magnitude per block, float32)."""
    flat = w.detach().reshape(-1).float()
    blocks = F.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = torch.where(absmax > 0, blocks / absmax, 0.0)  # a block of zeros stays zeros
    code = code.to(flat.device)
    index = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)  # at a midpoint, the lower code
    return index.view(-1)[: flat.numel()].to(torch.uint8), absmax.view(-1)


def from_codes(index: Tensor, absmax: Tensor, code: Tensor, block: int) -> Tensor:
    """The numbers that `to_codes` stands for, `(n,)` float32."""
    numbers = code.to(index.device)[index.int()]
    blocks = F.pad(numbers, (0, -numbers.numel() % block)).view(-1, block)
    return (blocks * absmax.view(-1, 1)).view(-1)[: numbers.numel()]


def pack(index: Tensor) -> Tensor:
    """Two 4-bit indices per byte: `(n,)` -> `((n + 1) // 2, 1)`; an odd end is filled with the code of zero."""
    pairs = F.pad(index, (0, index.numel() % 2), value=7).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack(packed: Tensor, n: int) -> Tensor:
    """The first `n` indices in packed bytes."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[:n]


# ---------------------------------------------------------------------- whole weights
@dataclass(frozen=True)
class Nf4:
    """A quantised weight.

    Attributes:
        packed: `((n + 1) // 2, 1)` bytes. absmax: float32 per block, or 8-bit codes under double quantisation.
        shape, dtype: of the weight. block: numbers per block.
        offset, absmax2: mean of the float32 `absmax`, and the magnitudes of its own blocks; None without
            double quantisation.
    """

    packed: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block: int = BLOCK
    offset: Tensor | None = None
    absmax2: Tensor | None = None


def quantize_nf4(w: Tensor, block: int = BLOCK, *, double: bool = False) -> Nf4:
    """Quantises a floating-point tensor of any shape."""
    index, absmax = to_codes(w, NF4, block)
    packed = pack(index)
    if not double:
        return Nf4(packed, absmax, w.shape, w.dtype, block)
    offset = absmax.mean()
    codes, absmax2 = to_codes(absmax - offset, dynamic_map(), ABSMAX_BLOCK)
    return Nf4(packed, codes, w.shape, w.dtype, block, offset, absmax2)


def scales(q: Nf4) -> Tensor:
    """The float32 scale of each block."""
    if q.offset is not None and q.absmax2 is not None:
        return from_codes(q.absmax, q.absmax2, dynamic_map(), ABSMAX_BLOCK) + q.offset
    return q.absmax


def dequantize_nf4(q: Nf4) -> Tensor:
    """The weight as its code gives it, in the dtype it had."""
    index = unpack(q.packed, q.shape.numel())
    return from_codes(index, scales(q), NF4, q.block).view(q.shape).to(q.dtype)


def move_nf4(q: Nf4, change: Tensor, draw: Tensor, *, clip: bool = False) -> Nf4:
    """The weight after a change of its shape, on the scales it has; see `grid`."""
    by = in_blocks(change.float(), scales(q), q.block)
    index = moved(unpack(q.packed, q.shape.numel()), by, draw.reshape(-1), NF4.to(by.device), clip=clip)
    return replace(q, packed=pack(index))


def round_trip(w: Tensor, bits: int = 4, block: int = BLOCK) -> Tensor:
    """`w` quantised to normal floats of 2, 4 or 8 bits and back, in float32."""
    code = NF4 if bits == 4 else normal_float(bits)
    return from_codes(*to_codes(w, code, block), code, block).view(w.shape)
