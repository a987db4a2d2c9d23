"""Intrinsic SAID: Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning (arXiv 2012.13255).

    W_i = W_i0 + λ_i · P_i(v)        v: (d - m) for m weights, shared by all of them; λ_i: one number

The whole update lives in a space of d numbers. P_i is a fixed random map from v to the D = out · in numbers of weight
i, the Fastfood transform: with L the power of two that holds both D and v, H the Hadamard matrix, S random signs, Π a
permutation and G standard normal numbers,

    P(v) = (H G Π H S pad_L(v))[:D] / sqrt(D ΣG²)

which keeps ‖v‖ in expectation and costs O(L log L). v starts at zero. Without `structure_aware` there is no λ (DID,
arXiv 1804.08838). S, Π and G follow from a seed and the weight's place, and are not saved.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltatune.config import TargetedConfig, register
from deltatune.core.bank import Bank
from deltatune.core.edits import Delta, Edit
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError

#: bits of the index that one matrix product of the Hadamard transform takes
BITS = 6


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def hadamard_matrix(bits: int) -> Tensor:
    """The unnormalised Hadamard matrix of `2**bits` rows, its top-left corners the smaller ones."""
    h = torch.ones(1, 1, device="cpu")
    for _ in range(bits):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def hadamard(x: Tensor, h: Tensor) -> Tensor:
    """H x for `x: (2**k,)`; `h` is the matrix of `2**BITS` rows.

    H is a Kronecker product over the index's bits: each product takes the lowest bits and moves them to the top, so
    that at the end all of them are in place again.
    """
    left = x.numel().bit_length() - 1
    while left:
        bits = min(BITS, left)
        x = (x.view(-1, 1 << bits) @ h[: 1 << bits, : 1 << bits]).mT.reshape(-1)
        left -= bits
    return x


class SaidBank(Bank):
    """What all sites share: v `(n,)` and the Hadamard matrix."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.v = self.tensor("said_v", torch.zeros(n), leaf=None)
        self.h = self.tensor("said_hadamard", hadamard_matrix(BITS), leaf=None, buffer=True, saved=False)


class SaidDelta(Delta):
    """One weight's projection of v.

    Args:
        ref: the weight, `(*batch, out, in)`. bank: v.
        seed: S, Π and G follow from it. scaled: λ trains.
    """

    def __init__(self, ref: WeightRef, bank: SaidBank, seed: int, scaled: bool) -> None:
        super().__init__(ref)
        self.bank = bank
        n, size = bank.v.weight.numel(), ref.shape.numel()
        short, length = power_of_two(n), power_of_two(max(n, size))
        # real numbers on any device and while loading: no file holds them
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (n,), generator=generator, device="cpu", dtype=torch.int8) * 2 - 1
        permutation = torch.randperm(length, generator=generator, device="cpu")
        gauss = torch.randn(length, generator=generator, device="cpu")
        gauss /= math.sqrt(size) * gauss.norm()
        frozen = {"leaf": None, "buffer": True, "saved": False}
        self.signs = self.tensor("said_signs", signs, **frozen)
        # H S pad(v) repeats with the period of v's own padding, so its Π needs the places within one period only
        self.places = self.tensor("said_places", (permutation % short).int(), **frozen)
        self.gauss = self.tensor("said_gauss", gauss, **frozen)
        self.scale = self.tensor("said_lambda", torch.ones(1), leaf=None) if scaled else None

    def change(self) -> Tensor:
        """λ P(v), `(*batch, out, in)` in float32."""
        signs = self.signs.weight
        v, h = self.bank.v.weight.to(signs.device).float(), self.bank.h.weight.to(signs.device).float()
        if self.scale is not None:  # on v and not on P(v), so that nothing of the weight's size is kept for backward
            v = self.scale.weight.float() * v
        v = torch.nn.functional.pad(v * signs, (0, power_of_two(len(v)) - len(v)))
        mixed = hadamard(v, h).index_select(0, self.places.weight) * self.gauss.weight.float()
        return hadamard(mixed, h)[: self.ref.shape.numel()].view(self.ref.shape)

    def merged(self, w: Tensor) -> Tensor:
        return w + self.change().to(w.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.ref.apply(x, self.change())


@register
@dataclass
class SaidConfig(TargetedConfig):
    """The configuration of Intrinsic SAID. The paper reparametrises every weight: `target_modules="all-linear"`.

    Args:
        d: how many numbers train in all, the λ included.
        structure_aware: one λ per weight (SAID); False for none (DID).
        projection_prng_key: seed of the random projections; they are made again from it at loading.

    Raises:
        ConfigError: d is out of range for the chosen weights.
    """

    d: int = 20000
    structure_aware: bool = True
    projection_prng_key: int = 0

    method: ClassVar[str] = "SAID"
    summary: ClassVar[str] = "one vector for the whole model, projected onto every weight"
    paper: ClassVar[str] = "arXiv 2012.13255"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d", "projection_prng_key"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        if self.d < 1:
            raise ConfigError(f"d must be at least 1, not {self.d}")

    @classmethod
    def example(cls, **fields: object) -> SaidConfig:
        return cls(**{"d": 24, **fields})  # type: ignore[arg-type]

    def bank(self, weights: Sequence[tuple[WeightRef, Site]]) -> SaidBank:
        scales = len(weights) if self.structure_aware else 0
        numbers = sum(ref.shape.numel() for ref, _ in weights)
        if self.d <= scales:
            raise ConfigError(f"d={self.d} leaves no vector beside one λ for each of {scales} weights; raise d")
        if self.d > numbers:
            raise ConfigError(f"d={self.d} is more than the {numbers} numbers of the chosen weights; lower d")
        return SaidBank(self.d - scales)

    def build_shared(self, ref: WeightRef, site: Site, bank: Bank) -> Edit:
        assert isinstance(bank, SaidBank)
        seed = zlib.crc32(f"{self.projection_prng_key} {site.name} {ref.place}".encode())
        return SaidDelta(ref, bank, seed, self.structure_aware)
