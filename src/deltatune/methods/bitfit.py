"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (arXiv 2106.10199).

Only bias vectors train; everything else is the base's. Merging writes them back, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.config import TargetedConfig, register
from deltatune.core.copies import ValueDelta
from deltatune.core.edits import Edit
from deltatune.core.sites import Site, base_modules, bias_sites, excluded, in_layers, saved_modules, select
from deltatune.core.weights import WeightRef
from deltatune.errors import TargetError


@register
@dataclass
class BitFitConfig(TargetedConfig):
    """Trains bias vectors.

    Args:
        target_modules: the modules whose biases train (name endings or a regular expression); all if None.
    """

    method: ClassVar[str] = "BITFIT"
    summary: ClassVar[str] = "bias vectors only"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def sites(self, model: nn.Module) -> list[Site]:
        paths = [p for p, _ in base_modules(model)]
        biased = {s.name for s in bias_sites(model)}
        if not biased:
            raise TargetError(f"this {type(model).__name__} has no bias vectors, so BitFit has nothing to train")
        found = {"bias": [p for p in paths if p in biased]}
        if self.target_modules:
            found = select(self.target_modules, paths, "target_modules", nearby=sorted(biased))
            for pattern, hits in found.items():
                if not biased.intersection(hits):
                    raise TargetError(f"target_modules {pattern!r} matches modules, but none has a bias")
        found = in_layers(self, found)
        drop = excluded(self, paths)
        copied = saved_modules(model, self)
        chosen = {p for hits in found.values() for p in hits if p not in drop}
        return [s for s in bias_sites(model, chosen) if not any(f"{s.name}.".startswith(f"{c}.") for c in copied)]

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        return ValueDelta(ref)
