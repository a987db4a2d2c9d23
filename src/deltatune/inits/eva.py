"""EVA: Explained Variance Adaptation (arXiv 2410.07170).

    X: the inputs of a weight, (tokens, in), centred;  X = U S Vᵀ:  A = V_{r_i}ᵀ,  B = 0

The ranks r_i share the budget Σ r among all weights: it goes to the components that explain most of their own
input's variance, S² / ‖X‖², at most rho · r for one weight. B = 0, so the model starts as the base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import ConfigError
from deltatune.inits import INITS, Request, Start, options_of, register_init
from deltatune.inits._pca import RunningPca
from deltatune.inits._watch import InputWatch, Spot, attention_mask_of, rows_of
from deltatune.inits.data import (
    COLLECTORS,
    PairCollector,
    gathered,
    prepared_start,
    world_size,
)


@dataclass
class EvaConfig:
    """Options of `init_lora_weights="eva"`.

    Args:
        rho: a weight gets at most rho · r components; 1 leaves all ranks as they are.
        tau: a weight's components have settled when each turns by less than this cosine from batch to batch.
        use_label_mask: leave out the positions whose label is `label_mask_value`.
        whiten: scale the rows of A so that A x has unit variance on the data.
        adjust_scaling_factors: keep each weight's scale s when its rank changes.

    Raises:
        ConfigError: rho < 1, or tau outside (0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ConfigError(f"eva_config: rho must be at least 1, not {self.rho!r}")
        if not 0 < self.tau <= 1:
            raise ConfigError(f"eva_config: tau must be in (0, 1], not {self.tau!r}")


@register_init("eva", option="eva_config", options=EvaConfig, needs_data=True)
def eva(request: Request) -> Start:
    """The components that the data gave; LoRA's own start, with a warning, before there are any (as peft does)."""
    if request.config.prepared is not None:
        return prepared_start(request)
    warnings.warn(
        "EVA starts from data that it has not seen: call initialize_lora_eva_weights(model, dataloader) before "
        "training, or prepare_init(model, config, batches) before get_peft_model",
        stacklevel=2,
    )
    return INITS["default"].make(request)


# ---------------------------------------------------------------------- peft's hooks into the inputs
def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor | None:
    """True where a token counts: it is no padding, and its label is not masked."""
    if not isinstance(model_input, Mapping):
        return None
    mask = attention_mask_of(model_input)
    labels = model_input.get("labels")
    options = options_of(peft_config, "eva_config", EvaConfig)
    if options.use_label_mask and isinstance(labels, Tensor) and labels.ndim == 2:
        kept = labels != options.label_mask_value
        mask = kept if mask is None else mask & kept
    return mask


LayerInputs = Callable[[Any, Any, str], Tensor]


@dataclass
class EvaHooks:
    """How inputs are read, where that is not the default."""

    model_inputs: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling
    layer_inputs: LayerInputs | dict[str, LayerInputs] | None = None
    gather: bool = True
    prefix: str = ""


# ---------------------------------------------------------------------- collecting
class EvaCollector(PairCollector):
    """Running components of every distinct input."""

    def __init__(self, model: nn.Module, config: Any, hooks: EvaHooks | None = None) -> None:
        super().__init__(model, config)
        spots = self.spots
        self.hooks = hooks or EvaHooks()
        self.options: EvaConfig = options_of(config, "eva_config", EvaConfig)
        if self.options.rho > 1 and len({s.site for s in spots}) < len(spots):
            raise ConfigError("EVA cannot give the weights of one module different ranks; set rho=1 in eva_config")
        self.inputs: Any = None
        self.most = {s.name: min(int(s.r * self.options.rho), *s.ref.shape[-2:]) for s in spots}
        self.pca = {s.name: RunningPca(max(self.most.values())) for s in spots}
        self.settled: set[str] = set()

    def watch(self) -> InputWatch:
        self.watching = InputWatch(self.spots, self._see, share=self.hooks.layer_inputs is None)
        return self.watching

    def expect(self, batch: Any) -> None:
        self.inputs = batch if self.hooks.model_inputs is None else self.hooks.model_inputs(batch, self.config)

    def _see(self, spot: Spot, args: tuple[Any, ...]) -> None:
        if spot.name in self.settled:
            return
        x = self._rows(spot, args)
        pca = self.pca[spot.name]
        before = pca.components if pca.n else None
        if len(x):
            pca.add(x)
            after = pca.components
            if before is not None and before.shape == after.shape and world_size() == 1:
                turned = (before * after).sum(-1).abs()
                if bool((turned >= self.options.tau).all()):
                    self.settled.add(spot.name)

    def _rows(self, spot: Spot, args: tuple[Any, ...]) -> Tensor:
        read = self.hooks.layer_inputs
        name = f"{self.hooks.prefix}{spot.name}"
        read = read.get(name) if isinstance(read, dict) else read
        if read is not None:
            return read(args, self.inputs, name).float()
        return rows_of(spot, args[0], self.inputs if isinstance(self.inputs, Tensor) else None)

    @property
    def satisfied(self) -> bool:
        leaders = set(self.watching.leader.values())
        return bool(leaders) and leaders <= self.settled

    def components(self) -> dict[str, Tensor]:
        """path -> A, `(r_i, in)`; r_i is 0 where the budget went elsewhere.

        Raises:
            ConfigError: a weight was never run, or saw fewer vectors than it needs components.
        """
        done = self._merged()
        shares, owners = [], []
        for spot in self.spots:
            share = done[spot.name].explained()[: self.most[spot.name]]
            shares.append(share)
            owners += [spot.name] * len(share)
        budget = sum(spot.r for spot in self.spots)
        chosen = torch.cat([s.cpu() for s in shares]).argsort(descending=True, stable=True)[:budget]
        ranks = {spot.name: 0 for spot in self.spots}
        for i in chosen.tolist():
            ranks[owners[i]] += 1
        for name, rank in ranks.items():
            values = done[name].singular_values
            if rank and float(values[rank - 1]) <= 1e-6 * float(values[0]):
                raise ConfigError(
                    f"EVA: the inputs of {name!r} vary in fewer than {rank} directions; give more varied data, or "
                    "lower r"
                )
        return {name: self._factor(done[name], rank) for name, rank in ranks.items()}

    def _merged(self) -> dict[str, RunningPca]:
        """Every spot's components, over all processes, those of its leader where it shares an input."""
        if self.hooks.gather and world_size() > 1:
            for pca, others in zip(self.pca.values(), _others(list(self.pca.values())), strict=True):
                for other in others:
                    pca.merge(other)
        leader = {s.name: self.watching.leader.get(s.name) for s in self.spots}
        for spot in self.spots:
            name = leader[spot.name]
            if name is None:
                raise ConfigError(f"EVA: no batch ran {spot.name!r}, so its inputs are unknown; leave it out")
            if self.pca[name].n <= self.most[spot.name]:
                raise ConfigError(
                    f"EVA needs more than rho · r = {self.most[spot.name]} input vectors at {spot.name!r} and saw "
                    f"{self.pca[name].n} (masked ones left out); give more or longer batches"
                )
        return {name: self.pca[str(lead)] for name, lead in leader.items()}

    def _factor(self, pca: RunningPca, rank: int) -> Tensor:
        a = pca.components[:rank]
        if self.options.whiten:
            a = a * ((pca.n - 1) ** 0.5 / pca.singular_values[:rank].clamp_min(1e-30)).unsqueeze(-1)
        return a.contiguous()

    def finish(self) -> dict[str, Start]:
        return use_components(self.config, self.spots, self.components())


COLLECTORS["eva"] = EvaCollector


def _others(mine: list[RunningPca]) -> Iterable[list[RunningPca]]:
    """For each of my statistics, those of the other processes, in an order that all processes share."""
    every = gathered([(p.n, p.mean.cpu(), p.axes.cpu(), p.total) for p in mine])
    for i, pca in enumerate(mine):
        device, k = pca.axes.device, pca.k
        pca.n, pca.total = 0, 0.0  # all are merged again, in rank order, so that every process gets the same bits
        found = []
        for process in every:
            other = RunningPca(k)
            n, mean, axes, other.total = process[i]
            other.n, other.mean, other.axes = n, mean.to(device), axes.to(device)
            found.append(other)
        yield found


def use_components(config: Any, spots: Sequence[Spot], components: Mapping[str, Tensor]) -> dict[str, Start]:
    """Writes the ranks into the configuration; weights without components are no longer targets."""
    options: EvaConfig = options_of(config, "eva_config", EvaConfig)
    ranks = {spot.name: len(components[spot.name]) for spot in spots}
    kept = [spot for spot in spots if ranks[spot.name]]
    alphas = {}
    for spot in kept:
        r = ranks[spot.name]
        # alpha = s / scale(r, 1), so that s stays; or alpha stays and s changes
        alpha = spot.scale / config.scale(spot.r, 1.0)
        alphas[spot.site] = spot.scale / config.scale(r, 1.0) if options.adjust_scaling_factors else alpha
    config.rank_pattern = {s.site: ranks[s.name] for s in kept if ranks[s.name] != config.r}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if abs(alpha - config.lora_alpha) > 1e-9}
    if any(config.pair(s.site)[0] != ranks[s.name] for s in kept):  # a name is the end of another's
        config.rank_pattern = {s.site: ranks[s.name] for s in kept}
        config.alpha_pattern = alphas
    if len(kept) < len(spots):
        _pin_targets(config, [s.site for s in kept])
    return {s.name: _start(s, components[s.name]) for s in kept}


def _start(spot: Spot, a: Tensor) -> Start:
    return Start(a, torch.zeros(*spot.ref.shape[:-1], len(a), device=a.device))


def _pin_targets(config: Any, names: list[str]) -> None:
    """The configuration goes to exactly these modules from now on."""
    config.target_modules = set(names)
    if any(a != b and a.endswith(f".{b}") for a in names for b in names):
        config.target_modules = "|".join(re.escape(name) for name in names)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
