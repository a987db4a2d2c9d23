"""VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).

    y = W x + b + λ_b · B (λ_d · A dropout(x))        A: (r, max in), B: (max out, r), λ_d: (r), λ_b: (out)

One random pair A, B is frozen and shared by all sites; each uses the first columns of A and rows of B that fit it and
trains two vectors. λ_b starts at zero, so the model starts as the base. Merged: W + diag(λ_b) B diag(λ_d) A. A and B
follow from a seed, so a checkpoint may leave them out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.bank import Bank
from deltatune.core.copies import ValueDelta
from deltatune.core.edits import Edit, LowRank
from deltatune.core.ops import VectorOp
from deltatune.core.sites import Site, trained_biases
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods._fields import check_probability, check_ranks


class VeraBank(Bank):
    """The shared pair of one adapter.

    Args:
        r: rank. out, inp: the largest of any site. seed: A and B follow from it. saved: write them to checkpoints.
    """

    def __init__(self, r: int, out: int, inp: int, seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        options = {"leaf": None, "buffer": True, "saved": saved}
        self.a = self.tensor("vera_A", _kaiming(r, inp, generator), **options)
        self.b = self.tensor("vera_B", _kaiming(out, r, generator), **options)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform with variance 2 / columns. Always real numbers: a file that leaves them out has nothing else."""
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)


class VeraDelta(LowRank):
    """One site's two vectors.

    Args:
        ref: the weight, `(*batch, out, in)`. bank: the shared pair.
        dropout: probability on the input, in training.
        start: what λ_d is filled with; None draws it, with λ_b at one (the model does not start as the base).
    """

    def __init__(self, ref: WeightRef, bank: VeraBank, r: int, dropout: float, start: float | None) -> None:
        super().__init__(ref)
        *batch, out, _ = ref.shape
        self.bank, self.dropout = bank, dropout
        d = torch.randn(*batch, r) if start is None else torch.full((*batch, r), start)
        b = torch.zeros(*batch, out) if start is not None else torch.ones(*batch, out)
        self.lambda_b = self.tensor("vera_lambda_b", b, leaf=None)
        self.lambda_d = self.tensor("vera_lambda_d", d, leaf=None)

    def shared(self) -> tuple[Tensor, Tensor]:
        """This site's part of A `(r, in)` and of B `(out, r)`."""
        out, inp = self.ref.shape[-2:]
        device = self.lambda_d.weight.device
        return self.bank.a.weight.to(device)[:, :inp], self.bank.b.weight.to(device)[:out]

    def factors(self) -> tuple[Tensor, Tensor]:
        d, b = self.lambda_d.weight, self.lambda_b.weight
        shared_a, shared_b = self.shared()
        # both vectors go to B's side: A needs no gradient then, and x is not kept for backward
        return shared_a.expand(*d.shape[:-1], -1, -1), b[..., None] * shared_b * d[..., None, :]

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        if torch.is_grad_enabled():
            return super().update(x, y)
        # with nothing to keep, scaling the activations is cheaper than scaling B
        change = self.ref.factored(self.drop(x), *self.shared(), self.lambda_d.weight)
        return change * self.ref.align(self.lambda_b.weight.to(change.dtype), change)

    def group(self) -> Hashable | None:
        return (LowRank, self.ref.place) if self.ref.bypass else None


@register
@dataclass
class VeraConfig(TargetedConfig):
    """VeRA's configuration, with peft's field names and defaults.

    Args:
        r: rank, >= 1; large ranks are cheap, since only `r + out` numbers train per site.
        projection_prng_key: seed of the shared matrices.
        save_projection: write the shared matrices too; without, the seed gives them at loading.
        vera_dropout: dropout on the update's input, in [0, 1).
        d_initial: what λ_d starts as.
        fan_in_fan_out: accepted for peft's sake; the storage order is read from the layer itself.
        bias: which biases train beside the vectors: `"none"`, `"all"`, `"vera_only"` (of adapted layers).
        init_weights: False draws λ_d and sets λ_b to one: the model does not start as the base; for tests.

    Raises:
        ConfigError: a value is out of range.
    """

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True

    method: ClassVar[str] = "VERA"
    summary: ClassVar[str] = "two vectors per weight around one random pair shared by all"
    paper: ClassVar[str] = "arXiv 2310.11454"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r, {})
        check_probability("vera_dropout", self.vera_dropout)
        if not isinstance(self.projection_prng_key, int):
            raise ConfigError(f"projection_prng_key must be a whole number, not {self.projection_prng_key!r}")
        if self.bias not in ("none", "all", "vera_only"):
            raise ConfigError(f'bias must be "none", "all" or "vera_only", not {self.bias!r}')

    @classmethod
    def example(cls, **fields: object) -> VeraConfig:
        return cls(**{"r": 4, **fields})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.exclude_modules:  # peft's files of this method have no such key
            values.pop("exclude_modules")
        return values

    def sites(self, model: nn.Module) -> list[Site]:
        weights = super().sites(model)
        if self.bias == "none":
            return weights
        return weights + trained_biases(model, self, [site.name for site in weights], self.bias == "all")

    def bank(self, weights: Sequence[tuple[WeightRef, Site]]) -> VeraBank:
        shapes = [ref.shape[-2:] for ref, _ in weights if not isinstance(ref.op, VectorOp)]
        out, inp = max(s[0] for s in shapes), max(s[1] for s in shapes)
        return VeraBank(self.r, out, inp, self.projection_prng_key, self.save_projection)

    def build_shared(self, ref: WeightRef, site: Site, bank: Bank) -> Edit | Sequence[Edit]:
        if isinstance(ref.op, VectorOp):
            return ValueDelta(ref)
        if self.vera_dropout and not ref.bypass:
            raise ConfigError(
                f"{site.name!r} reads its weight itself, so vera_dropout cannot reach its input; set it to 0 or "
                "leave this module out"
            )
        assert isinstance(bank, VeraBank)
        return VeraDelta(ref, bank, self.r, self.vera_dropout, self.d_initial if self.init_weights else None)
