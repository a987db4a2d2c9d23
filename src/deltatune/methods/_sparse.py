"""What methods share whose trained entries are chosen by looking at the model first, over all its weights together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig
from deltatune.core.edits import Edit
from deltatune.core.sites import (
    ALL_LINEAR,
    Site,
    bias_sites,
    check_patterns,
    norm_sites,
    output_layers,
    pattern_value,
    vector_sites,
)
from deltatune.core.sparse import SparseDelta, largest
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError


@dataclass
class ChosenConfig(TargetedConfig):
    """Chosen entries of chosen weights.

    Args:
        target_modules: the modules whose weights compete; None: every linear layer but the model's head.
        vectors: biases and gains of norms compete too.
        kept: name of a weight (or a regular expression) -> how many of its entries train. The choice fills it in, and
            files have it; weights with none get no tensors.
    """

    vectors: bool = True
    kept: dict[str, int] = field(default_factory=dict)
    #: what the choice left: name of a weight -> (flat positions, values or None)
    prepared: dict[str, tuple[Tensor, Tensor | None]] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = self.target_modules or ALL_LINEAR
        for name, n in self.kept.items():
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise ConfigError(f"kept[{name!r}] must be a number of entries, not {n!r}")

    @property
    def settled(self) -> bool:
        """The entries are chosen."""
        return bool(self.kept)

    def candidates(self, model: nn.Module) -> list[Site]:
        """Every weight that competes."""
        weights = super().sites(model)
        if not self.vectors:
            return weights
        vectors = {(s.path, s.parameter): s for s in [*bias_sites(model), *norm_sites(model)]}
        if self.target_modules == ALL_LINEAR:
            heads = output_layers(model)
            some = [s for s in vectors.values() if s.name not in heads]
        else:
            names = {s.name for s in weights}
            some = [s for s in vectors.values() if s.name in names]
        return weights + (vector_sites(model, self, some, "vector", chosen=True) if some else [])

    def sites(self, model: nn.Module) -> list[Site]:
        every = self.candidates(model)
        if not self.settled:
            return every
        check_patterns(self.kept, [name_of(s) for s in every], "kept")
        return [s for s in every if self.count(s)]

    def written(self, model: nn.Module) -> dict[str, Any]:
        return {}  # "all-linear" says that all vectors compete too

    def count(self, site: Site) -> int:
        """How many entries of a weight train."""
        name = name_of(site)
        n: int = self.kept[name] if name in self.kept else pattern_value(self.kept, name, 0)
        return n

    def choose(self, scores: Mapping[str, Tensor], keep: int, values: Mapping[str, Tensor] | None = None) -> None:
        """Settles on the entries with the largest scores: name of a weight -> the scores of its entries."""
        found = largest(scores, keep)
        self.prepared = {
            name: (index, None if values is None else values[name].flatten()[index]) for name, index in found.items()
        }
        self.kept = {name: len(index) for name, index in found.items()}

    def sparse(self, ref: WeightRef, site: Site) -> SparseDelta:
        """The delta of one weight.

        Raises:
            ConfigError: it has fewer entries.
        """
        n = self.count(site)
        if n > ref.shape.numel():
            raise ConfigError(f"kept asks for {n} entries of {name_of(site)!r}, which has {ref.shape.numel()}")
        start = (self.prepared or {}).get(name_of(site))
        if start is None:  # a file fills the positions in
            return SparseDelta(ref, torch.arange(n, device=ref.device))
        return SparseDelta(ref, start[0].to(ref.device), None if start[1] is None else start[1].to(ref.device))

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        return self.sparse(ref, site)


def name_of(site: Site) -> str:
    """Tells a weight from the bias beside it."""
    tail = "" if site.parameter in (None, "weight") or site.home else f".{site.parameter}"
    return f"{site.key}.bias" if site.home and str(site.parameter).endswith("bias") else f"{site.key}{tail}"


def share_of(total: int, ratio: float, what: str) -> int:
    """`int(total · ratio)`, at least one.

    Raises:
        ConfigError: the ratio is out of range.
    """
    if not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ConfigError(f"{what} is a share in (0, 1], not {ratio!r}")
    return max(1, int(total * ratio))
