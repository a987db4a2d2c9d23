"""Moving numbers on the grid they lie on: rounding that lets changes smaller than a step through.

A weight in few bits is `scale · level[code]`. It lies on its grid exactly, and the nearest code of `W + ΔW` is W's own
for every change below half a step. Dithered rounding takes one of the two codes around `W + ΔW` instead, the upper one
if the way gone towards it is longer than the number's own draw u in (0, 1):

    level[k] <= v < level[k + 1]        code = k + [ (v - level[k]) / (level[k + 1] - level[k]) > u ]

With u uniform the mean over draws is v itself, and v = level[k] gives k whatever u is. Here v, a change and a step are
in units of the scale, which stays as it is: a change that leads well beyond the outermost levels has no place here.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: how far a number may be cut back at the ends of its grid, as a share of the grid's width
CUT = 1 / 16


class BeyondGridError(ArithmeticError):
    """A number would be cut back by more than `CUT`, so that the weight needs scales of its own."""


def _check(at: Tensor, lowest: float | Tensor, highest: float | Tensor) -> None:
    cut = CUT * (highest - lowest)
    if bool(((at > highest + cut) | (at < lowest - cut)).any()):
        raise BeyondGridError


def moved(code: Tensor, change: Tensor, draw: Tensor, levels: Tensor) -> Tensor:
    """The codes after a change, all flat and of one length.

    Most changes are too small for any gap between two levels, which the smallest of them tells; only the rest is
    looked up.

    Raises:
        BeyondGridError: as it says.
    """
    ordered, order = levels.sort()  # FP4's codes are not in the order of their numbers
    ways = change / ordered.diff().min() - draw
    some = ((ways < -1) | (ways > 0)).nonzero().view(-1)
    at = levels[code[some].int()] + change[some]
    _check(at, ordered[0], ordered[-1])
    low = (torch.bucketize(at, ordered, right=True) - 1).clamp_(0, len(levels) - 2)
    up = at - ordered[low] > draw[some] * (ordered[low + 1] - ordered[low])
    new = code.clone()
    new[some] = order[low + up].to(code.dtype)
    return new


def stepped(code: Tensor, change: Tensor, draw: Tensor, lowest: int, highest: int) -> Tensor:
    """`moved` for levels that are whole numbers, of any shape, in float32."""
    at = code.float() + change
    _check(at, lowest, highest)
    return (at + (1 - draw)).floor_().clamp_(lowest, highest)


def in_units(change: Tensor, scale: Tensor) -> Tensor:
    """`change / scale`, broadcast; none where the scale is 0, which nothing can leave."""
    return change * torch.where(scale == 0, 0.0, 1 / scale)


def in_blocks(change: Tensor, scale: Tensor, block: int) -> Tensor:
    """The flat `change / scale` with one scale for each `block` numbers, `(n,)`; the last block may be short."""
    flat = change.reshape(-1)
    n, short = flat.numel(), -flat.numel() % block
    whole = torch.nn.functional.pad(flat, (0, short)) if short else flat
    return in_units(whole.view(-1, block), scale.view(-1, 1)).view(-1)[:n]
