"""LoHa: FedPara, Low-Rank Hadamard Product (arXiv 2108.06098), as LyCORIS (arXiv 2309.14859) uses it.

    dW = s · (B1 A1) ∘ (B2 A2)        A: (r, in), B: (out, r), s = alpha / r

∘ is the elementwise product, so dW has a rank of up to r² with 2 r (in + out) numbers. A2 starts at zero. The
product is itself low-rank: its factors are all products of a column of B1 with one of B2, and of a row of A1 with
one of A2, which is how it runs without forming dW.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.config import register
from deltatune.core.edits import Edit, LowRank, Slot
from deltatune.core.weights import WeightRef
from deltatune.methods._lycoris import ChangeDropout, LycorisConfig, core_kernel, tucker, uniform

Pair = tuple[Tensor, Tensor]


class LoHaDelta(LowRank):
    """One site's two pairs of factors.

    Args:
        ref: the weight, `(*batch, out, in)`.
        r: rank of each pair. scale: s.
    """

    def __init__(self, ref: WeightRef, r: int, scale: float, config: LoHaConfig) -> None:
        super().__init__(ref)
        self.scale = scale
        self.change_dropout = ChangeDropout(config.rank_dropout, config.module_dropout, rescale=True)
        out, inp = ref.shape[-2:]
        #: r² ranks cost more than the whole matrix
        self.wide = r * r * (inp + out) > inp * out
        self.pairs = [self._pair(n, r, core_kernel(ref, config), bool(config.init_weights)) for n in (1, 2)]
        self.cores = [
            self.tensor(f"hada_t{n}", uniform(r, r, *kernel, ref=ref), leaf=None)
            for n in (1, 2)
            if (kernel := core_kernel(ref, config))
        ]

    def _pair(self, n: int, r: int, kernel: list[int] | None, from_base: bool) -> tuple[Slot, Slot]:
        out, inp = self.ref.shape[-2:]
        shape_b, shape_a = [out, r], [r, inp]
        if kernel:  # beside a core, both factors are kept as (r, …)
            shape_b, shape_a = [r, out], [r, self.ref.raw_shape[1]]
        a = uniform(*shape_a, ref=self.ref)
        if n == 2 and from_base:
            a.zero_()
        b = self.tensor(f"hada_w{n}_a", uniform(*shape_b, ref=self.ref), leaf=None)
        return b, self.tensor(f"hada_w{n}_b", a, leaf=None)

    def _matrices(self) -> tuple[Pair, Pair]:
        """((B1, A1), (B2, A2)) as `(out, r)` and `(r, in)`."""
        (b1, a1), (b2, a2) = [(b.weight, a.weight) for b, a in self.pairs]
        if self.cores:
            t1, t2 = [core.weight for core in self.cores]
            return tucker(t1, b1, a1), tucker(t2, b2, a2)
        return (b1, a1), (b2, a2)

    def factors(self) -> tuple[Tensor, Tensor]:
        (b1, a1), (b2, a2) = self._matrices()
        b = (b1.unsqueeze(-1) * b2.unsqueeze(-2)).flatten(-2)  # (out, r·r)
        a = (a1.unsqueeze(-2) * a2.unsqueeze(-3)).flatten(-3, -2)  # (r·r, in)
        return a, self.scale * b

    def change(self, dtype: torch.dtype | None = None) -> Tensor:
        """dW, `(*batch, out, in)`."""
        (b1, a1), (b2, a2) = [(b.to(dtype), a.to(dtype)) for b, a in self._matrices()]
        return self.scale * (b1 @ a1) * (b2 @ a2)

    def merged(self, w: Tensor) -> Tensor:
        return w + self.change(w.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        out = self._apply(x)
        return self.change_dropout(self.ref, out) if self.change_dropout and self.host.training else out

    def _apply(self, x: Tensor) -> Tensor:
        if self.ref.op.looks_up:  # the looked-up columns of a product are products of looked-up columns
            (b1, a1), (b2, a2) = self._matrices()
            one, two = self.ref.factored(x, a1, self.scale * b1), self.ref.factored(x, a2, b2)
            product: Tensor = one * two / self.ref.op.gain(self.ref.module)
            return product
        return self.ref.apply(x, self.change()) if self.wide else self.ref.factored(x, *self.factors())

    def group(self) -> Hashable | None:
        alone = self.wide or (self.change_dropout and self.host.training) or not self.ref.bypass
        return None if alone else (LowRank, self.ref.place)


@register
@dataclass
class LoHaConfig(LycorisConfig):
    """LoHa's configuration, with peft's field names and defaults; see `LycorisConfig` for the fields."""

    method: ClassVar[str] = "LOHA"
    summary: ClassVar[str] = "the elementwise product of two low-rank updates"
    paper: ClassVar[str] = "arXiv 2108.06098"

    @classmethod
    def example(cls, **fields: object) -> LoHaConfig:
        return cls(**{"r": 2, "alpha": 8, **fields})  # type: ignore[arg-type]

    def delta(self, ref: WeightRef, r: int, scale: float) -> Edit:
        return LoHaDelta(ref, r, scale, self)
