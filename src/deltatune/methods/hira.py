"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (ICLR 2025, openreview TwJrTz9cRS).

    y = W x + b + (W ∘ B A) dropout(x)        A: (r, in), B: (out, r)

∘ is the elementwise product with the frozen weight, so the change has up to rank(W) · r ranks. B starts at zero.
Merged: W ∘ (1 + B A). There is no cheaper path than forming W ∘ B A, except for embeddings: the looked-up columns
of a product are products of looked-up columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.edits import Delta, Edit
from deltatune.core.sites import Site, check_patterns, pattern_value
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import Request, Start
from deltatune.inits import start as start_of
from deltatune.methods._fields import check_probability, check_ranks

#: `init_weights` -> the init of the factors
STARTS: dict[object, str] = {True: "default", "gaussian": "gaussian", False: "random", None: "random"}


class HiraDelta(Delta):
    """One site's pair of factors.

    Args:
        ref: the weight, `(*batch, out, in)`.
        dropout: probability on the input, in training. start: what A and B start as.
    """

    def __init__(self, ref: WeightRef, dropout: float, start: Start) -> None:
        super().__init__(ref)
        self.dropout = dropout
        #: an embedding's output is what W gives
        self.reads_output = ref.op.looks_up
        name = "hira_embedding_" if ref.op.looks_up else "hira_"
        a, b = ref.op.pack(ref.module, start.a, start.b)
        self.a = self.tensor(f"{name}A", a, leaf=None)
        self.b = self.tensor(f"{name}B", b, leaf=None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`A: (*batch, r, in)` and `B: (*batch, out, r)`."""
        return self.ref.op.unpack(self.a.weight, self.b.weight)

    def merged(self, w: Tensor) -> Tensor:
        a, b = self.factors()
        return w + w * (b.to(w.dtype) @ a.to(w.dtype))

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        a, b = self.factors()
        if self.ref.op.looks_up:
            change: Tensor = y * self.ref.factored(x, a, b) / self.ref.op.gain(self.ref.module)
            return change
        if self.dropout and self.host.training:
            x = F.dropout(x, self.dropout)
        # in the activation's dtype, so that a 16-bit base is not copied to float32 at every call
        return self.ref.apply(x, self.ref.load_as(x.dtype) * (b @ a).to(x.dtype))


@register
@dataclass
class HiraConfig(TargetedConfig):
    """HiRA's configuration, with peft's field names and defaults.

    Args:
        r: rank, >= 1.
        hira_dropout: dropout on the change's input, in [0, 1).
        fan_in_fan_out: accepted for peft's sake; the storage order is read from the layer itself.
        init_weights: True (A kaiming-uniform, B zero), `"gaussian"` (A normal with std 1/r), False (both random:
            the model does not start as the base; for tests).
        rank_pattern: path, path ending or regular expression -> r (peft 0.21 has the field and ignores it).

    Raises:
        ConfigError: a value is out of range.
    """

    r: int = 32
    hira_dropout: float = 0.0
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    method: ClassVar[str] = "HIRA"
    summary: ClassVar[str] = "the weight times a low-rank matrix, element by element"
    paper: ClassVar[str] = "ICLR 2025, openreview TwJrTz9cRS"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        check_ranks(self.r, self.rank_pattern)
        check_probability("hira_dropout", self.hira_dropout)
        if self.init_weights not in STARTS:
            raise ConfigError(f'init_weights must be True, False or "gaussian", not {self.init_weights!r}')

    @classmethod
    def example(cls, **fields: object) -> HiraConfig:
        return cls(**{"r": 4, **fields})  # type: ignore[arg-type]

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        check_patterns(self.rank_pattern or {}, [site.name for site in sites], "rank_pattern")
        return sites

    def build(self, ref: WeightRef, site: Site) -> Edit:
        if self.hira_dropout and not ref.bypass:
            raise ConfigError(
                f"{site.name!r} reads its weight itself, so hira_dropout cannot reach its input; set it to 0 or "
                "leave this module out"
            )
        r = pattern_value(self.rank_pattern or {}, site.name, self.r)
        start = start_of(Request(STARTS[self.init_weights], ref, site.name, r, config=self))
        return HiraDelta(ref, self.hira_dropout, start)
