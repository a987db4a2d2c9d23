"""KronA: Parameter Efficient Tuning with Kronecker Adapter (arXiv 2212.10650).

    y = W x + b + s · (A ⊗ B) x        A: (a1, a2), B: (out / a1, in / a2)

rank(A ⊗ B) = rank(A) · rank(B), so the change can have full rank with few numbers. B starts at zero. The product is
never formed: with x reshaped to X: (a2, in / a2), the change of the output is s · A X Bᵀ, read row by row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.edits import Edit
from deltatune.core.kronecker import Kronecker
from deltatune.core.ops import ConvOp
from deltatune.core.sites import Site, check_patterns, pattern_value
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError


def divisors(n: int) -> list[int]:
    """
    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]


def smallest(out: int, inp: int, kernel: int = 1) -> tuple[int, int]:
    """The shape of A with the fewest numbers in A and B; of several, the one of the highest possible rank.

    >>> smallest(576, 576)
    (24, 24)
    """
    shapes = [(a1, a2) for a1 in divisors(out) for a2 in divisors(inp)]

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        (a1, a2), (b1, b2) = shape, (out // shape[0], inp // shape[1])
        return a1 * a2 + b1 * b2 * kernel, -min(a1, a2) * min(b1, b2 * kernel)

    return min(shapes, key=cost)


class KronaDelta(Kronecker):
    """One site's factors.

    Args:
        ref: the weight, `(*batch, out, in)`.
        shape: (a1, a2). scale: s.
    """

    def __init__(self, ref: WeightRef, shape: tuple[int, int], scale: float) -> None:
        super().__init__(ref)
        self.scale = scale
        *batch, out, inp = ref.shape
        bound = 1 / math.sqrt(shape[1])  # kaiming-uniform with a = sqrt 5
        a = torch.empty(*batch, *shape, device=ref.device).uniform_(-bound, bound)
        b = torch.zeros(*batch, out // shape[0], inp // shape[1], device=ref.device)  # a convolution's with its kernel
        self.a = self.tensor("krona_A", a, leaf=None)
        self.b = self.tensor("krona_B", b, leaf=None)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.a.weight, self.b.weight


@register
@dataclass
class KronaConfig(TargetedConfig):
    """KronA's configuration.

    Args:
        a_shape: (a1, a2), the shape of A; a1 divides `out` and a2 divides `in` of every target. None takes the
            shape with the fewest numbers.
        scale: s, a constant factor on the change.
        a_shape_pattern: path, path ending or regular expression -> (a1, a2).

    Raises:
        ConfigError: a value is out of range, or a shape does not divide a target's weight.
    """

    a_shape: list[int] | tuple[int, int] | None = None
    scale: float = 16.0
    a_shape_pattern: dict[str, list[int] | tuple[int, int]] | None = field(default_factory=dict)

    method: ClassVar[str] = "KRONA"
    summary: ClassVar[str] = "a Kronecker product of two matrices"
    paper: ClassVar[str] = "arXiv 2212.10650"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.a_shape_pattern = self.a_shape_pattern or {}
        for shape in (self.a_shape, *self.a_shape_pattern.values()):
            whole = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in shape)
            if shape is not None and not (whole and len(shape) == 2):
                raise ConfigError(f"a_shape must be two whole numbers of at least 1, not {shape!r}")
        if not self.scale:
            raise ConfigError("scale must not be 0: the adapter would change nothing")

    def sites(self, model: nn.Module) -> list[Site]:
        sites = super().sites(model)
        check_patterns(self.a_shape_pattern or {}, [site.name for site in sites], "a_shape_pattern")
        return sites

    def build(self, ref: WeightRef, site: Site) -> Edit:
        kernel = math.prod(ref.raw_shape[2:]) if isinstance(ref.op, ConvOp) else 1
        out, inp = ref.shape[-2], ref.shape[-1] // kernel
        shape = pattern_value(self.a_shape_pattern or {}, site.name, self.a_shape) or smallest(out, inp, kernel)
        for n, size, what in zip(shape, (out, inp), ("output", "input"), strict=True):
            if size % n:
                near = sorted(divisors(size), key=lambda d: abs(d - n))[:3]
                raise ConfigError(
                    f"a_shape {tuple(shape)} does not divide {site.name!r}: {n} does not divide its {what} size "
                    f"{size}; the nearest that do are {', '.join(map(str, near))}"
                )
        return KronaDelta(ref, (shape[0], shape[1]), self.scale)
