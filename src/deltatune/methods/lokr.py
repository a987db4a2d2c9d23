"""LoKr: Low-Rank Kronecker product, from LyCORIS (arXiv 2309.14859).

    dW = s · W1 ⊗ W2        W1: (l, m), W2: (k, n), l·k = out, m·n = in, s = alpha / r

l <= k and m <= n are the factors of out and in nearest to a square, or `decompose_factor`. W2 is a product
W2a W2b of rank r where that is smaller (r < max(k, n) / 2), W1 likewise under `decompose_both`. W1 starts at zero.
The product is never formed: x is reshaped to (m, n), and W1 X W2ᵀ is the output as (l, k).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltatune.config import register
from deltatune.core.edits import Edit, Slot
from deltatune.core.kronecker import Kronecker
from deltatune.core.ops import ConvOp, kronecker
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods._lycoris import ChangeDropout, LycorisConfig, core_kernel, tucker, uniform


def split(size: int, factor: int) -> tuple[int, int]:
    """`size` as (small, large): by `factor` where it divides, else its largest divisor up to both roots.

    >>> split(48, -1), split(48, 24), split(48, 5)
    ((6, 8), (24, 2), (4, 12))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = max(d for d in range(1, limit + 1) if size % d == 0)
    return small, size // small


class LoKrDelta(Kronecker):
    """One site's Kronecker factors.

    Args:
        ref: the weight, `(*batch, out, in)`.
        r: rank of a decomposed factor. scale: s.
    """

    def __init__(self, ref: WeightRef, r: int, scale: float, config: LoKrConfig) -> None:
        super().__init__(ref)
        self.scale, self.config = scale, config
        self.dropout = ChangeDropout(config.rank_dropout, config.module_dropout, config.rank_dropout_scale)
        self.core: Slot | None = None
        kernel = ref.raw_shape[2:] if isinstance(ref.op, ConvOp) else ()
        out = split(ref.shape[-2], config.decompose_factor)
        inp = split(ref.shape[-1] // math.prod(kernel), config.decompose_factor)
        self.w1 = self._factor("w1", (out[0], inp[0]), r if config.decompose_both else None)
        self.w2 = self._factor("w2", (out[1], inp[1], *kernel), r)
        #: peft (0.21) multiplies W1 into the last two axes of a whole W2 of three axes, so in its files of 1-d
        #: convolutions the numbers of dW stand in another order; equal files must mean equal outputs
        self.interleaved = len(kernel) == 1 and len(self.w2) == 1

    def _factor(self, name: str, shape: tuple[int, ...], r: int | None) -> list[Slot]:
        """One factor as files hold it: whole, as a pair, or as a pair around a Tucker core."""
        rows, columns = shape[:2]
        core = core_kernel(self.ref, self.config) if name == "w2" else None
        if r is None or r >= max(rows, columns) / 2:
            parts = {"": uniform(*shape, ref=self.ref)}
        elif core:
            parts = {"_a": uniform(r, rows, ref=self.ref), "_b": uniform(r, columns, ref=self.ref)}
            self.core = self.tensor("lokr_t2", uniform(r, r, *core, ref=self.ref), leaf=None)
        else:
            inner = math.prod(shape[1:])
            parts = {"_a": uniform(rows, r, ref=self.ref), "_b": uniform(r, inner, ref=self.ref)}
        if name == {True: "w1", "lycoris": "w2"}.get(self.config.init_weights):
            parts[{"w1": min, "w2": max}[name](parts)].zero_()  # W1 or W1a; W2 or W2b
        return [self.tensor(f"lokr_{name}{part}", value, leaf=None) for part, value in parts.items()]

    def factors(self) -> tuple[Tensor, Tensor]:
        """`s W1: (*batch, l, m)` and `W2: (*batch, k, n · kernel)`."""
        w1, w2 = [[slot.weight for slot in parts] for parts in (self.w1, self.w2)]
        if self.core is not None:
            w2 = list(tucker(self.core.weight, *w2))
        one, two = [w[0] @ w[1] if len(w) == 2 else w[0] for w in (w1, w2)]
        return self.scale * one, two.flatten(1) if isinstance(self.ref.op, ConvOp) else two

    def merged(self, w: Tensor) -> Tensor:
        if self.interleaved:
            return w + self._interleaved(*[factor.to(w.dtype) for factor in self.factors()])
        return super().merged(w)

    def _interleaved(self, w1: Tensor, w2: Tensor) -> Tensor:
        product = kronecker(w1, w2.view(*self.w2[0].weight.shape))  # (k, l, m) ⊗ -> (k, l·n, m·kernel)
        return product.reshape(self.ref.shape)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        w1, w2 = self.factors()
        change = self.ref.apply(x, self._interleaved(w1, w2)) if self.interleaved else self.ref.kron(x, w1, w2)
        return self.dropout(self.ref, change) if self.dropout and self.host.training else change

    def group(self) -> Hashable | None:
        alone = self.interleaved or (self.dropout and self.host.training) or not self.ref.bypass
        return None if alone else (Kronecker, self.ref.place, *(factor.shape for factor in self.factors()))


@register
@dataclass
class LoKrConfig(LycorisConfig):
    """LoKr's configuration, with peft's field names and defaults; see also `LycorisConfig`.

    Args:
        decompose_both: the smaller factor may be a product of rank r too.
        decompose_factor: the size of the smaller factor where it divides, or its limit; -1 for nearly square.
        rank_dropout_scale: units that `rank_dropout` keeps are divided by the share that was kept.
        init_weights: True starts with W1 at zero, `"lycoris"` with W2 at zero, False fills both at random.
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    method: ClassVar[str] = "LOKR"
    summary: ClassVar[str] = "a Kronecker product of two small matrices"
    paper: ClassVar[str] = "arXiv 2309.14859"
    inits: ClassVar[tuple[object, ...]] = (True, False, "lycoris")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.decompose_factor, int) or (self.decompose_factor < 1 and self.decompose_factor != -1):
            raise ConfigError(f"decompose_factor must be -1 or at least 1, not {self.decompose_factor!r}")

    @classmethod
    def example(cls, **fields: object) -> LoKrConfig:
        return cls(**{"r": 1, "alpha": 4, **fields})  # type: ignore[arg-type]

    def delta(self, ref: WeightRef, r: int, scale: float) -> Edit:
        return LoKrDelta(ref, r, scale, self)
