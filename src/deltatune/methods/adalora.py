"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (arXiv 2303.10512).

    y = W x + b + s · B diag(E) A dropout(x)     A: (r, in), E: (r, 1), B: (out, r), s = alpha / (ranknum + 1e-5)

An update in the form of a singular value decomposition: `E` holds the singular values, and a penalty keeps `A` and
`B` near orthogonal. A budget schedule scores the triplets (A_i, E_i, B_i) and masks the least important: `E_i` is
set to zero and may grow back, so shapes and the optimiser's state stay. `ranknum` is the initial rank for good, so
masking does not change the scale. `shrink`, at the end, drops what is masked. Merged: W + s · B diag(E) A.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from deltatune.config import register
from deltatune.core.adapters import AdapterSet
from deltatune.core.copies import ValueDelta
from deltatune.core.edits import Edit, LowRank
from deltatune.core.ops import VectorOp
from deltatune.core.sharded import part_like, whole
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, hint
from deltatune.methods._fields import check_input_dropout
from deltatune.methods.lora import LoraConfig

if TYPE_CHECKING:
    from deltatune.schedules.base import Procedure

#: the tensor of a site by whose name `rank_pattern` files its mask (peft's files)
MASKED = "lora_E"


class AdaLoraDelta(LowRank):
    """One site's triplets.

    Args:
        ref: the weight, `(out, in)`.
        r: triplets kept here; `initial` of them count for the scale.
        alpha: the update is scaled by `alpha / initial`. dropout: probability on the input, in training.
        zero: E starts at zero, so that the model starts as the base.
    """

    def __init__(self, ref: WeightRef, r: int, initial: int, alpha: float, dropout: float, zero: bool = True) -> None:
        super().__init__(ref)
        out, inp = ref.shape
        std, values = (0.02, torch.zeros) if zero else (1.0, torch.randn)
        self.lora_A = self.tensor("lora_A", std * torch.randn(r, inp, device=ref.device), leaf=None)
        self.lora_E = self.tensor(MASKED, values(r, 1, device=ref.device), leaf=None)
        self.lora_B = self.tensor("lora_B", std * torch.randn(out, r, device=ref.device), leaf=None)
        # no file has it, so it must have its number even where the others are made without memory
        ranknum = torch.full((1,), float(initial), device="cpu")
        self.ranknum = self.tensor("ranknum", ranknum, leaf=None, trainable=False, saved=False)
        self.scale, self.dropout = alpha / (initial + 1e-5), dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight * self.lora_E.weight, self.scale * self.lora_B.weight

    @torch.no_grad()
    def mask(self, keep: Tensor) -> None:
        """Sets E to zero where `keep: (r,)` is False. What is masked still gets gradients and may come back."""
        e = self.lora_E.weight
        e.mul_(part_like(keep.to(e.dtype).view(-1, 1), e))

    @torch.no_grad()
    def shrink(self, keep: Tensor) -> None:
        """Drops the triplets where `keep: (r,)` is False; new parameters, so an optimiser must not hold the old."""
        for slot, axis in ((self.lora_A, -2), (self.lora_E, -2), (self.lora_B, -1)):
            if hasattr(slot.weight, "device_mesh"):
                raise ConfigError("triplets cannot be dropped while FSDP2 holds parts of them; gather the model first")
            index = keep.to(slot.weight.device).nonzero().flatten()
            slot.replace(slot.weight.detach().index_select(axis, index))

    def penalty(self) -> list[Tensor]:
        """‖A Aᵀ - I‖ and ‖Bᵀ B - I‖ (Frobenius), which orthogonal factors make zero."""
        a, b = whole(self.lora_A.weight), whole(self.lora_B.weight)
        grams = (a @ a.mT, b.mT @ b)
        return [torch.linalg.matrix_norm(g - torch.eye(g.shape[-1], device=g.device, dtype=g.dtype)) for g in grams]


