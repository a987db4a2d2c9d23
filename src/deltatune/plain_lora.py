"""Any adapters with a ΔW, written as one plain LoRA: the common ground of combining and converting.

For every tensor that one of the adapters changes, a rule makes one change out of theirs; matrices are then written
as factors, biases and whole modules as values. The scale is 1 (alpha = r) everywhere.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltatune.config import TargetedConfig
from deltatune.core.adapters import AdapterSet
from deltatune.core.changes import Change, Pair, precise, truncate
from deltatune.core.copies import ModuleCopy, ValueDelta
from deltatune.core.merge import evaluating
from deltatune.core.ops import TransposedOp, VectorOp
from deltatune.core.sites import base_modules, bias_sites, is_multihead, is_suffix, shortest_names
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraConfig, LoraDelta
from deltatune.methods.lora_bias import AddedBias, BiasDelta
from deltatune.parts import Parts, join, ordered, place_of, weight_of
from deltatune.progress import track

#: the changes of the adapters at one tensor, None for those that leave it alone -> the new change
Rule = Callable[[Sequence[Change | None]], Change]
#: as `Rule` -> how many ranks to keep, see `truncate`
RankRule = Callable[[Sequence[Change | None]], int | float | None]


@dataclass(frozen=True)
class SiteReport:
    """One matrix of the new adapter: its rank, ‖ΔW‖ as it should be, and ‖what the factors miss‖ (Frobenius)."""

    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """The error as a share of ‖ΔW‖."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class LoraReport:
    """What writing adapters as one LoRA cost.

    Attributes:
        sites: name of the weight -> its report.
    """

    sites: dict[str, SiteReport] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """‖what is missed‖ / ‖ΔW‖ over all weights together."""
        norm = math.sqrt(sum(s.norm**2 for s in self.sites.values()))
        return math.sqrt(sum(s.error**2 for s in self.sites.values())) / norm if norm else 0.0

    def __str__(self) -> str:
        ranks = [s.rank for s in self.sites.values()] or [0]
        worst = max(self.sites, key=lambda name: self.sites[name].relative, default="")
        text = f"{len(self.sites)} weights, ranks {min(ranks)} to {max(ranks)}, relative error {self.error:.2e}"
        return f"{text} (largest {self.sites[worst].relative:.2e} at {worst})" if self.error else text


