"""Full fine-tuning first, then LoRA: all weights train for a share ρ of the run, an adapter on the result for the rest.

    steps [0, ρT):   W trains, the adapter waits at zero        steps [ρT, T):   W is frozen, the adapter trains

The function does not change at the switch; the optimiser's state of W is freed there, and the learning rate rises from
0 again. No publication states this rule; its nearest relative is ReLoRA's warm start (arXiv 2307.05695, a quarter of
the run). Peak memory is that of full fine-tuning. ρ = 0 is LoRA, ρ = 1 full fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.core.adapters import AdapterSet
from deltatune.core.sites import base_parameters
from deltatune.errors import ConfigError
from deltatune.schedules._base import FullFirst, changed, check_trainable, write_changed
from deltatune.schedules.base import Procedure, Rate, Run, Schedule, check_number, check_whole, procedure


@procedure
@dataclass
class FullThenLora(Procedure):
    """The hybrid schedule, for any method that starts as the base.

    Args:
        share: ρ, of the run's steps in which all weights train.
        full_rate: learning rate of those steps over the one that follows.
        warmup: steps over which the learning rate comes back after the switch.
    """

    share: float = 0.2
    full_rate: float = 0.1
    warmup: int = 50

    name: ClassVar[str] = "full_then_lora"
    summary: ClassVar[str] = "all weights for the first steps, then an adapter on the result"

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, 1)
        check_number("full_rate", self.full_rate, 0)
        check_whole("warmup", self.warmup)

    @property
    def switches(self) -> bool:
        return self.share > 0

    def check_total(self, total: int, config: Any = None) -> None:
        rest = total - self.steps(total)
        if 0 < rest <= self.warmup and self.share:
            raise ConfigError(
                f"warmup={self.warmup} fills the {rest} steps that are left after the switch in a run of {total}; "
                f"use warmup={rest // 10}"
            )

    def steps(self, total: int) -> int:
        """How many steps of a run train all weights."""
        return round(self.share * total)

    def mark(self, root: nn.Module, adapters: AdapterSet | None, adapter: str) -> None:
        if self.share:
            for _, p in base_parameters(root):
                p.requires_grad_(p.is_floating_point())

    def start(self, run: Run) -> Schedule:
        total = run.need_total("the share of full fine-tuning")
        if not run.adapter:
            raise ConfigError("there is no adapter to train after the switch; use get_peft_model first")
        if any(edit.changes_base for edit in run.edits()):
            raise ConfigError(
                "this adapter trains the base in place already, so there is nothing to switch to; use LoRA"
            )
        if self.share:
            check_trainable(run, "full fine-tuning")
        return FullThenLoraSchedule(run, self, self.steps(total))

    @classmethod
    def example(cls) -> FullThenLora:
        return cls(share=0.4, warmup=2)


class FullThenLoraSchedule(Schedule):
    def __init__(self, run: Run, options: FullThenLora, steps: int) -> None:
        super().__init__(run)
        self.options = options
        self.first = FullFirst(run, steps)

    def begin(self) -> None:
        self.first.choose()
        if self.first.steps:
            changed(self.run, "full fine-tuning")

    def rate(self, param: Tensor) -> Rate | None:
        if self.first.going:
            return Rate(self.options.full_rate)
        since = self.run.step - self.first.steps
        if not self.first.steps or since >= self.options.warmup:
            return None
        return Rate(since / self.options.warmup)

    def after_step(self) -> None:
        self.first.after_step()
        self.run.logs["full"] = float(self.run.step <= self.first.steps)

    def base_tensors(self) -> Mapping[str, Tensor]:
        return self.first.base if self.first.steps else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin()

    def report(self) -> dict[str, Any]:
        """`full_steps`: steps in which all weights trained."""
        return {"full_steps": min(self.first.steps, self.run.step)}

    def save(self, folder: Path) -> bool:
        if not self.first.steps:
            return False
        write_changed(self.run.root, self.first.base.values(), folder, self.run.adapter)
        return True
