"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning (arXiv 2308.03303).

    y = W x + b + s · B (A x)        A: (r, in) frozen at its random start, B: (out, r) trained, zero at the start

The gradient of B needs A x, r numbers per position, and not x: what a linear layer keeps for backward does not grow
with its input. So there is no dropout on x, whose mask would have to be kept. Merged: W + s · B A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltatune.config import register
from deltatune.core.edits import Edit
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraConfig, LoraDelta


@register
@dataclass
class LoraFAConfig(LoraConfig):
    """LoRA-FA's configuration: LoRA's fields but dropout and DoRA.

    Raises:
        ConfigError: a value is out of range, or an option cancels the saving.
    """

    method: ClassVar[str] = "LORA_FA"
    summary: ClassVar[str] = "LoRA with A frozen: little is kept for backward"
    paper: ClassVar[str] = "arXiv 2308.03303"
    variants: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout is not possible in LoRA-FA: its mask would be kept for backward, as large as the input "
                "whose keeping the method avoids; set it to 0"
            )
        if self.use_dora:
            raise ConfigError("use_dora is not possible in LoRA-FA: magnitudes need the whole output for backward")

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        edit = super().build(ref, site)
        if isinstance(edit, LoraDelta):
            edit.lora_A.trainable = False
        return edit

    def init_for(self, ref: WeightRef) -> str:
        # an embedding's A starts at zero in LoRA, and frozen it would stay there
        return "gaussian" if ref.op.looks_up and self.init_name == "default" else self.init_name
