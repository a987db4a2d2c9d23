"""Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices (arXiv 2309.02411).

    A', B' from the optimiser's step t on A, B;    t > K:   W ← W + λ s (B' A' - B A)

W moves with the pair's change, without a gradient, an optimiser state or weight decay of its own. No dropout stands in
front of A, since the gradient of W would then not be that of the product. Relative to the start the whole change is
(1 + λ) s B_T A_T - λ s B_K A_K, of rank at most 2r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.core.sharded import fill, whole
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._base import changed, deltas_of, weights_of, where, write_changed
from deltatune.schedules._optimizer import check_own_weights
from deltatune.schedules._pairs import factors, pairs_of
from deltatune.schedules._restart import warn_of_rounding
from deltatune.schedules.base import Procedure, Run, Schedule, check_number, check_whole, procedure


@procedure
@dataclass
class DeltaLora(Procedure):
    """The base moves with the product's change.

    Args:
        ratio: λ, the base's move over the pair's; the paper has 2 (E2E, WebNLG) and 0.5 (XSum, GLUE).
        after: K, steps at the beginning in which the base stays.
    """

    ratio: float = 0.5
    after: int = 500

    name: ClassVar[str] = "delta_lora"
    summary: ClassVar[str] = "the base moves with the change of the pair's product"
    paper: ClassVar[str] = "arXiv 2309.02411"

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0)
        check_whole("after", self.after)
        if not self.ratio:
            raise ConfigError("ratio=0 would leave the base as it is; use plain LoRA, or the paper's 0.5 or 2")

    def check_total(self, total: int, config: Any = None) -> None:
        if self.after >= total:
            raise ConfigError(
                f"after={self.after} steps leave the base as it is in a run of {total} steps; use after={total // 5}"
            )

    def start(self, run: Run) -> Schedule:
        deltas_of(run, "Delta-LoRA")
        deltas = pairs_of(run, "Delta-LoRA")
        check_own_weights(run.optimizer, "Delta-LoRA")
        for delta in deltas:
            if delta.dropout:
                raise ConfigError(
                    f"Delta-LoRA has no dropout in front of A, and {where(delta)!r} has {delta.dropout}: with it the "
                    "base's gradient is not the product's; set lora_dropout=0"
                )
        warn_of_rounding(deltas, "Delta-LoRA")
        return DeltaLoraSchedule(run, self, deltas)

    @classmethod
    def example(cls) -> DeltaLora:
        return cls(after=3)


class DeltaLoraSchedule(Schedule):
    def __init__(self, run: Run, options: DeltaLora, deltas: list[LoraDelta]) -> None:
        super().__init__(run)
        self.options, self.deltas = options, deltas
        self._before: list[tuple[Tensor, Tensor]] = []

    def begin(self) -> None:
        if self.run.step > self.options.after:
            changed(self.run, "Delta-LoRA")

    def before_step(self) -> None:
        if self.run.step >= self.options.after:
            self._before = [(a.clone(), b.clone()) for a, b in map(factors, self.deltas)]

    def after_step(self) -> None:
        if self.run.step <= self.options.after:
            return
        changed(self.run, "Delta-LoRA")
        for delta, (a0, b0) in zip(self.deltas, self._before, strict=True):
            ref, (a, b) = delta.ref, factors(delta)
            full = whole(ref.load_full())
            # B' A' - B A as one product; the difference of two would lose its last digits
            move = torch.cat([b - b0, b0], -1) @ torch.cat([a, a - a0], -2)
            moved = ref.put(full, ref.take(full) + self.options.ratio * delta.scale * move)
            fill(ref.param, ref.stored(moved))
        self._before = []

    # ------------------------------------------------------------------ checkpoints and the end
    def base_tensors(self) -> Mapping[str, Tensor]:
        return weights_of(self.run.root, self.deltas)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin()

    def report(self) -> dict[str, Any]:
        """`moves`: steps in which the base moved; `max_rank`: what the rank of the whole change may be."""
        moves = max(self.run.step - self.options.after, 0)
        return {"moves": moves, "max_rank": (2 if self.options.after and moves else 1) * max(d.r for d in self.deltas)}

    def save(self, folder: Path) -> bool:
        if self.run.step <= self.options.after:
            return False
        write_changed(self.run.root, self.base_tensors().values(), folder, self.run.adapter)
        return True