@register
@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA's configuration, with peft's field names and defaults; LoRA's options for placement and biases too.

    Args:
        init_r: triplets per weight at the start. target_r: their mean number at the end.
        tinit: steps before pruning starts. tfinal: steps at the end, at the fixed final budget.
        deltaT: steps between two allocations of the budget.
        beta1, beta2: smoothing of the sensitivity and of its uncertainty.
        orth_reg_weight: weight of `orthogonality` in the loss.
        total_step: optimiser steps of the whole training; None takes them from the trainer (or `attach`).
        rank_pattern: `<path>.lora_E` -> which triplets are kept, once the budget is final.

    Raises:
        ConfigError: the schedule leaves no step for pruning, or an option of LoRA does not apply to triplets.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  (as peft spells it)
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None

    method: ClassVar[str] = "ADALORA"
    summary: ClassVar[str] = "low-rank updates as triplets; a budget goes where it matters"
    paper: ClassVar[str] = "arXiv 2303.10512"
    #: options of LoRA that mean nothing for triplets
    not_here: ClassVar[tuple[str, ...]] = (
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "corda_config",
        "enable_lora",
        "eva_config",
        "kasa_config",
        "loftq_config",
        "lora_bias",
        "lora_ga_config",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    )

    def __post_init__(self) -> None:
        masks, self.rank_pattern = self.rank_pattern, None  # LoRA's pattern holds numbers
        super().__post_init__()
        self.rank_pattern = masks or None
        for name in self.not_here:
            if getattr(self, name):
                raise ConfigError(f"AdaLoRA has no {name}; leave it out, or use LoraConfig")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"AdaLoRA starts from its own random triplets, not from {self.init_lora_weights!r}")
        for name in ("init_r", "target_r", "deltaT"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        if self.target_r > self.init_r:
            raise ConfigError(
                f"target_r={self.target_r} is above init_r={self.init_r}, so there is nothing to prune; "
                f"use init_r={math.ceil(1.5 * self.target_r)}, or a target_r of at most {self.init_r}"
            )
        if self.r != type(self).r:
            warnings.warn("AdaLoRA does not use r; the rank it starts with is init_r", stacklevel=3)
        self._check_schedule()

    def for_total(self, steps: int) -> None:
        """Takes over how many optimiser steps the training has.

        Raises:
            ConfigError: they leave no step for pruning.
        """
        before, self.total_step = self.total_step, steps
        try:
            self._check_schedule()
        except ConfigError:
            self.total_step = before
            raise

    def procedures(self) -> list[Procedure]:
        from deltatune.schedules.adalora import AdaLora

        return [AdaLora()]

    def _check_schedule(self) -> None:
        for name in ("tinit", "tfinal"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.total_step is None:
            return
        if not isinstance(self.total_step, int) or self.total_step < 1:
            raise ConfigError(f"total_step must be a whole number of at least 1, not {self.total_step!r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} in which "
                "ranks could be pruned; make them smaller or train longer"
            )

    @classmethod
    def example(cls, **fields: Any) -> AdaLoraConfig:
        return cls(**{"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 100, **fields})

    def sites(self, model: Any) -> list[Site]:
        masks, self.rank_pattern = self.rank_pattern, None
        try:
            found = super().sites(model)
        finally:
            self.rank_pattern = masks
        keys = [_key(site) for site in found]
        for key, mask in (masks or {}).items():
            if key not in keys:
                raise ConfigError(f"rank_pattern key {key!r} is no adapted weight of this model{hint(key, keys)}")
            if not isinstance(mask, list) or len(mask) != self.init_r:
                raise ConfigError(f"rank_pattern[{key!r}] must say for each of {self.init_r} triplets if it is kept")
        return found

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        if isinstance(ref.op, VectorOp):
            return ValueDelta(ref)
        check_input_dropout("lora_dropout", self.lora_dropout, ref, site)
        kept = (self.rank_pattern or {}).get(_key(site))
        r = self.init_r if kept is None else sum(map(bool, kept))
        return AdaLoraDelta(ref, r, self.init_r, self.lora_alpha, self.lora_dropout, bool(self.init_lora_weights))


def _key(site: Site) -> str:
    """The name of a site's mask in `rank_pattern`."""
    return f"{site.file_path or site.name}.{MASKED}"


def triplets(adapters: AdapterSet, name: str) -> dict[str, AdaLoraDelta]:
    """`<path>.lora_E` -> the triplets of an adapter, in the model's order."""
    adapters.check(name)
    return {d.lora_E.key: d for d in adapters.deltas(name) if isinstance(d, AdaLoraDelta)}


def orthogonality(deltas: Iterable[AdaLoraDelta]) -> Tensor:
    """The penalty to add to the loss, times `orth_reg_weight`: the mean over every A and every B, each once."""
    return torch.stack([norm.mean() for d in deltas for norm in d.penalty()]).mean()


def shrink(adapters: AdapterSet, name: str) -> None:
    """Drops every triplet whose E is zero and writes which were kept into the configuration's `rank_pattern`.

    The outputs do not change. For after training: the parameters are new ones.
    """
    config = adapters.configs[name]
    assert isinstance(config, AdaLoraConfig)
    before = config.rank_pattern or {}
    pattern: dict[str, list[bool]] = {}
    for key, delta in triplets(adapters, name).items():
        keep = delta.lora_E.weight.detach().flatten() != 0
        rest = iter(keep.tolist())
        pattern[key] = [bool(was) and next(rest) for was in before.get(key, [True] * len(keep))]
        delta.shrink(keep)
    config.rank_pattern = pattern
