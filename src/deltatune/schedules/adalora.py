"""AdaLoRA's budget (arXiv 2303.10512): which triplets of the method live, decided over the whole model.

After each optimiser step t, for every parameter p of a triplet (A_i, E_i, B_i):

    I = |p · ∂L/∂p|        Ī ← β1 Ī + (1-β1) I        U ← β2 U + (1-β2) |I - Ī|        s(p) = Ī · U
    S_i = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

The b(t) triplets with the largest S over all weights keep their E, the others' is set to zero. With T steps,

    b(t) = b_0                                                    t ≤ t_init
    b(t) = b_T + (b_0 - b_T) (1 - (t-t_init)/(T-t_final-t_init))³    t < T - t_final, every deltaT steps
    b(t) = b_T                                                    from then on, every step, with frozen S

`L` includes c · mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖), which the schedule adds by itself: its gradient joins the task's right
before the optimiser's step, once for all micro-batches, and after clipping (the norm's gradient is bounded by itself).
Where the paper cuts at a threshold, exactly b(t) triplets are kept here, also among equal scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.core.sharded import part_like, whole
from deltatune.errors import ConfigError
from deltatune.methods.adalora import AdaLoraConfig, AdaLoraDelta, orthogonality, shrink, triplets
from deltatune.schedules._optimizer import check_own_weights
from deltatune.schedules.base import Procedure, Run, Schedule, procedure


@procedure
@dataclass
class AdaLora(Procedure):
    """Comes with every `AdaLoraConfig` by itself; its options are that configuration's fields."""

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "the rank budget of AdaLoRA moves to the weights where it matters"
    paper: ClassVar[str] = "arXiv 2303.10512"

    def check_total(self, total: int, config: Any = None) -> None:
        if isinstance(config, AdaLoraConfig):
            config.for_total(total)

    def start(self, run: Run) -> Schedule:
        config = run.adapters.configs[run.adapter] if run.adapters is not None and run.adapter else None
        if not isinstance(config, AdaLoraConfig):
            raise ConfigError(
                "procedure 'adalora' allots the triplets of an AdaLoRA adapter; use method ADALORA (AdaLoraConfig)"
            )
        if config.rank_pattern:
            raise ConfigError(
                "this AdaLoRA adapter's ranks are final already (rank_pattern); train it without a budget"
            )
        check_own_weights(run.optimizer, "AdaLoRA")
        total = run.total if run.total is not None else config.total_step
        if total is None:
            raise ConfigError(
                "AdaLoRA's budget needs the number of optimiser steps of the whole run: give attach total_steps, or "
                "AdaLoraConfig total_step"
            )
        config.for_total(total)
        return AdaLoraSchedule(run, config)

    @classmethod
    def example_method(cls) -> dict[str, Any]:
        fields = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 2, "deltaT": 2, "lora_alpha": 8}
        return {"peft_type": "ADALORA", "target_modules": ["q_proj", "v_proj"], **fields}


def budget(config: AdaLoraConfig, t: int, first: int, last: int) -> int:
    """b(t): how many triplets live after step t; `first` at the start, `last` at the end."""
    assert config.total_step is not None
    start, end = config.tinit, config.total_step - config.tfinal
    if t <= start:
        return first
    if t >= end:
        return last
    return int(last + (first - last) * (1 - (t - start) / (end - start)) ** 3)


class AdaLoraSchedule(Schedule):
    def __init__(self, run: Run, config: AdaLoraConfig) -> None:
        super().__init__(run)
        self.config = config
        assert run.adapters is not None
        self.deltas: dict[str, AdaLoraDelta] = triplets(run.adapters, run.adapter)
        self.first = config.init_r * len(self.deltas)
        self.last = config.target_r * len(self.deltas)
        #: `<key>/<A, E or B>` -> (Ī, U)
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}

    def penalty(self) -> Tensor | None:
        if not self.config.orth_reg_weight:
            return None
        term = self.config.orth_reg_weight * orthogonality(self.deltas.values())
        self.run.logs["orthogonality"] = float(term.detach())
        return term

    def after_step(self) -> None:
        t, config = self.run.step, self.config
        assert config.total_step is not None
        final = t >= config.total_step - config.tfinal
        if not final or not self.averages:
            self._observe()
        if t > config.tinit and (final or t % config.deltaT == 0):
            self._mask(budget(config, t, self.first, self.last))
        self.run.logs["budget"] = budget(config, t, self.first, self.last)

    def _observe(self) -> None:
        for key, delta in self.deltas.items():
            for part, slot in (("A", delta.lora_A), ("E", delta.lora_E), ("B", delta.lora_B)):
                p: Any = slot.weight
                if p.grad is None:
                    raise ConfigError(
                        f"{key} has no gradient at the optimiser's step, so its importance cannot be known; clear "
                        "gradients after the step, and let every adapted layer take part in the loss"
                    )
                now = (p.detach() * p.grad).abs().float()
                mean, spread = self.averages.get(f"{key}/{part}") or (torch.zeros_like(now), torch.zeros_like(now))
                mean = self.config.beta1 * mean + (1 - self.config.beta1) * now
                spread = self.config.beta2 * spread + (1 - self.config.beta2) * (now - mean).abs()
                self.averages[f"{key}/{part}"] = (mean, spread)

    def scores(self) -> dict[str, Tensor]:
        """S of every triplet, `(r,)` per weight."""

        def score(key: str) -> Tensor:
            mean, spread = self.averages[key]
            return whole(mean * spread)

        return {
            key: score(f"{key}/E").mean(1) + score(f"{key}/A").mean(1) + score(f"{key}/B").mean(0)
            for key in self.deltas
        }

    def _mask(self, keep: int) -> None:
        scores = self.scores()
        if keep >= sum(map(len, scores.values())):
            return
        order = torch.cat([s.cpu() for s in scores.values()]).argsort(descending=True, stable=True)
        alive = torch.zeros(len(order), dtype=torch.bool)
        alive[order[:keep]] = True
        for delta, part in zip(
            self.deltas.values(), torch.split(alive, [len(s) for s in scores.values()]), strict=True
        ):
            delta.mask(part)

    # ------------------------------------------------------------------ checkpoints and the end
    def state_dict(self) -> dict[str, Any]:
        return {"averages": {k: (whole(m), whole(u)) for k, (m, u) in self.averages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = {}
        for key, delta in self.deltas.items():
            for part, slot in (("A", delta.lora_A), ("E", delta.lora_E), ("B", delta.lora_B)):
                pair = state["averages"].get(f"{key}/{part}")
                if pair is not None:
                    mean, spread = (part_like(t, slot.weight) for t in pair)
                    self.averages[f"{key}/{part}"] = (mean, spread)

    def finish(self) -> None:
        assert self.run.adapters is not None
        if not any(hasattr(d.lora_E.weight, "device_mesh") for d in self.deltas.values()):
            shrink(self.run.adapters, self.run.adapter)

    def report(self) -> dict[str, Any]:
        """`ranks`: path of a weight -> how many of its triplets live."""
        ranks = {
            key.rpartition(".")[0]: int((whole(d.lora_E.weight.detach()) != 0).sum()) for key, d in self.deltas.items()
        }
        return {"ranks": ranks, "budget": self.last}

    def draw(self, folder: Path) -> list[Path]:
        from deltatune.schedules._ranks import draw_ranks

        return [draw_ranks(self.report()["ranks"], self.config.init_r, folder / "ranks.png")]
