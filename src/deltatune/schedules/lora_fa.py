"""LoRA-FA's optimiser form (arXiv 2308.03303) as a procedure.

    g_B ← g_B (A Aᵀ + 1e-8 I)⁻¹ / s²        so that s ΔB A = -η G Aᵀ (A Aᵀ)⁻¹ A to first order

A is frozen (method LORA_FA), and B's step then moves W along the whole gradient's projection onto the rows of A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from deltatune.methods.lora_fa import frozen_a, project
from deltatune.schedules.base import Procedure, Run, Schedule, procedure


@procedure
@dataclass
class LoraFA(Procedure):
    """Projects the gradients of B; there are no options."""

    name: ClassVar[str] = "lora_fa"
    summary: ClassVar[str] = "with A frozen, B moves along the whole gradient's projection"
    paper: ClassVar[str] = "arXiv 2308.03303"

    def start(self, run: Run) -> Schedule:
        return LoraFASchedule(run)

    @classmethod
    def example_method(cls) -> dict[str, Any]:
        return {**super().example_method(), "peft_type": "LORA_FA"}


class LoraFASchedule(Schedule):
    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.deltas = frozen_a(run.edits(), "procedure 'lora_fa'")

    def before_step(self) -> None:
        for delta in self.deltas:
            project(delta)
