"""Principal components of rows that come in batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: up to this size the smaller Gram matrix is decomposed exactly, in float64
EXACT = 2048


class RunningPca:
    """The first `k` principal components of rows that come in batches (Ross et al. 2008).

    More than `k` are carried along, since what a batch cuts off cannot come back with the next.

    Attributes:
        n: rows seen. mean: `(in,)`. axes: `(<= 2 k + 8, in)`, components times their singular values.
        total: the rows' squared distance from their mean.
    """

    def __init__(self, k: int) -> None:
        self.k, self.n, self.total = k, 0, 0.0
        self.mean: Tensor = torch.empty(0)
        self.axes: Tensor = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Takes rows `x: (m, in)`."""
        mean = x.mean(0)
        centred = x - mean
        self._take(len(x), mean, centred, float(centred.square().sum()))

    def merge(self, other: RunningPca) -> None:
        """Takes the rows that another one has seen."""
        self._take(other.n, other.mean, other.axes, other.total)

    def _take(self, m: int, mean: Tensor, rows: Tensor, total: float) -> None:
        if m == 0:
            return
        if self.n:
            between = (self.n * m / (self.n + m)) ** 0.5 * (self.mean - mean)
            rows = torch.cat([self.axes, rows, between[None]])
            total += self.total + float(between.square().sum())
            mean = (self.n * self.mean + m * mean) / (self.n + m)
        self.n, self.mean, self.total = self.n + m, mean, total
        self.axes = top_axes(rows, 2 * self.k + 8)

    @property
    def components(self) -> Tensor:
        """Unit rows, `(<= k, in)`."""
        return F.normalize(self.axes[: self.k], dim=-1, eps=1e-30)

    @property
    def singular_values(self) -> Tensor:
        values: Tensor = self.axes[: self.k].norm(dim=-1)
        return values

    def explained(self) -> Tensor:
        """Each component's share of the variance."""
        return self.singular_values.square() / max(self.total, 1e-30)


def top_axes(rows: Tensor, k: int) -> Tensor:
    """The first `k` right singular vectors of `rows: (m, in)` times their singular values."""
    m, width = rows.shape
    if min(m, width) > EXACT or rows.device.type == "mps":
        _, s, v = torch.svd_lowrank(rows, q=min(2 * k + 16, m, width), niter=4)
        fast: Tensor = (v * s).mT[:k]
        return fast
    wide = rows.double()
    gram = wide @ wide.mT if m < width else wide.mT @ wide
    values, vectors = torch.linalg.eigh(gram)
    top = vectors.flip(-1)[:, :k].mT
    # uᵀ X = s vᵀ for the left vectors, s vᵀ itself for the right ones
    axes: Tensor = top @ wide if m < width else top * values.flip(-1)[:k, None].clamp_min(0).sqrt()
    return axes.to(rows.dtype)