# ---------------------------------------------------------------------- one LoRA out of them
class Builder:
    """Makes the plain LoRA.

    Args:
        adapters: the model's. names: the adapters to write as one.
        rule: one change out of theirs. ranks: how many ranks to keep.
        clamp, driver: see `truncate`.
        progress: show a bar over the weights.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        names: Sequence[str],
        rule: Rule,
        ranks: RankRule,
        *,
        clamp: float | None = None,
        driver: str | None = None,
        progress: bool = False,
    ) -> None:
        adapters.check(*names)
        self.adapters, self.names, self.rule, self.ranks = adapters, names, rule, ranks
        self.clamp, self.driver, self.progress = clamp, driver, progress
        self.edits = [edit for name in names for edit in adapters.edits[name]]
        with self._as_trained():
            self.parts = [Parts(adapters, name) for name in names]
        self.refs = {place: ref for part in self.parts for place, ref in part.refs.items()}
        self.betas = ordered(part.betas for part in self.parts)
        self._sort_places()
        if not self.matrices:
            raise ConfigError(f"adapter {names[0]!r} changes no matrix, so there is nothing to write as a LoRA")

    def _sort_places(self) -> None:
        """Which tensors become factors, which biases, and which modules are copied."""
        vectors = [p for p, ref in self.refs.items() if isinstance(ref.op, VectorOp)]
        biases = {join(s.path, s.parameter or "") for s in bias_sites(self.adapters.root)}
        # scales of norms and the like have no option of LoRA: their modules are copied
        odd = [p.rpartition(".")[0] for p in vectors if p not in biases]
        self.copied = ordered([*(part.copied for part in self.parts), odd])
        outside = [p for p in self.refs if not any(p.startswith(f"{c}.") for c in self.copied)]
        self.biases = [p for p in outside if p in vectors]
        self.matrices = [p for p in outside if p not in vectors]

    @contextlib.contextmanager
    def _as_trained(self) -> Iterator[None]:
        """The body sees the base's own numbers, and the adapters as they are outside training."""
        with evaluating(self.edits), self.adapters.merged.base_in_place(), torch.no_grad():
            yield

    def add(self, name: str) -> LoraReport:
        """Attaches the LoRA under `name`, frozen and not active."""
        with self._as_trained():
            pairs = {place: self._pair(place) for place in track(self.matrices, "weights", show=self.progress)}
            ranks: dict[str, int] = {}
            for place, pair in pairs.items():  # parameters of one module have one entry of rank_pattern
                ranks[self._site(place)] = max(ranks.get(self._site(place), 1), pair.rank)
            pairs = {place: pair.padded(ranks[self._site(place)]) for place, pair in pairs.items()}
            config = self._config(ranks)
            self.adapters.add(config, name)
            # after adding: here the model is as deep, and its context as long, already
            config.layer_replication, config.context_length = (
                self._given("layer_replication"),
                self._given("context_length"),
            )
            self._fill(name, pairs)
        return LoraReport({p: SiteReport(pair.rank, pair.norm, pair.error) for p, pair in pairs.items()})

    def _pair(self, place: str) -> Pair:
        changes = [part.change(place) for part in self.parts]
        return truncate(self.rule(changes), self.ranks(changes), clamp=self.clamp, driver=self.driver)

    # ------------------------------------------------------------------ the configuration
    def _config(self, ranks: dict[str, int]) -> LoraConfig:
        """`ranks`: name of a site -> its rank."""
        first = self.adapters.configs[self.names[0]]
        assert isinstance(first, TargetedConfig)
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = {self._pattern(site, ranks): r for site, r in ranks.items() if r != usual}
        options: dict[str, Any] = {
            "task_type": first.task_type,
            "base_model_name_or_path": first.base_model_name_or_path,
            "revision": first.revision,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": dict(others),
            "fan_in_fan_out": any(type(self.refs[p].op) is TransposedOp for p in self.matrices),
            "modules_to_save": shortest_names(self.adapters.root, self.copied, str.endswith) or None,
            "lora_bias": bool(self.betas),
            "bias": self._bias_option(set(ranks)),
        }
        return LoraConfig(inference_mode=True, **options, **self._where())

    def _given(self, field: str) -> Any:
        """A field that changes the base, of the first adapter that sets it."""
        given = [getattr(self.adapters.configs[name], field, None) for name in self.names]
        return next((value for value in given if value), None)

    def _whole(self, place: str) -> bool:
        """Whether only `target_parameters` can name this weight."""
        ref = self.refs[place]
        return ref.name != "weight" and not is_multihead(ref.module)

    def _site(self, place: str) -> str:
        """The module by which a configuration knows a weight."""
        ref = self.refs[place]
        path = place.removesuffix(ref.name).removesuffix(".")
        return join(path, "out_proj") if ref.name == "out_proj.weight" else path

    def _where(self) -> dict[str, Any]:
        whole = [p for p in self.matrices if self._whole(p)]
        modules = [self._site(p) for p in self.matrices if not self._whole(p)]
        chosen = shortest_names(self.adapters.root, modules, lambda path, leaf: is_suffix(leaf, path))
        return {"target_modules": chosen, **({"target_parameters": whole} if whole else {})}

    @staticmethod
    def _pattern(site: str, sites: Iterable[str]) -> str:
        """A key of `rank_pattern` that is this site's alone (keys match ends of paths too)."""
        return f"^{site}" if any(s != site and is_suffix(site, s) for s in sites) else site

    def _bias_option(self, sites: set[str]) -> str:
        if not self.biases:
            return "none"
        own = {join(s.path, s.parameter or "") for s in bias_sites(self.adapters.root, sites)}
        return "lora_only" if set(self.biases) <= own else "all"

    # ------------------------------------------------------------------ the numbers
    def _fill(self, name: str, pairs: dict[str, Pair]) -> None:
        for edit in self.adapters.edits[name]:
            if isinstance(edit, LoraDelta):
                self._fill_pair(edit, pairs.get(place_of(edit)))
            elif isinstance(edit, (AddedBias, BiasDelta)):
                change = self._vector([part.beta(weight_of(edit)) for part in self.parts])
                if change is not None:
                    edit.beta.weight.copy_(change.flatten() / edit.scale)
            elif isinstance(edit, ValueDelta):
                self._add_to(edit.value.weight, place_of(edit))
            elif isinstance(edit, ModuleCopy):
                paths = {id(m): p for p, m in base_modules(self.adapters.root)}
                for owner, leaf, tensor in edit.replacements():
                    if tensor.is_floating_point():
                        self._add_to(tensor, join(paths[id(owner)], leaf))

    @staticmethod
    def _fill_pair(edit: LoraDelta, pair: Pair | None) -> None:
        if pair is None:  # the other half of an nn.MultiheadAttention that was adapted in part
            edit.lora_B.weight.zero_()
            return
        a, b = edit.ref.op.pack(edit.ref.module, pair.a, pair.b)
        edit.lora_A.weight.copy_(a)
        edit.lora_B.weight.copy_(b)

    def _add_to(self, tensor: Tensor, place: str) -> None:
        """Adds the new change of a parameter to a copy of the base's value."""
        change = self._vector([part.raw(place) for part in self.parts])
        if change is not None:
            tensor.copy_((precise(tensor) + change.view(tensor.shape)).to(tensor.dtype))

    def _vector(self, changes: Sequence[Change | None]) -> Tensor | None:
        return self.rule(changes).matrix() if any(c is not None for c in changes) else None
