"""Low-rank layers where nothing is trained and no weight changes (a generation): all that can be worked out before the
first token is, and a call is the layer's product and two small ones that add to it in place.

A function made here holds its weights; `deltatune.core.plan.Plan.steady` says how long that is right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Reader = Callable[[Tensor], Tensor]


def reader(w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Reader:
    """x ↦ W x + bias + B A x; `a: (r, in)`, `b: (out, r)` with the scale in it."""
    at, bt, out = a.mT, b.mT.contiguous(), w.shape[0]  # few rows read (r, out) faster

    def run(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return F.linear(rows, w, bias).addmm_(torch.mm(rows, at), bt).view(*x.shape[:-1], out)

    return run


def reader_of_rows(w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, index: Tensor | None) -> Reader:
    """As `reader`, for n adapters with equally many rows of the batch each.

    Args:
        a: `(n, r, in)`. b: `(n, out, r)`, scale included.
        index: the rows, one adapter's after the other's; None if that is their order already and all have one.
    """
    at, bt, n = a.mT, b.mT.contiguous(), len(a)

    def in_order(x: Tensor) -> Tensor:
        y = F.linear(x, w, bias)
        h = torch.bmm(x.reshape(n, -1, x.shape[-1]), at)
        y.view(n, -1, y.shape[-1]).baddbmm_(h, bt)
        return y

    def gathered(x: Tensor) -> Tensor:
        assert index is not None
        y, own = F.linear(x, w, bias), x.index_select(0, index)
        h = torch.bmm(own.reshape(n, -1, x.shape[-1]), at)
        return y.index_add_(0, index, torch.bmm(h, bt).view(*own.shape[:-1], -1))

    return in_order if index is None else gathered
