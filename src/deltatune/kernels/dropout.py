"""Dropout that is drawn again from a seed, so that backward needs no mask.

Entries are dropped independently with probability p, as by `F.dropout`. Where few are dropped on a CPU, what is drawn
is the distance to the next dropped one, which is geometric: floor(log u / log(1 - p)) entries are kept before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: above this probability a mask is cheaper than distances
FEW = 0.2


def new_seed() -> int:
    """From torch's own generator, so that a seeded or checkpointed run draws the same."""
    return int(torch.randint(2**62, (), device="cpu"))


def dropper(shape: torch.Size, device: torch.device, p: float, seed: int) -> Callable[[Tensor], Tensor]:
    """A function that sets the entries of one drawing to zero, in place, in tensors of `shape`; it does not rescale."""
    generator = torch.Generator(device).manual_seed(seed)
    if device.type == "cpu" and p <= FEW:
        index = _dropped(shape.numel(), p, generator)
        return lambda t: t.view(-1).index_fill_(0, index, 0.0).view(shape)
    gone = torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(p, generator=generator)
    return lambda t: t.masked_fill_(gone, 0.0)


def _dropped(n: int, p: float, generator: torch.Generator) -> Tensor:
    """The sorted positions among `n` that are dropped."""
    parts: list[Tensor] = []
    last = -1
    while last < n:
        left = n - 1 - last
        size = int(left * p + 6 * math.sqrt(left * p) + 8)  # rarely too few; then once more
        gaps = (
            torch.rand(size, generator=generator, device=generator.device)
            .neg_()
            .add_(1)
            .log_()
            .mul_(1 / math.log1p(-p))
        )
        positions = gaps.to(torch.int64).add_(1).cumsum_(0).add_(last)
        parts.append(positions)
        last = int(positions[-1])
    index = parts[0] if len(parts) == 1 else torch.cat(parts)
    return index[: int(torch.searchsorted(index, n))]
