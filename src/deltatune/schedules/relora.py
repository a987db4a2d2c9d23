"""ReLoRA: High-Rank Training Through Low-Rank Updates (arXiv 2307.05695).

Every `cycle` steps:    W ← W + s B A        A ← fresh        B ← 0        moments of A and B pruned
                        and the learning rate rises again from 0 over `restart_warmup` steps

So the sum of many low-rank changes has a high rank, at the memory of one. The function does not change at a restart.
Everything that carries no adapter (embeddings, norms, the head) trains in full throughout, as the paper has it for
pre-training; `train_rest=False` leaves it frozen. A run may begin with ordinary training of all weights.

The learning rate is the caller's scheduler's times the factor of this file, so any course becomes a jagged one;
`curve="cosine"` is the paper's own course over the whole run, for optimisers whose rate is otherwise constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.core.adapters import AdapterSet
from deltatune.core.sites import base_parameters
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._base import (
    FullFirst,
    changed,
    check_trainable,
    fold_in,
    rest_of,
    write_changed,
)
from deltatune.schedules._optimizer import Reset, check_prunable, prune
from deltatune.schedules._restart import redraw, redrawable
from deltatune.schedules.base import Procedure, Rate, Run, Schedule, check_number, check_whole, procedure

#: shares of the moments that become zero, where nobody says otherwise (the paper's 0.999; the authors' advice, 0.9)
SHARES: dict[str, float] = {"zero": 1.0, "random": 0.999, "magnitude": 0.9}


@procedure
@dataclass
class ReLora(Procedure):
    """Restarts of a LoRA.

    Args:
        cycle: optimiser steps between two restarts.
        restart_warmup: steps over which the learning rate comes back after a restart.
        reset: what happens to the moments of A and B: all zero, random ones zero, or the smallest zero.
        prune: the share that becomes zero; by default 0.999 of random ones, 0.9 by magnitude.
        train_rest: train what carries no adapter (embeddings, norms, head) in full.
        warm_start: steps at the beginning in which all weights train and the adapter waits.
        warm_start_rate: learning rate of those steps over the one that follows.
        curve: "given" follows the caller's scheduler between restarts; "cosine" is the paper's jagged cosine.
        first_warmup, min_ratio: of "cosine": steps of the first warm-up, and the last rate over the highest.
    """

    cycle: int = 1000
    restart_warmup: int = 50
    reset: Reset = "magnitude"
    prune: float | None = None
    train_rest: bool = True
    warm_start: int = 0
    warm_start_rate: float = 0.5
    curve: Literal["given", "cosine"] = "given"
    first_warmup: int = 0
    min_ratio: float = 0.1

    name: ClassVar[str] = "relora"
    summary: ClassVar[str] = "fold the pair into the base and start a new one, again and again"
    paper: ClassVar[str] = "arXiv 2307.05695"

    def __post_init__(self) -> None:
        check_whole("cycle", self.cycle, 1)
        for field in ("restart_warmup", "warm_start", "first_warmup"):
            check_whole(field, getattr(self, field))
        if self.reset not in SHARES:
            raise ConfigError(f"reset must be one of {', '.join(SHARES)}, not {self.reset!r}")
        if self.curve not in ("given", "cosine"):
            raise ConfigError(f"curve must be 'given' or 'cosine', not {self.curve!r}")
        if self.prune is not None:
            check_number("prune", self.prune, 0, 1)
            if self.reset == "zero":
                raise ConfigError(
                    "prune is a share of the moments, and reset='zero' drops all; use random or magnitude"
                )
        check_number("warm_start_rate", self.warm_start_rate, 0)
        check_number("min_ratio", self.min_ratio, 0, 1)
        if self.restart_warmup >= self.cycle:
            raise ConfigError(
                f"restart_warmup={self.restart_warmup} is not shorter than cycle={self.cycle}, so the learning rate "
                "would never come back; make it shorter"
            )
        if self.curve == "given" and self.first_warmup:
            raise ConfigError("first_warmup belongs to curve='cosine'; with 'given' it is the scheduler's own warm-up")

    @property
    def switches(self) -> bool:
        return self.warm_start > 0

    @property
    def share(self) -> float:
        """Of the moments that become zero at a restart."""
        return SHARES[self.reset] if self.prune is None else self.prune

    def mark(self, root: nn.Module, adapters: AdapterSet | None, adapter: str) -> None:
        edits = adapters.edits[adapter] if adapters is not None and adapter else []
        for p in rest_of(root, edits).values() if self.train_rest else ():
            p.requires_grad_(True)
        if self.warm_start:
            for _, p in base_parameters(root):
                p.requires_grad_(p.is_floating_point())

    def start(self, run: Run) -> Schedule:
        deltas = redrawable(run, "ReLoRA")
        if self.warm_start:
            check_trainable(run, "ReLoRA's warm start")
        if self.curve == "cosine":
            run.need_total("curve='cosine'")
        return ReLoraSchedule(run, self, deltas)

    def check_total(self, total: int, config: Any = None) -> None:
        if self.warm_start + self.cycle >= total:
            rest = total - self.warm_start
            fix = f"use cycle={max(rest // 4, 1)}" if rest > 1 else "train longer"
            raise ConfigError(
                f"cycle={self.cycle} after warm_start={self.warm_start} steps leaves no restart in a run of {total} "
                f"steps; {fix}"
            )

    @classmethod
    def example(cls) -> ReLora:
        return cls(cycle=4, restart_warmup=1, warm_start=2)


def jagged_cosine(step: int, total: int, since: int, options: ReLora) -> float:
    """The paper's rate at a step, over the highest: a cosine to which every restart climbs back.

    Args:
        since: the step of the last restart, 0 before the first.
    """

    def cosine(t: float) -> float:
        progress = (t - options.first_warmup) / max(total - options.first_warmup, 1)
        return options.min_ratio + (1 - options.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1)))

    if step < options.first_warmup:
        return step / options.first_warmup
    if since and step < since + options.restart_warmup:
        return (step - since) / options.restart_warmup * cosine(since + options.restart_warmup)
    return cosine(step)


class ReLoraSchedule(Schedule):
    def __init__(self, run: Run, options: ReLora, deltas: list[LoraDelta]) -> None:
        super().__init__(run)
        self.options, self.deltas = options, deltas
        self.rest = rest_of(run.root, run.edits()) if options.train_rest else {}
        self.first = FullFirst(run, options.warm_start, self.rest.values())
        self.pair = [slot.weight for d in self.deltas for slot in (d.lora_A, d.lora_B)]

    def begin(self) -> None:
        self.first.choose()
        if self.options.warm_start or self.rest or self.restarts():
            changed(self.run, "ReLoRA")

    def since(self, step: int) -> int:
        """The step of the last restart (or of the end of the warm start) before the step under way; 0 before both."""
        start, cycle = self.options.warm_start, self.options.cycle
        return start + (step - start) // cycle * cycle if step >= start else 0

    def rate(self, param: Tensor) -> Rate | None:
        step, options = self.run.step, self.options
        since = self.since(step)
        if options.curve == "cosine":
            assert self.run.total is not None
            factor = jagged_cosine(step, self.run.total, since, options)
        else:
            factor = 1.0 if not since else min((step - since) / max(options.restart_warmup, 1), 1.0)
            factor = 1.0 if not options.restart_warmup else factor
        return Rate(factor * (options.warm_start_rate if self.first.going else 1.0))

    def after_step(self) -> None:
        done, options = self.run.step, self.options
        if done == 1 or done == options.warm_start + 1:
            check_prunable(self.run.optimizer, self.pair, options.reset)
        if (
            not self.first.after_step()
            and done > options.warm_start
            and done != self.run.total
            and self.since(done) == done
        ):
            self.restart((done - options.warm_start) // options.cycle)
        self.run.logs["restarts"] = self.restarts()

    def restarts(self) -> int:
        """How many there have been; none comes after the last step."""
        steps = self.run.step - self.options.warm_start
        return max(steps - (self.run.step == self.run.total), 0) // self.options.cycle

    @torch.no_grad()
    def restart(self, number: int) -> None:
        """Folds the pairs into the base and draws new ones."""
        changed(self.run, "ReLoRA")
        fold_in(self.deltas)
        seed = redraw(self.run, self.deltas, number)
        generator = torch.Generator().manual_seed(seed)
        prune(self.run.optimizer, self.pair, self.options.reset, self.options.share, generator)

    # ------------------------------------------------------------------ checkpoints and the end
    def base_tensors(self) -> Mapping[str, Tensor]:
        if self.options.warm_start:
            return self.first.base
        taken = {id(d.ref.param) for d in self.deltas}
        return {**{n: p for n, p in self.first.base.items() if id(p) in taken}, **self.rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin()

    def report(self) -> dict[str, Any]:
        """`restarts`: how many there were; `max_rank`: what the rank of the whole change may be."""
        return {"restarts": self.restarts(), "max_rank": (self.restarts() + 1) * max(d.r for d in self.deltas)}

    def save(self, folder: Path) -> bool:
        write_changed(self.run.root, self.base_tensors().values(), folder, self.run.adapter)
        return True
