"""Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models (arXiv 2402.02347).

    g_A ← (Bᵀ B + δ I)⁻¹ g_A        g_B ← g_B (A Aᵀ + δ I)⁻¹

The metric of the quotient space of pairs: an r × r matrix in front of each gradient, and the step no longer depends on
how a product is shared between its factors (A → R A, B → B R⁻¹ gives the same change of B A to first order). The
optimiser then does what it does: with SGD it is the paper's scaled GD, with AdamW scaled AdamW. Its cost is that of two
r × r systems, and there is no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltatune.errors import ConfigError
from deltatune.schedules._pairs import factors, gradients, pairs_of, ridge, set_gradients
from deltatune.schedules.base import Procedure, Run, Schedule, check_number, procedure


@procedure
@dataclass
class Riemannian(Procedure):
    """Preconditions the gradients of each pair.

    Args:
        delta: δ; it also bounds how far a pair with a small factor is stretched.
    """

    delta: float = 1e-6

    name: ClassVar[str] = "riemannian"
    summary: ClassVar[str] = "the gradient of each factor is scaled by the other factor's Gram matrix"
    paper: ClassVar[str] = "arXiv 2402.02347"

    def __post_init__(self) -> None:
        check_number("delta", self.delta, 0)
        if not self.delta:
            raise ConfigError("delta=0 would invert Bᵀ B while B is zero; the paper uses a small one, as 1e-6")

    def start(self, run: Run) -> Schedule:
        return RiemannianSchedule(run, self)


class RiemannianSchedule(Schedule):
    def __init__(self, run: Run, options: Riemannian) -> None:
        super().__init__(run)
        self.options, self.deltas = options, pairs_of(run, "Riemannian preconditioning")

    def before_step(self) -> None:
        for delta in self.deltas:
            found = gradients(delta)
            if found is None:
                continue
            (a, b), (grad_a, grad_b) = factors(delta), found
            grad_a = torch.linalg.solve(ridge(b.mT @ b, self.options.delta), grad_a)
            grad_b = torch.linalg.solve(ridge(a @ a.mT, self.options.delta), grad_b, left=False)
            set_gradients(delta, grad_a, grad_b)
