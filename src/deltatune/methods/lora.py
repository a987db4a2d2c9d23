"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685); rsLoRA scaling (arXiv 2312.03732).

    y = W x + b + s · B A dropout(x)        A: (r, in), B: (out, r), s = alpha / r, or alpha / sqrt(r)

B starts at zero, so the model starts as the base. Merged: W + s · B A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.copies import ValueDelta
from deltatune.core.edits import Delta, Edit, LowRank, Slot
from deltatune.core.ops import VectorOp
from deltatune.core.positions import stretch_first
from deltatune.core.replicate import replicate_layers
from deltatune.core.sites import (
    Site,
    check_patterns,
    parameter_sites,
    part_sites,
    pattern_value,
    tied_heads,
    trained_biases,
)
from deltatune.core.ties import tie_edits
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import Later, Request, Start, check_init
from deltatune.inits import start as start_of
from deltatune.methods.lora_bias import PATTERN as LORA_BIAS
from deltatune.methods.lora_bias import BiasDelta, added_bias, lora_bias_sites
from deltatune.methods.trainable_tokens import build_tokens


class LoraDelta(LowRank):
    """One site's pair of factors.

    Args:
        ref: the weight, `(*batch, out, in)`.
        r: rank. scale: s. dropout: probability on the input, in training.
        start: what A and B start as, and whether that is subtracted.
    """

    def __init__(self, ref: WeightRef, r: int, scale: float, dropout: float, start: Start) -> None:
        super().__init__(ref)
        self.r, self.scale, self.dropout = r, scale, dropout
        # an embedding indexes A, so its factors are plain tensors of that name in peft's files
        name, leaf = ("lora_embedding_", None) if ref.op.looks_up else ("lora_", "weight")
        a, b = ref.op.pack(ref.module, start.a, start.b)
        self.lora_A = self.tensor(f"{name}A", a, leaf=leaf)
        self.lora_B = self.tensor(f"{name}B", b, leaf=leaf, trainable=not start.freezes_b)
        self.start: tuple[Slot, Slot] | None = None
        if start.offset:
            frozen = {"leaf": leaf, "buffer": True, "derived": start.derivable}
            self.start = (
                self.tensor(f"{name}A0", a.clone(), **frozen),
                self.tensor(f"{name}B0", b.clone(), **frozen),
            )
            self.start[0].advice = start.advice
        if start.later is not None:
            self._fill_later(ref, start.later)

    def _fill_later(self, ref: WeightRef, later: Later) -> None:
        """What a file lacks is computed when it has been read."""
        for slot, which in zip((self.lora_A, self.lora_B, *(self.start or ())), "abab", strict=False):
            slot.later = partial(_packed, ref, later, which)

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b, s = LoraDelta.scaled(self)
        return a, s * b

    def scaled(self) -> tuple[Tensor, Tensor, float]:
        a, b = self.ref.op.unpack(self.lora_A.weight, self.lora_B.weight)
        if self.start is not None:
            a0, b0 = self.ref.op.unpack(self.start[0].weight, self.start[1].weight)
            a, b = torch.cat([a, a0], -2), torch.cat([b, -b0], -1)  # B A - B0 A0, of rank 2r
        return a, b, self.scale


def _packed(ref: WeightRef, later: Later, which: str) -> Tensor:
    return ref.op.pack(ref.module, later("a"), later("b"))["ab".index(which)]


#: option of `LoraConfig` -> the delta that it asks for, where that is not LoRA's own: "module:class"
VARIANTS: dict[str, str] = {
    "use_dora": "deltatune.methods.dora:DoraDelta",
    "use_qalora": "deltatune.methods.qalora:QaloraDelta",
}


