"""Full fine-tuning of named modules: each keeps a trained copy beside the frozen original, or trains in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from deltatune.config import TargetedConfig, register
from deltatune.core.copies import InPlace, ModuleCopy
from deltatune.core.edits import Edit
from deltatune.core.sites import Site, base_modules, excluded, in_layers, saved_modules, select
from deltatune.errors import ConfigError


@register
@dataclass
class FullConfig(TargetedConfig):
    """Trains every tensor of the modules named in `target_modules` (any module, whole blocks too).

    Args:
        target_modules: name endings or a regular expression; must be given, unless `in_place`.
        in_place: train the modules themselves and no copies, which takes no memory beside the base, but leaves no plain
            base to go back to; None as `target_modules` is the whole model then. What is saved is the same: the trained
            modules, which load as copies.
    """

    in_place: bool = False

    method: ClassVar[str] = "FULL"
    summary: ClassVar[str] = "whole copies of named modules train; the base stays as it was"
    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_place:
            if set(self.modules_to_save or ()) - self.optional_modules_to_save:
                raise ConfigError("in_place=True makes no copies, so modules_to_save does not go with it; drop one")
            self.modules_to_save = None
            return
        if not self.target_modules:
            raise ConfigError("FullConfig needs target_modules: the modules to train whole")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("in_place")  # files hold the modules, wherever they trained
        return values

    def sites(self, model: nn.Module) -> list[Site]:
        if self.in_place:
            return self._places(model)
        paths = [p for p, _ in base_modules(model) if p]
        found = in_layers(self, select(self.target_modules or [], paths, "target_modules"))
        drop = excluded(self, paths)
        hits = {path: pattern for pattern, ps in found.items() for path in ps if path not in drop}
        heads = saved_modules(model, self)  # a task's head is copied already
        hits = {p: pattern for p, pattern in hits.items() if not any(f"{p}.".startswith(f"{h}.") for h in heads)}
        outer = [p for p in hits if not any(p.startswith(f"{q}.") for q in hits)]
        return [Site(path, None, pattern=hits[path]) for path in outer]

    def _places(self, model: nn.Module) -> list[Site]:
        """Every module with parameters of its own that the targets name or contain."""
        holders = [p for p, m in base_modules(model) if any(v is not None for v in m._parameters.values())]
        if self.target_modules is None:
            drop = excluded(self, holders)
            kept = in_layers(self, {"": [p for p in holders if p not in drop]})[""]
            others = {p.rpartition(".")[2] for p, _ in base_modules(model) if p not in kept}
            leaf = {p: p.rpartition(".")[2] for p in kept}
            return [Site(p, None, pattern=p if leaf[p] in others or leaf[p].isdigit() else leaf[p]) for p in kept]
        patterns = {site.path: site.pattern for site in FullConfig.sites(_copying(self), model)}
        return [
            Site(p, None, pattern=patterns[outer])
            for p in holders
            for outer in patterns
            if p == outer or p.startswith(f"{outer}.")
        ]

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        if self.in_place:
            return InPlace(module)
        return ModuleCopy(module)


def _copying(config: FullConfig) -> FullConfig:
    """The same configuration without `in_place`."""
    return replace(config, in_place=False)
