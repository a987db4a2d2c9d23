"""PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization (arXiv 2402.16141).

At the end of every stage:    W ← W + m s B A        the optimiser's state of the pair and the rate's course begin anew

    m = 1                   A ← fresh, B ← 0            the function does not change
    m < 1, keeps="function"      B ← (1 - m) B          the function does not change
    m < 1, keeps="momentum"      A, B ← (1 - m) A, B    it moves by -m (1 - m) s B A, the form of a re-implementation

With m < 1 part of what a stage has learned stays in the pair, so a noisy last step is not kept whole. Unlike ReLoRA it
is for fine-tuning: nothing but the pair trains, and every stage has a whole learning-rate course of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltatune.core.sharded import fill, whole
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._base import changed, fold_in, weights_of, write_changed
from deltatune.schedules._optimizer import check_forgets, forget
from deltatune.schedules._restart import Curve, check_curve, course, redraw, redrawable
from deltatune.schedules.base import Procedure, Rate, Run, Schedule, check_number, check_whole, procedure


@procedure
@dataclass
class PeriodicLora(Procedure):
    """Stages of one pair.

    Args:
        stage: optimiser steps of a stage.
        unload: m, the share of the pair that goes into the base at the end of a stage.
        keeps: what the rest in the pair keeps where m < 1: the "function" or the "momentum".
        curve: the rate's course in each stage, times the caller's scheduler: down to 0 by a "linear" or a "cosine",
            or "given", which leaves it to the scheduler.
        warmup: steps at the beginning of a stage over which the rate rises.
    """

    stage: int = 500
    unload: float = 1.0
    keeps: Literal["function", "momentum"] = "function"
    curve: Curve = "linear"
    warmup: int = 0

    name: ClassVar[str] = "periodic_lora"
    summary: ClassVar[str] = "stages: the pair goes into the base, and optimiser and rate begin anew"
    paper: ClassVar[str] = "arXiv 2402.16141"

    def __post_init__(self) -> None:
        check_whole("stage", self.stage, 1)
        check_whole("warmup", self.warmup)
        check_number("unload", self.unload, 0, 1)
        check_curve(self.curve)
        if not self.unload:
            raise ConfigError("unload=0 would leave the base as it is; use plain LoRA, or a share such as 0.1")
        if self.keeps not in ("function", "momentum"):
            raise ConfigError(f"keeps must be 'function' or 'momentum', not {self.keeps!r}")
        if self.warmup >= self.stage:
            raise ConfigError(f"warmup={self.warmup} fills the whole stage={self.stage}; use {self.stage // 10}")

    def check_total(self, total: int, config: Any = None) -> None:
        if self.stage >= total:
            raise ConfigError(
                f"stage={self.stage} leaves no unloading in a run of {total} steps; use stage={max(total // 4, 1)}"
            )

    def start(self, run: Run) -> Schedule:
        deltas = redrawable(run, "PeriodicLoRA")
        check_forgets(run.optimizer)
        return PeriodicLoraSchedule(run, self, deltas)

    @classmethod
    def example(cls) -> PeriodicLora:
        return cls(stage=4, warmup=1)


class PeriodicLoraSchedule(Schedule):
    def __init__(self, run: Run, options: PeriodicLora, deltas: list[LoraDelta]) -> None:
        super().__init__(run)
        self.options, self.deltas = options, deltas

    def begin(self) -> None:
        if self.unloadings():
            changed(self.run, "PeriodicLoRA")

    def rate(self, param: Tensor) -> Rate | None:
        stage = self.options.stage
        return Rate(course(self.run.step % stage, stage, self.options.curve, self.options.warmup))

    def after_step(self) -> None:
        done = self.run.step
        if done % self.options.stage == 0 and done != self.run.total:
            self.unload(done // self.options.stage)
        self.run.logs["unloadings"] = self.unloadings()

    def unloadings(self) -> int:
        """How many there have been; none comes after the last step."""
        return max(self.run.step - (self.run.step == self.run.total), 0) // self.options.stage

    @torch.no_grad()
    def unload(self, number: int) -> None:
        """Moves the share m of the pairs into the base and begins a stage."""
        m, options = self.options.unload, self.options
        pairs = [(d, whole(d.lora_A.weight).clone(), whole(d.lora_B.weight).clone()) for d in self.deltas]
        for delta, _, b in pairs:
            fill(delta.lora_B.weight, m * b)
        changed(self.run, "PeriodicLoRA")
        fold_in(self.deltas)
        for delta, a, b in pairs:
            fill(delta.lora_B.weight, (1 - m) * b)
            if options.keeps == "momentum":
                fill(delta.lora_A.weight, (1 - m) * a)
        if m == 1:  # a pair of zeros would never train again
            redraw(self.run, self.deltas, number)
        forget(self.run.optimizer, [slot.weight for d in self.deltas for slot in (d.lora_A, d.lora_B)])

    # ------------------------------------------------------------------ checkpoints and the end
    def base_tensors(self) -> Mapping[str, Tensor]:
        return weights_of(self.run.root, self.deltas)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin()

    def report(self) -> dict[str, Any]:
        """`unloadings`: how many there were; `max_rank`: what the rank of the whole change may be."""
        return {"unloadings": self.unloadings(), "max_rank": (self.unloadings() + 1) * max(d.r for d in self.deltas)}

    def save(self, folder: Path) -> bool:
        if not self.unloadings():
            return False
        write_changed(self.run.root, self.base_tensors().values(), folder, self.run.adapter)
        return True
