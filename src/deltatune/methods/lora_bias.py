"""A bias on LoRA's B (`lora_bias=True`): y' = W x + b + s · (B A x + β), β: (out), zero at the start.

On a layer with a bias this is a delta of that bias, so it merges into it. On a layer without one it can only be
added to the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.edits import Delta, Edit
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError

#: the `pattern` of these sites
PATTERN = "lora_bias"


class BiasDelta(Delta):
    """b + s · β on the layer's own bias; `ref` is the bias as the matrix `(out, 1)`."""

    def __init__(self, ref: WeightRef, scale: float) -> None:
        super().__init__(ref)
        self.scale = scale
        beta = torch.zeros(ref.shape[-2], device=ref.device)
        self.beta = self.tensor("lora_B", beta, leaf="bias")

    def merged(self, w: Tensor) -> Tensor:
        return w + self.scale * self.beta.weight[:, None].to(w.dtype)


class AddedBias(Edit):
    """s · β on the output of a layer that has no bias; `ref` is the layer's weight."""

    no_merge = "adds a bias to a layer that has none"

    def __init__(self, ref: WeightRef, scale: float, **slot: Any) -> None:
        super().__init__()
        self.ref, self.scale = ref, scale
        self.beta = self.tensor(value=torch.zeros(ref.shape[-2], device=ref.device), **slot)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.ref.align(self.scale * self.beta.weight, y)


def lora_bias_sites(model: nn.Module, weights: Sequence[Site]) -> list[Site]:
    """One site per adapted weight: its layer's bias, or the whole layer where that has none."""
    return [_bias_of(model.get_submodule(site.path), site) for site in weights]


def _bias_of(module: nn.Module, site: Site) -> Site:
    weight = site.parameter or ""
    if not weight.endswith("weight"):
        raise ConfigError(f"lora_bias needs a layer with one weight, and {site.name!r} adapts {weight!r}; leave it out")
    name = f"{weight.removesuffix('weight')}bias"
    owner = module.get_submodule(name.rpartition(".")[0])
    has = owner._parameters.get(name.rpartition(".")[2]) is not None
    return replace(site, parameter=name if has else None, pattern=PATTERN)


def added_bias(
    module: nn.Module, site: Site, scale: float, option: str = "lora_bias", name: str = "lora_B", **slot: Any
) -> AddedBias:
    """The edit of a layer without bias.

    Args:
        option: what asked for it. name, slot: of its tensor; see `Slot`.

    Raises:
        ConfigError: nothing can be added to this module's output.
    """
    ref = WeightRef(module, "weight", site.rows) if "weight" in module._parameters else None
    if ref is None or not ref.bypass or ref.op.looks_up:
        kind = type(module).__name__
        raise ConfigError(f"{option} is not possible for {site.name!r}: {kind} has no bias that B's could join")
    return AddedBias(ref, scale, name=name, **{"leaf": "bias", **slot})
