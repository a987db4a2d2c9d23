"""Tied weights: an edit of an embedding that the head sharing its weight follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltatune.core.combine import substituted
from deltatune.core.copies import ModuleCopy
from deltatune.core.edits import Args, Delta, Edit, Kwargs, LowRank, ModuleEdit
from deltatune.core.weights import WeightRef


class TiedLowRank(LowRank):
    """What a low-rank edit of a table `(d, V)` means for the head `(V, d)` that shares it: ΔWᵀ = Aᵀ Bᵀ."""

    follows = True

    def __init__(self, ref: WeightRef, source: LowRank) -> None:
        super().__init__(ref)
        self.source = source

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.source.factors()
        return b.mT, a.mT


class TiedDelta(Delta):
    """The same for an edit that is not low-rank."""

    follows = True

    def __init__(self, ref: WeightRef, source: Delta) -> None:
        super().__init__(ref)
        self.source = source

    def merged(self, w: Tensor) -> Tensor:
        return self.source.merged(w.mT).mT


class TiedCopy(ModuleEdit):
    """A head that reads the trained copy of the embedding it is tied to."""

    follows = True

    def __init__(self, source: ModuleCopy) -> None:
        super().__init__()
        self.source = source

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        host: Any = self.host
        with substituted([(host, "weight", self.source.copy.get_parameter("weight"))]):
            return host._plain.forward(host, *args, **kwargs)

    def replacements(self) -> Any:
        yield self.host, "weight", self.source.copy.get_parameter("weight")


def tie_edits(model: nn.Module, head: str, edits: Sequence[Edit]) -> list[Edit]:
    """The edits of the head at `head` for those of the embedding it is tied to."""
    made: list[Edit] = []
    for edit in edits:
        ref = WeightRef(model.get_submodule(head), "weight")
        if isinstance(edit, ModuleCopy):
            made.append(TiedCopy(edit))
        elif isinstance(edit, LowRank):
            made.append(TiedLowRank(ref, edit))
        elif isinstance(edit, Delta):
            made.append(TiedDelta(ref, edit))
    return made
