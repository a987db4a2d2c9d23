"""What adapters change, as numbers: ΔW per weight, kept factored where it is low-rank, and its best rank-r parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deltatune.core.edits import Delta, LowRank

#: singular values below this share of the largest are rounding
ROUNDING = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Change:
    """ΔW of one weight: `b @ a`, or `dense`.

    Attributes:
        a: (*batch, r, in). b: (*batch, out, r). dense: (*batch, out, in).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    dense: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.a is None or self.b is None else (self.a, self.b)

    @property
    def rank(self) -> int | None:
        """The number of columns of `b`; None for dense changes."""
        return None if self.a is None else self.a.shape[-2]

    def matrix(self) -> Tensor:
        """`(*batch, out, in)`."""
        if self.dense is not None:
            return self.dense
        assert self.a is not None
        assert self.b is not None
        return self.b @ self.a

    def times(self, weight: float) -> Change:
        """ΔW multiplied by `weight`."""
        if self.dense is not None:
            return Change(dense=weight * self.dense)
        assert self.b is not None
        return Change(self.a, weight * self.b)


def total(changes: Sequence[Change]) -> Change:
    """The sum; factored if all are."""
    pairs = [c.factors for c in changes if c.factors is not None]
    if len(pairs) == len(changes):
        return Change(torch.cat([a for a, _ in pairs], -2), torch.cat([b for _, b in pairs], -1))
    dense = changes[0].matrix().clone()
    for change in changes[1:]:
        dense += change.matrix().to(dense.dtype)
    return Change(dense=dense)


@torch.no_grad()
def change_of(deltas: Sequence[Delta]) -> Change:
    """What one adapter's deltas of one parameter change together, over all its rows."""
    return total([_change(delta) for delta in deltas])


def _change(delta: Delta) -> Change:
    ref = delta.ref
    if isinstance(delta, LowRank):
        a, b = (precise(t) for t in delta.factors())
        zeros = b.new_zeros(*b.shape[:-2], ref.full_shape[-2], b.shape[-1])
        return Change(a, ref.put(zeros, b))
    full = precise(ref.load_full())
    w = ref.take(full)
    return Change(dense=ref.put(torch.zeros_like(full), delta.merged(w) - w))


def precise(t: Tensor) -> Tensor:
    """float64 where the device has it: products of factors are cheap, and conversions shall lose nothing."""
    return t.detach().to(torch.float32 if t.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class Pair:
    """The best approximation of a change by factors.

    Attributes:
        a: (*batch, r, in), its rows orthonormal unless clamped. b: (*batch, out, r).
        norm: ‖ΔW‖ (Frobenius). error: ‖ΔW - b a‖.
    """

    a: Tensor
    b: Tensor
    norm: float
    error: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def padded(self, rank: int) -> Pair:
        """The same with zeros up to a rank."""
        more = rank - self.rank
        return self if not more else replace(self, a=F.pad(self.a, (0, 0, 0, more)), b=F.pad(self.b, (0, more)))


@torch.no_grad()
def truncate(
    change: Change, rank: int | float | None = None, *, clamp: float | None = None, driver: str | None = None
) -> Pair:
    """The best factors of a change, by its singular values.

    Args:
        rank: that many (or as many as there are); a float in (0, 1]: the fewest that hold this share of ‖ΔW‖²;
            None: all that are not rounding.
        clamp: limits the factors' entries to this quantile, in (0.5, 1], of them and their negatives (the signs of
            singular vectors are arbitrary).
        driver: of cuSOLVER, see `torch.linalg.svd`; for CUDA only.
    """
    u, s, vh = _svd(change, driver, exact=rank is None)
    r = _rank(s, rank)
    a, b = vh[..., :r, :], u[..., :r] * s[..., None, :r]
    error = s[..., r:].square().sum().sqrt()
    if clamp is not None:
        high = _quantile(torch.cat([b.flatten(), a.flatten()]).abs(), 2 * clamp - 1)
        a, b = a.clamp(-high, high), b.clamp(-high, high)
        error = (change.matrix() - b @ a).norm()
    return Pair(a, b, float(s.square().sum().sqrt()), float(error))


def _quantile(values: Tensor, q: float) -> Tensor:
    """As `torch.quantile`, to the next value; that function has a limit of 2²⁴ values."""
    return values.kthvalue(round(q * (values.numel() - 1)) + 1).values


def _svd(change: Change, driver: str | None, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`u: (*batch, out, k)`, `s: (*batch, k)` falling, `vh: (*batch, k, in)`."""
    pair = change.factors
    if pair is not None and pair[0].shape[-2] == 0:  # a rank that was pruned away
        pair = F.pad(pair[0], (0, 0, 0, 1)), F.pad(pair[1], (0, 1))
    if pair is None or pair[0].shape[-2] >= min(pair[0].shape[-1], pair[1].shape[-2]):
        matrix = change.matrix()
        return _dense_svd(matrix if exact else matrix.float(), driver)
    qb, rb = torch.linalg.qr(pair[1])
    qa, ra = torch.linalg.qr(pair[0].mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False, driver=driver)
    return qb @ u, s, vh @ qa.mT


def _dense_svd(matrix: Tensor, driver: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of a matrix or a batch of them; rows and columns of zeros (all but a few tokens, say) cost nothing."""
    if matrix.ndim > 2:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
        return u, s, vh
    rows, columns = (matrix != 0).any(1).nonzero().flatten(), (matrix != 0).any(0).nonzero().flatten()
    if not len(rows):
        rows = columns = torch.zeros(1, dtype=torch.long, device=matrix.device)
    u, s, vh = torch.linalg.svd(matrix[rows][:, columns], full_matrices=False, driver=driver)
    full_u, full_vh = u.new_zeros(matrix.shape[0], u.shape[1]), vh.new_zeros(vh.shape[0], matrix.shape[1])
    return full_u.index_copy(0, rows, u), s, full_vh.index_copy(1, columns, vh)


def _rank(s: Tensor, rank: int | float | None) -> int:
    """How many singular values to keep, the same for a whole batch; at least one."""
    if isinstance(rank, int):
        return min(rank, s.shape[-1])
    if rank is None:
        keep = s > s[..., :1] * ROUNDING
        return max(1, int(keep.sum(-1).max()))
    energy = s.square().cumsum(-1)
    missing = energy < rank * energy[..., -1:] * (1 - 1e-12)
    return int(missing.sum(-1).max()) + 1
