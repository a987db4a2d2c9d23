"""Moving numbers on the grid they lie on: rounding that lets changes smaller than a step through.

A weight in few bits is `scale · level[code]`. It lies on its grid exactly, and the nearest code of `W + ΔW` is W's own
for every change below half a step. Dithered rounding takes one of the two codes around `W + ΔW` instead, the upper one
if the way gone towards it is longer than the number's own draw u in (0, 1):

    level[k] <= v < level[k + 1]        code = k + [ (v - level[k]) / (level[k + 1] - level[k]) > u ]

With u uniform the mean over draws is v itself, and v = level[k] gives k whatever u is. Here v, a change and a step are
in units of the scale, which stays as it is: a number beyond the outermost levels is cut back to them. Where that loses
a good part of all changes, the weight needs scales of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: how far a number may be cut back at the ends of its grid, as a share of the grid's width, and which share of all
#: changes may lie further out: one number in a million must not decide for its weight
CUT, LOST = 1 / 16, 1 / 64


class BeyondGridError(ArithmeticError):
    """More than `LOST` of the changes would be cut off further than `CUT`, or are not finite in units of the scale."""


def _check(at: Tensor, change: Tensor, lowest: float | Tensor, highest: float | Tensor) -> None:
    cut = CUT * (highest - lowest)
    lost = (at - highest - cut).clamp(min=0).sum() + (lowest - cut - at).clamp(min=0).sum()
    if not bool(lost <= LOST * torch.linalg.vector_norm(change, 1)) or not bool(lost.isfinite()):
        raise BeyondGridError


def moved(code: Tensor, change: Tensor, draw: Tensor, levels: Tensor, *, clip: bool = False) -> Tensor:
    """The codes after a change, all flat and of one length.

    Most changes are too small for any gap between two levels, which the smallest of them tells; only the rest is
    looked up.

    Args:
        clip: cut back whatever lies beyond the grid.

    Raises:
        BeyondGridError: as it says.
    """
    ordered, order = levels.sort()  # FP4's codes are not in the order of their numbers
    gaps = ordered.diff()
    ways = change / gaps[gaps > 0].min() - draw  # FP4 has two codes of zero
    some = ((ways < -1) | (ways > 0)).nonzero().view(-1)
    at = levels[code[some].int()] + change[some]
    if not clip:
        _check(at, change, ordered[0], ordered[-1])
    low = (torch.bucketize(at, ordered, right=True) - 1).clamp_(0, len(levels) - 2)
    up = at - ordered[low] > draw[some] * (ordered[low + 1] - ordered[low])
    new = code.clone()
    new[some] = order[low + up].to(code.dtype)
    return new


def stepped(code: Tensor, change: Tensor, draw: Tensor, lowest: int, highest: int, *, clip: bool = False) -> Tensor:
    """`moved` for levels that are whole numbers, of any shape, in float32."""
    at = code.float() + change
    if not clip:
        _check(at, change, lowest, highest)
    return (at + (1 - draw)).floor_().clamp_(lowest, highest)


def in_units(change: Tensor, scale: Tensor) -> Tensor:
    """`change / scale`, broadcast; no change is none in units of any scale, 0 too."""
    inside = change * (1 / scale)
    if bool((scale == 0).any()):
        return torch.where(change == 0, 0.0, inside)
    return inside


def in_blocks(change: Tensor, scale: Tensor, block: int) -> Tensor:
    """The flat `change / scale` with one scale for each `block` numbers, `(n,)`; the last block may be short."""
    flat = change.reshape(-1)
    n, short = flat.numel(), -flat.numel() % block
    whole = torch.nn.functional.pad(flat, (0, short)) if short else flat
    return in_units(whole.view(-1, block), scale.view(-1, 1)).view(-1)[:n]
