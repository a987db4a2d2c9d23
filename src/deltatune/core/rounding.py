"""Merge-aware training: the call computes with the weight that a merge into the base's own storage would leave.

    W' = load(save(merged(W)))        forward: y + (W' - W) x;  backward: as if save and load changed nothing

The straight-through estimator (arXiv 1308.3432) passes the gradient of W' to merged(W) as it is. What such training
ends with is the merged model itself: merging rounds to the numbers that the last forward pass used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from deltatune.core.edits import Delta, Edit


def rounded(value: Tensor, ref: Any) -> Tensor:
    """`value`, in the parameter's layout, as the base's storage would hold it; the gradient passes straight through."""
    with torch.no_grad():
        there: Tensor = ref.store.load(ref.store.save(ref.param, value.detach())).to(value.dtype)
    through: Tensor = value + (there - value).detach()
    return through


class Rounded(Delta):
    """The deltas of one quantised parameter as one, rounded together."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        super().__init__(deltas[0].ref)
        self.deltas = deltas
        self.host = deltas[0].host

    def apart(self, x: Tensor) -> Tensor:
        from deltatune.core.combine import fold

        ref = self.ref

        def change() -> Tensor:
            return ref.op.matrix(rounded(fold(self.deltas), ref)) - ref.load_full()

        plan: Any = cast(Any, self.host).plan
        delta = plan.remember((Rounded, *map(id, self.deltas)), change)
        return ref.op.apply(ref.module, x, delta.to(x.dtype if x.is_floating_point() else ref.dtype))


def join(edits: Sequence[Edit]) -> list[Edit]:
    """The edits with those of every quantised weight put together as one `Rounded`; others stay as they are."""
    groups: dict[tuple[int, str], list[Delta]] = {}
    rest: list[Edit] = []
    for edit in edits:
        if isinstance(edit, Delta) and edit.ref.bypass and not edit.ref.store.exact:
            groups.setdefault((id(edit.ref.owner), edit.ref.leaf), []).append(edit)
        else:
            rest.append(edit)
    return [*(Rounded(deltas) for deltas in groups.values()), *rest]
