"""LN tuning: Tuning LayerNorm in Attention (arXiv 2312.11420); of every norm in BERT, arXiv 2211.08682.

    y = γ' ∘ norm(x) + β'        γ', β' trained, at γ and β in the beginning

Only the gains and biases of normalisation layers train (an RMSNorm has a gain alone). Merging writes them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deltatune.config import StructuredConfig, register
from deltatune.core.edits import Delta, Edit
from deltatune.core.sites import Site, norm_sites, vector_sites
from deltatune.core.weights import WeightRef


class NormValue(Delta):
    """A gain or bias of the adapter's own, under the names that peft's files have."""

    def __init__(self, ref: WeightRef) -> None:
        super().__init__(ref)
        self.value = self.tensor("ln_tuning_layers", ref.store.load(ref.param).clone(), leaf=ref.leaf)

    def merged(self, w: Tensor) -> Tensor:
        return self.ref.op.matrix(self.value.weight)


@register
@dataclass
class LNTuningConfig(StructuredConfig):
    """LN tuning's configuration, with peft's field names.

    Args:
        target_modules: the normalisation layers to train (name endings or a regular expression); all if None.
    """

    method: ClassVar[str] = "LN_TUNING"
    summary: ClassVar[str] = "gains and biases of normalisation layers only"
    ours: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern", "roles")
    names_targets_too: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2312.11420"

    def sites(self, model: nn.Module) -> list[Site]:
        return vector_sites(model, self, norm_sites(model, self.named(model).is_norm), "normalisation gain")

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        return NormValue(ref)