@register
@dataclass
class LoraConfig(TargetedConfig):
    """LoRA's configuration, with peft's field names and defaults.

    Args:
        r: rank, >= 1.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: dropout on the update's input, in [0, 1).
        fan_in_fan_out: accepted for peft's sake; the storage order is read from the layer itself.
        bias: which biases train beside the factors: `"none"`, `"all"`, `"lora_only"` (of adapted layers).
        use_rslora: scale by `lora_alpha / sqrt(r)` instead.
        lora_bias: a bias on B trains too; on layers that have a bias it merges into that.
        use_dora: magnitudes train apart from directions (DoRA, arXiv 2402.09353).
        init_lora_weights: True (A kaiming-uniform, B zero), `"gaussian"` (A normal with std 1/r), False (both
            random: the model does not start as the base; for tests), `"orthogonal"`, `"pissa"`, `"pissa_niter_16"`,
            `"olora"`, `"mica"`, `"loftq"`, and from data (`prepare_init`) `"eva"`, `"corda"`, `"lora_ga"`.
        loftq_config, eva_config, corda_config, lora_ga_config: options of the init of that name.
        trainable_token_indices: rows of the embedding that train too: a list, or embedding name -> list.
        target_parameters: parameters by name, for the fused weights of mixtures of experts.
        layer_replication: `[start, end)` ranges of layers that make a deeper model around the same weights.
        ensure_weight_tying: a head tied to an adapted or copied embedding follows it.
        enable_lora: which parts of a fused projection (q, k, v) are adapted, each with factors of its own; a list,
            or module name -> list (loralib's MergedLinear).
        context_length: the adapter is for a context of this length; where the base's is shorter, its rotary positions
            are interpolated while the adapter is there (LongLoRA). Not a field of peft, which says that it ignores it.
        use_qalora: one column of A per group of inputs, so that a merge fits group-wise zero-points.
        qalora_group_size: inputs in a group.
        megatron_core: kept as files have it; what it belongs to is refused.
        rank_pattern, alpha_pattern: path, path ending or regular expression -> r, alpha.

    Raises:
        ConfigError: a value is out of range, or an option is set that this release does not have.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] | None = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False
    enable_lora: list[bool] | dict[str, list[bool]] | None = None
    context_length: int | None = None
    #: what `prepare_init` has computed from data: site -> start
    prepared: dict[str, Start] | None = field(default=None, init=False, repr=False, compare=False)

    method: ClassVar[str] = "LORA"
    summary: ClassVar[str] = "a low-rank update B·A beside each weight"
    paper: ClassVar[str] = "arXiv 2106.09685"
    ours: ClassVar[tuple[str, ...]] = ("enable_lora", "context_length")
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
        "qalora": {"use_qalora": True, "qalora_group_size": 4},
        "pissa": {"init_lora_weights": "pissa"},  # stands for all inits that carry a frozen start
    }
    #: fields of peft that this release does not have yet; setting one is an error
    not_yet: ClassVar[tuple[str, ...]] = (
        "megatron_config",
        "velora_config",
        "alora_invocation_tokens",
        "monteclora_config",
        "use_bdlora",
        "arrow_config",
        "kasa_config",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ConfigError(f"r must be a whole number of at least 1, not {r!r}")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
                raise ConfigError(f"lora_alpha must be a number, not {alpha!r}")
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ConfigError(f'bias must be "none", "all" or "lora_only", not {self.bias!r}')
        if self.context_length is not None and (type(self.context_length) is not int or self.context_length < 1):
            raise ConfigError(f"context_length must be a whole number of at least 1, not {self.context_length!r}")
        check_init(self)
        if self.lora_bias and self.use_dora:
            raise ConfigError("lora_bias=True is not possible with use_dora=True: DoRA has no bias on B; drop one")
        if sum(bool(getattr(self, option)) for option in VARIANTS) > 1:
            raise ConfigError(f"only one of {', '.join(VARIANTS)} can be set")
        for name in self.not_yet:
            if getattr(self, name):
                raise ConfigError(f"{name} is not supported by this release of deltatune")

    @classmethod
    def example(cls, **fields: Any) -> LoraConfig:
        return cls(**{"r": 4, "lora_alpha": 8, **fields})

    def scale(self, r: int, alpha: float) -> float:
        """s, by which B A x is multiplied."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def pair(self, name: str) -> tuple[int, float]:
        """(rank, scale) of the pair at a site."""
        r = pattern_value(self.rank_pattern or {}, name, self.r)
        return r, self.scale(r, pattern_value(self.alpha_pattern or {}, name, self.lora_alpha))

    def prepare(self, model: nn.Module) -> Callable[[], None] | None:
        if self.context_length is None:
            return replicate_layers(model, self.layer_replication) if self.layer_replication else None
        if self.layer_replication:
            raise ConfigError("context_length is not possible with layer_replication; drop one")
        return stretch_first(model, self.context_length)

    def sites(self, model: nn.Module) -> list[Site]:
        only_parameters = self.target_parameters and self.target_modules is not None and not self.target_modules
        weights = [] if only_parameters else super().sites(model)
        if self.enable_lora:
            weights = part_sites(model, weights, self.enable_lora)
        weights += parameter_sites(model, self.target_parameters or [])
        names = [site.name for site in weights]
        check_patterns(self.rank_pattern or {}, names, "rank_pattern")
        check_patterns(self.alpha_pattern or {}, names, "alpha_pattern")
        if self.lora_bias:
            weights = [*weights, *lora_bias_sites(model, weights)]
        if self.bias == "none":
            return weights
        return weights + trained_biases(model, self, names, self.bias == "all")

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        r, scale = self.pair(site.name)
        if isinstance(ref.op, VectorOp):
            return BiasDelta(ref, scale) if site.pattern == LORA_BIAS else ValueDelta(ref)
        if self.lora_dropout and not ref.bypass:
            raise ConfigError(
                f"{site.name!r} reads its weight itself, so lora_dropout cannot reach its input; set it to 0 or "
                "leave this module out"
            )
        start = start_of(Request(self.init_for(ref), ref, site.key, r, scale, self))
        return self._delta_class()(ref, r, scale, self.lora_dropout, start)

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        return added_bias(module, site, self.pair(site.name)[1])

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        more: list[tuple[Site, list[Edit]]] = []
        if self.trainable_token_indices:
            more += build_tokens(model, self.trainable_token_indices)
        if self.ensure_weight_tying:
            for site, edits in made:
                more += [(Site(path), tie_edits(model, path, edits)) for path in tied_heads(model, site.path)]
            if not any(edits for _, edits in more):
                raise ConfigError(
                    "ensure_weight_tying=True, but no head of this model is tied to an embedding that is adapted, "
                    "copied or has trainable tokens; adapt the embedding or leave the option out"
                )
        return more

    def init_for(self, ref: WeightRef) -> str:
        """The init of one weight."""
        return self.init_name

    @property
    def init_name(self) -> str:
        """`init_lora_weights` as the name of an init."""
        if isinstance(self.init_lora_weights, bool):
            return "default" if self.init_lora_weights else "random"
        return self.init_lora_weights

    def _delta_class(self) -> Callable[[WeightRef, int, float, float, Start], Delta]:
        for option, where in VARIANTS.items():
            if getattr(self, option):
                module, _, name = where.partition(":")
                variant = getattr(import_module(module), name)
                return partial(variant, group=self.qalora_group_size) if option == "use_qalora" else variant
        return LoraDelta
