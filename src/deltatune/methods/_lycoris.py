"""What LoHa and LoKr share (LyCORIS, arXiv 2309.14859): configuration, starts, dropouts, Tucker cores.

dW = s · (a product of small factors), s = alpha / r. Dropout acts on dW itself and not on the input: `rank_dropout`
leaves out output units, `module_dropout` the whole change, drawn anew for every training call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig
from deltatune.core.edits import Edit
from deltatune.core.ops import ConvOp
from deltatune.core.sites import Site, check_patterns, pattern_value
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods._fields import check_probability, check_ranks


@dataclass(frozen=True)
class ChangeDropout:
    """What a training call leaves out of a change.

    Attributes:
        units: probability of an output unit. whole: probability of everything.
        rescale: the kept units are divided by the share that was kept.
    """

    units: float = 0.0
    whole: float = 0.0
    rescale: bool = False

    def __bool__(self) -> bool:
        return bool(self.units or self.whole)

    def __call__(self, ref: WeightRef, change: Tensor) -> Tensor:
        """Applied to the change of the module's output."""
        if self.units:
            keep = (torch.rand(ref.shape[-2], device=change.device) >= self.units).to(change.dtype)
            if self.rescale:  # a draw that keeps nothing stays zero
                keep = keep / keep.mean().clamp_min(1 / len(keep))
            change = change * ref.align(keep, change)
        if self.whole:  # as a factor, so that a compiled graph has no branch on random numbers
            change = change * (torch.rand((), device=change.device) >= self.whole).to(change.dtype)
        return change


@dataclass
class LycorisConfig(TargetedConfig):
    """The fields that LoHa and LoKr share, with peft's names and defaults.

    Args:
        r: rank of the factors, >= 1.
        alpha: the change is scaled by `alpha / r`.
        rank_dropout: probability, in training, that an output unit's change is left out.
        module_dropout: probability, in training, that a module's change is left out.
        use_effective_conv2d: convolutions with a kernel larger than 1 keep small factors and a Tucker core
            (Proposition 3 of FedPara) instead of one factor over input x kernel.
        init_weights: True starts as the base; False fills every factor with random numbers (for tests).
        rank_pattern, alpha_pattern: path, path ending or regular expression -> r, alpha.

    Raises:
        ConfigError: a value is out of range.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)

    #: the values that `init_weights` may have
    inits: ClassVar[tuple[object, ...]] = (True, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        check_ranks(self.r, self.rank_pattern)
        check_probability("rank_dropout", self.rank_dropout)
        check_probability("module_dropout", self.module_dropout)
        if self.init_weights not in self.inits:
            raise ConfigError(
                f"init_weights must be {' or '.join(repr(i) for i in self.inits)}, not {self.init_weights!r}"
            )

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        names = [site.name for site in sites]
        check_patterns(self.rank_pattern or {}, names, "rank_pattern")
        check_patterns(self.alpha_pattern or {}, names, "alpha_pattern")
        return sites

    def build(self, ref: WeightRef, site: Site) -> Edit:
        for name in ("rank_dropout", "module_dropout"):
            if getattr(self, name) and not ref.bypass:
                raise ConfigError(
                    f"{site.name!r} reads its weight itself, so {name} cannot act on its output; set it to 0 or "
                    "leave this module out"
                )
        r = pattern_value(self.rank_pattern or {}, site.name, self.r)
        alpha = pattern_value(self.alpha_pattern or {}, site.name, self.alpha)
        return self.delta(ref, r, alpha / r)

    def delta(self, ref: WeightRef, r: int, scale: float) -> Edit:
        """The change of one weight, of rank `r` and scaled by `scale`."""
        raise NotImplementedError


def uniform(*shape: int, ref: WeightRef) -> Tensor:
    """kaiming-uniform with a = sqrt 5: uniform in ±1/sqrt(numbers per row); one for each batch of the weight."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(*ref.shape[:-2], *shape, device=ref.device).uniform_(-bound, bound)


def core_kernel(ref: WeightRef, config: LycorisConfig) -> list[int] | None:
    """The kernel of a Tucker core as files hold it (always two axes or more); None for a plain pair."""
    if not config.use_effective_conv2d or not isinstance(ref.op, ConvOp):
        return None
    kernel = list(ref.raw_shape[2:])
    if math.prod(kernel) == 1:
        return None
    return [*kernel, 1] if len(kernel) == 1 else kernel


def tucker(core: Tensor, out: Tensor, inp: Tensor) -> tuple[Tensor, Tensor]:
    """`b: (out, r)` and `a: (r, in · kernel)` of Σij core[i, j] out[i] ⊗ inp[j].

    Args:
        core: (r, r, *kernel). out: (r, out). inp: (r, in).
    """
    return out.mT, torch.einsum("ij...,jn->in...", core, inp).flatten(1)
