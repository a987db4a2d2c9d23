"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (arXiv 2106.04647).

    y = x W + b        W = Σ_{i=1..n} A_i ⊗ (s_i t_i)        A_i: (n, n), s_i: (in/n, k), t_i: (k, out/n)

A bottleneck adapter whose two maps are sums of Kronecker products. The rule A is shared by all maps of the model and
counted once; a map keeps s, t and b. Compacter stands after attention and after the feed-forward part, Compacter++
after the latter alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.bank import Bank
from deltatune.core.edits import Edit, Slot
from deltatune.core.sites import Site
from deltatune.errors import ConfigError
from deltatune.methods.bottleneck import BottleneckConfig


class Rule(Bank):
    """The n matrices A_i that every map shares, `(n, n, n)`."""

    def __init__(self, n: int, spread: float) -> None:
        super().__init__()
        self.a = self.tensor("phm_rule", torch.randn(n, n, n) * spread, leaf=None)


class Phm:
    """A map `(…, in) -> (…, out)`; tensors `<name>_left`, `<name>_right` and `<name>.bias` of an edit."""

    def __init__(self, edit: Edit, name: str, inp: int, out: int, config: CompacterConfig, rule: Slot) -> None:
        n, k = config.phm_dim, config.phm_rank
        for size in (inp, out):
            if size % n:
                raise ConfigError(
                    f"phm_dim={n} does not divide {size}, one side of a map of {inp} to {out} features; choose a "
                    "divisor of the model's width and of width / reduction_factor"
                )
        self.rule, self.factored = rule, config.factorized_phm_W
        if self.factored:
            self.left = edit.tensor(f"{name}_left", glorot(n, inp // n, k), leaf=None)
            self.right = edit.tensor(f"{name}_right", glorot(n, k, out // n), leaf=None)
        else:
            self.left = edit.tensor(f"{name}_whole", glorot(n, inp // n, out // n), leaf=None)
        self.bias = edit.tensor(name, torch.zeros(out), leaf="bias")

    def matrix(self) -> Tensor:
        """W, `(in, out)`."""
        b = self.left.weight @ self.right.weight if self.factored else self.left.weight  # (n, in/n, out/n)
        w = torch.einsum("ipq,iab->paqb", self.rule.weight.to(b.dtype), b)
        return w.reshape(w.shape[0] * w.shape[1], -1)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.matrix() + self.bias.weight


def glorot(n: int, rows: int, columns: int) -> Tensor:
    """n matrices, uniform with gain √2."""
    bound = math.sqrt(2) * math.sqrt(6 / (rows + columns))
    return nn.init.uniform_(torch.empty(n, rows, columns), -bound, bound)


@register
@dataclass
class CompacterConfig(BottleneckConfig):
    """Compacter: two adapters in every layer.

    Args:
        phm_dim: n; it divides the width and the number of units. phm_rank: k.
        shared_phm_rule: one rule for the whole model; False gives every map its own.
        factorized_phm_W: s t in place of a whole `(in/n, out/n)` matrix.
        phm_init_range: spread of A at the start.
    """

    reduction_factor: float | dict[str, float] = 32
    non_linearity: str = "gelu_new"
    train_layer_norms: bool = True
    phm_dim: int = 4
    phm_rank: int = 1
    shared_phm_rule: bool = True
    factorized_phm_W: bool = True  # noqa: N815  (as the library `adapters` spells it)
    phm_init_range: float = 1e-4

    method: ClassVar[str] = "COMPACTER"
    summary: ClassVar[str] = "bottleneck adapters made of Kronecker products"
    paper: ClassVar[str] = "arXiv 2106.04647"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("phm_dim", "phm_rank"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")

    @classmethod
    def example(cls, **fields: Any) -> CompacterConfig:
        return cls(**{"reduction_factor": 4, "phm_dim": 2, "phm_init_range": 0.1, **fields})

    def sites(self, model: nn.Module) -> list[Site]:
        self.__dict__["_rule"] = None
        return super().sites(model)

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        before = self.__dict__["_rule"]
        made = super().build_module(module, site)
        rule = self.__dict__["_rule"]
        assert isinstance(made, Edit)
        return [rule, made] if self.shared_phm_rule and before is None and rule is not None else made

    def maps(self, edit: Edit, read: int, m: int, size: int) -> tuple[Any, Any]:
        return (
            Phm(edit, "bottleneck_down", read, m, self, self._rule_for(edit, "down")),
            Phm(edit, "bottleneck_up", m, size, self, self._rule_for(edit, "up")),
        )

    def _rule_for(self, edit: Edit, which: str) -> Slot:
        if not self.shared_phm_rule:
            n = self.phm_dim
            return edit.tensor(f"phm_rule_{which}", torch.randn(n, n, n) * self.phm_init_range, leaf=None)
        if self.__dict__["_rule"] is None:
            self.__dict__["_rule"] = Rule(self.phm_dim, self.phm_init_range)
        slot: Slot = self.__dict__["_rule"].a
        return slot


@register
@dataclass
class CompacterPlusPlusConfig(CompacterConfig):
    """Compacter++: after the feed-forward part only."""

    mh_adapter: bool = False

    method: ClassVar[str] = "COMPACTER_PP"
    summary: ClassVar[str] = "as Compacter, one per layer"
