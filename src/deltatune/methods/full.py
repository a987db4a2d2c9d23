"""Full fine-tuning of named modules: each keeps a trained copy beside the frozen original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltatune.config import TargetedConfig, register
from deltatune.core.copies import ModuleCopy
from deltatune.core.edits import Edit
from deltatune.core.sites import Site, base_modules, excluded, in_layers, select
from deltatune.errors import ConfigError


@register
@dataclass
class FullConfig(TargetedConfig):
    """Trains every tensor of the modules named in `target_modules` (any module, whole blocks too).

    Args:
        target_modules: name endings or a regular expression; must be given.
    """

    method: ClassVar[str] = "FULL"
    summary: ClassVar[str] = "whole copies of named modules train; the base stays as it was"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise ConfigError("FullConfig needs target_modules: the modules to train whole")

    def sites(self, model: nn.Module) -> list[Site]:
        paths = [p for p, _ in base_modules(model) if p]
        found = in_layers(self, select(self.target_modules or [], paths, "target_modules"))
        drop = excluded(self, paths)
        hits = {path: pattern for pattern, ps in found.items() for path in ps if path not in drop}
        outer = [p for p in hits if not any(p.startswith(f"{q}.") for q in hits)]
        return [Site(path, None, pattern=hits[path]) for path in outer]

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        return ModuleCopy(module)
