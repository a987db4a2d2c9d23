"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models (arXiv 2106.10199).

    y = W x + b'        b' trained, at b in the beginning

Only bias vectors train: all of them, or chosen ones (the paper's half is the query's and the feed-forward's first).
Merging writes them back, exactly. Layers without a bias can get one that starts at zero (T-Few's variant for T5); a
checkpoint of the base has no place for those, so they stay beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from deltatune.config import TargetedConfig, register
from deltatune.core.copies import ValueDelta
from deltatune.core.edits import Edit
from deltatune.core.sites import Site, base_modules, bias_sites, excluded, select, vector_sites
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods.lora_bias import added_bias


@register
@dataclass
class BitFitConfig(TargetedConfig):
    """Trains bias vectors.

    Args:
        target_modules: the modules whose biases train (name endings or a regular expression); all if None.
        added_modules: layers without a bias that get one (name endings or a regular expression). With these alone,
            no other bias trains.

    Raises:
        ConfigError: a layer of `added_modules` has a bias already, or nothing can be added to it.
    """

    added_modules: list[str] | set[str] | str | None = None

    method: ClassVar[str] = "BITFIT"
    summary: ClassVar[str] = "bias vectors only"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def sites(self, model: nn.Module) -> list[Site]:
        added = self._added(model)
        if added and not self.target_modules:
            return added
        return vector_sites(model, self, bias_sites(model), "bias") + added

    def _added(self, model: nn.Module) -> list[Site]:
        if not self.added_modules:
            return []
        paths = [p for p, _ in base_modules(model) if p]
        drop = excluded(self, paths)
        found = select(self.added_modules, paths, "added_modules")
        return [Site(p, None, pattern=pattern) for pattern, hits in found.items() for p in hits if p not in drop]

    def written(self, model: nn.Module) -> dict[str, Any]:
        return {}  # no target means all biases, here as there

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        return ValueDelta(ref)

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        if module._parameters.get("bias") is not None:
            raise ConfigError(f"added_modules: {site.name!r} has a bias already; name it in target_modules")
        return added_bias(module, site, 1.0, "added_modules", name="tuned_bias", leaf=None, file_name="bias")
