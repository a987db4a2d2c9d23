"""LoRA-Pro: Are Low-Rank Adapters Properly Optimized? (arXiv 2407.18242).

A step (h_A, h_B) of the pair moves W by the equivalent gradient g̃ = s (B h_A + h_B A). Of all steps, these give the g̃
nearest to the gradient G of the whole weight, although only g_A = s Bᵀ G and g_B = s G Aᵀ are known:

    h_A = (Bᵀ B)⁻¹ g_A / s² + X A        h_B = (I - B (Bᵀ B)⁻¹ Bᵀ) g_B (A Aᵀ)⁻¹ / s² - B X

X leaves g̃ as it is and is chosen to keep h near g:  Bᵀ B X + X A Aᵀ = -(Bᵀ B)⁻¹ g_A Aᵀ / s².  While B is zero,
h_A = 0 and h_B = g_B (A Aᵀ)⁻¹ / s².

    form "adam"       moments m, v of the whole g̃;  u = m̂ / (√v̂ + ε);  then h from s Bᵀ u and s u Aᵀ;  A, B -= η h
    form "gradients"  h in place of the gradients; SGD then makes the paper's step, any other optimiser its own

The form "adam" makes the step of the pairs itself, at the rates and the weight decay of the caller's groups, and keeps
two numbers per entry of each adapted weight: no memory is saved there. The form "gradients" keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltatune.core.sharded import fill, whole
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._optimizer import check_own_weights, rate_of
from deltatune.schedules._pairs import factors, gradients, names_of, pairs_of, ridge, set_gradients
from deltatune.schedules.base import Procedure, Run, Schedule, check_number, procedure


@procedure
@dataclass
class LoraPro(Procedure):
    """Adjusted gradients.

    Args:
        form: "adam" or "gradients".
        beta1, beta2, epsilon: of the moments in form "adam".
    """

    form: Literal["adam", "gradients"] = "adam"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    name: ClassVar[str] = "lora_pro"
    summary: ClassVar[str] = "steps of A and B whose product comes nearest to the whole weight's gradient"
    paper: ClassVar[str] = "arXiv 2407.18242"

    def __post_init__(self) -> None:
        if self.form not in ("adam", "gradients"):
            raise ConfigError(f"form must be 'adam' or 'gradients', not {self.form!r}")
        check_number("epsilon", self.epsilon, 0)
        for field in ("beta1", "beta2"):
            check_number(field, getattr(self, field), 0, 1)
            if getattr(self, field) == 1:
                raise ConfigError(f"{field}=1 would never take in a gradient; use less, as 0.9 and 0.999")

    def start(self, run: Run) -> Schedule:
        deltas = pairs_of(run, "LoRA-Pro")
        if self.form == "adam":
            check_own_weights(run.optimizer, "LoRA-Pro")
        return LoraProSchedule(run, self, deltas)

    @classmethod
    def example(cls) -> LoraPro:
        return cls(epsilon=1e-3)


def adjusted(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, s: float, near: bool = True
) -> tuple[Tensor, Tensor]:
    """(h_A, h_B) of a pair with these gradients.

    Args:
        near: choose X so that h stays near the gradients; False takes X = 0, which has the same g̃.
    """
    h_b = torch.linalg.solve(ridge(a @ a.mT), grad_b, left=False) / s**2
    if not b.any():
        return torch.zeros_like(grad_a), h_b
    inverse = torch.linalg.pinv(ridge(b.mT @ b), hermitian=True)
    h_a = inverse @ grad_a / s**2
    h_b = h_b - b @ (inverse @ (b.mT @ h_b))
    if near:
        x = sylvester(b.mT @ b, a @ a.mT, -h_a @ a.mT)
        h_a, h_b = h_a + x @ a, h_b - b @ x
    return h_a, h_b


def sylvester(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """X with P X + X Q = C, for symmetric P and Q without negative eigenvalues."""
    (values_p, u), (values_q, v) = torch.linalg.eigh(p), torch.linalg.eigh(q)
    sums = values_p.clamp(min=0)[..., :, None] + values_q.clamp(min=0)[..., None, :]
    turned = u.mT @ c @ v / sums.clamp(min=torch.finfo(p.dtype).tiny)
    x: Tensor = u @ turned @ v.mT
    return x


class LoraProSchedule(Schedule):
    """
    Attributes:
        moments: name of a pair -> (m, v) of its equivalent gradient.
    """

    def __init__(self, run: Run, options: LoraPro, deltas: list[LoraDelta]) -> None:
        super().__init__(run)
        self.options, self.deltas = options, dict(zip(names_of(deltas), deltas, strict=True))
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def before_step(self) -> None:
        for name, delta in self.deltas.items():
            found = gradients(delta)
            if found is None:
                continue
            (a, b), (grad_a, grad_b), s = factors(delta), found, delta.scale
            if self.options.form == "gradients":
                set_gradients(delta, *adjusted(a, b, grad_a, grad_b, s))
                continue
            h_a, h_b = adjusted(a, b, grad_a, grad_b, s, near=False)
            u = self._direction(name, s * (b @ h_a + h_b @ a))
            self._move(delta, *adjusted(a, b, s * (b.mT @ u), s * (u @ a.mT), s))

    def _direction(self, name: str, g: Tensor) -> Tensor:
        """Adam's, from the moments of an equivalent gradient."""
        options, t = self.options, self.run.step + 1
        m, v = self.moments.setdefault(name, (torch.zeros_like(g), torch.zeros_like(g)))
        m.lerp_(g, 1 - options.beta1)
        v.lerp_(g * g, 1 - options.beta2)
        return (m / (1 - options.beta1**t)) / ((v / (1 - options.beta2**t)).sqrt() + options.epsilon)

    def _move(self, delta: LoraDelta, h_a: Tensor, h_b: Tensor) -> None:
        """The step of a pair; its gradients go, so that the optimiser makes none and keeps no state."""
        packed = delta.ref.op.pack(delta.ref.module, h_a, h_b)
        for slot, h in zip((delta.lora_A, delta.lora_B), packed, strict=True):
            lr, decay = rate_of(self.run.optimizer, slot.weight)
            fill(slot.weight, whole(slot.weight) * (1 - lr * decay) - lr * h)
            slot.weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"moments": {name: list(pair) for name, pair in self.moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = {name: delta.ref.device for name, delta in self.deltas.items()}
        self.moments = {
            name: (m.to(device[name], copy=True), v.to(device[name], copy=True))
            for name, (m, v) in state["moments"].items()
        }
