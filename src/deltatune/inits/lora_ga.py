"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (arXiv 2407.05000).

    G: the loss' gradient by the weight, averaged over a few batches;  G = U S Vᵀ
    A0 = c V_{:r}ᵀ,  B0 = c U_{:, r:2r},  c = out^¼ / sqrt(γ),  y = W x + s · (B A - B0 A0) x

so that the first step of A and B moves W along G, as full fine-tuning would. Scales as in the authors' code (peft's
version multiplies by singular values and is not this method).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltatune.core.files import read_tensors, write_tensors
from deltatune.core.sharded import whole
from deltatune.errors import ConfigError, hint
from deltatune.inits import Request, Start, options_of, register_init
from deltatune.inits._watch import GradientWatch, Spot
from deltatune.inits.data import (
    COLLECTORS,
    PairCollector,
    as_base,
    averaged,
    check_file_name,
    collector_for,
    finish,
    prepared_start,
)
from deltatune.inits.pissa import principal_fast

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGAConfig:
    """Options of `init_lora_weights="lora_ga"`.

    Args:
        direction: which singular vectors A and B take: `"ArB2r"` (A the first r, B the next r), `"A2rBr"` (the other
            way round), `"ArBr"` (alternating), `"random"` (among the first 2r).
        scale: `"stable"` (out^¼ / sqrt(stable_gamma)), `"weight_svd"` (the mean root of W's first singular values over
            s), `"gd_scale"` (1/s), `"unit"`.
        stable_gamma: γ; smaller starts larger.

    Raises:
        ConfigError: an unknown direction or scale, or γ <= 0.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        for name, value, known in (("direction", self.direction, DIRECTIONS), ("scale", self.scale, SCALES)):
            if value not in known:
                raise ConfigError(
                    f"lora_ga_config: {name} must be one of {', '.join(known)}, not {value!r}{hint(str(value), known)}"
                )
        if not self.stable_gamma > 0:
            raise ConfigError(f"lora_ga_config: stable_gamma must be positive, not {self.stable_gamma!r}")


@register_init("lora_ga", option="lora_ga_config", options=LoraGAConfig, needs_data=True, offset=True, derivable=False)
def lora_ga(request: Request) -> Start:
    """The directions that the gradients gave."""
    return prepared_start(request)


def directions(g: Tensor, r: int, direction: str) -> tuple[Tensor, Tensor]:
    """Orthonormal A `(…, r, in)` and B `(…, out, r)` from a gradient `g: (…, out, in)`; their indices differ."""
    q = min(4 * r, *g.shape[-2:])
    if q == min(g.shape[-2:]):
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
    else:
        u, _, vt = principal_fast(g, q, 4)
    first, second, order = slice(r), slice(r, 2 * r), torch.randperm(2 * r, device=g.device)
    for_a: Any
    for_b: Any
    for_a, for_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
        "random": (order[:r], order[r:]),
    }[direction]
    return vt[..., for_a, :], u[..., for_b]


def factor_scale(spot: Spot, options: LoraGAConfig) -> float:
    """What both factors are multiplied by."""
    if options.scale == "unit":
        return 1.0
    if options.scale == "gd_scale":
        return 1 / spot.scale
    if options.scale == "stable":
        return float(spot.ref.shape[-2] ** 0.25 / options.stable_gamma**0.5)
    values = torch.linalg.svdvals(whole(spot.ref.load()))[..., : spot.r]
    return float((values / spot.scale).sqrt().mean())


class GradientCollector(PairCollector):
    """Average gradients of the weights; each is taken and freed as soon as backward has it."""

    backward = True

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)
        self.options: LoraGAConfig = options_of(config, "lora_ga_config", LoraGAConfig)
        for spot in self.spots:
            self._check(spot)
        #: id of a parameter -> its gradients' sum, and how many there were
        self.sums: dict[int, Tensor] = {}
        self.calls: dict[int, int] = {}

    @staticmethod
    def _check(spot: Spot) -> None:
        limit = min(spot.ref.shape[-2:])
        if 2 * spot.r > limit:
            raise ConfigError(
                f"LoRA-GA takes 2r directions of the gradient, but r={spot.r} and {spot.name!r} has only {limit}; "
                "lower r, or give this module its own in rank_pattern"
            )
        if not spot.ref.param.is_floating_point() or not spot.ref.store.exact:
            raise ConfigError(
                f"LoRA-GA needs the gradient of {spot.name!r}, whose weight is quantised; prepare on the base in full "
                "precision"
            )

    def watch(self) -> GradientWatch:
        return GradientWatch(self.root, (s.ref.param for s in self.spots), self._keep)

    def _keep(self, key: int, grad: Tensor) -> None:
        self.sums[key] = self.sums[key] + grad if key in self.sums else grad
        self.calls[key] = self.calls.get(key, 0) + 1

    def gradients(self) -> dict[str, Tensor]:
        """path -> the mean gradient in the layout of its parameter, over all processes.

        Raises:
            ConfigError: a weight got no gradient, or one that is not finite.
        """
        found: dict[int, Tensor] = {}
        for spot in self.spots:
            key = id(spot.ref.param)
            if key not in self.sums:
                raise ConfigError(f"LoRA-GA: no batch gave {spot.name!r} a gradient; leave it out, or check the loss")
            if key not in found:
                found[key] = averaged(self.sums.pop(key), self.calls[key])
                if not torch.isfinite(found[key]).all():
                    raise ConfigError(f"LoRA-GA: the gradient of {spot.name!r} is not finite")
        return {spot.name: found[id(spot.ref.param)] for spot in self.spots}

    def finish(self) -> dict[str, Start]:
        return self.starts(self.gradients())

    def starts(self, gradients: dict[str, Tensor]) -> dict[str, Start]:
        """The starts, from gradients in the layout of the parameters."""
        starts = {}
        for spot in self.spots:
            g = gradients[spot.name].to(spot.ref.device)
            if g.shape != spot.ref.raw_shape:
                raise ConfigError(f"the gradient of {spot.name!r} has shape {tuple(g.shape)}, which does not fit")
            a, b = directions(spot.ref.take(spot.ref.op.matrix(g.float())), spot.r, self.options.direction)
            c = factor_scale(spot, self.options)
            starts[spot.name] = Start((c * a).contiguous(), (c * b).contiguous(), offset=True)
        return starts


COLLECTORS["lora_ga"] = GradientCollector


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], object], cache_file: str | None = None
) -> None:
    """Computes LoRA-GA's starts before `get_peft_model`; peft's name for `prepare_init`.

    Args:
        train_step: runs forward and backward on a few batches.
        cache_file: a .safetensors file for the gradients; read instead of running if it is there.

    Raises:
        ConfigError: the configuration is not for LoRA-GA, or a weight got no gradient.
    """
    collector = collector_for(model, lora_config, "lora_ga")
    assert isinstance(collector, GradientCollector)
    check_file_name("cache_file", cache_file)
    if cache_file is not None and Path(cache_file).is_file():
        gradients, _ = read_tensors(Path(cache_file))
        for spot in collector.spots:
            if spot.name not in gradients:
                raise ConfigError(
                    f"{cache_file} has no gradient of {spot.name!r}{hint(spot.name, gradients)}; remove it"
                )
    else:
        with as_base(model), collector.watch():
            train_step()
        gradients = collector.gradients()
        if cache_file is not None:
            write_tensors(Path(cache_file), gradients, {})
    with torch.no_grad():
        finish(collector, collector.starts(gradients))
