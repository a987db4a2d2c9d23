"""P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks (arXiv 2110.07602).

    deep prompts: keys and values of every layer, as prefix tuning's, with dropout on them, and a trained task head

One table `(P, 2 · layers · heads · d)`; with `prefix_projection=True` a network computes it. Made for encoders that
classify sentences or tokens or find spans, whose new head trains beside it (SEQ_CLS, TOKEN_CLS, QUESTION_ANS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from deltatune.config import register
from deltatune.errors import ConfigError
from deltatune.methods._prompts import Table
from deltatune.methods.prefix_tuning import PrefixTuningConfig, Projection


class DroppedTable(Table):
    """A table with dropout on what it gives."""

    dropout = 0.0

    def columns(self, start: int, stop: int) -> Tensor:
        return F.dropout(super().columns(start, stop), self.dropout, self.training)


class DroppedProjection(Projection):
    """A projected table with dropout on what it gives."""

    dropout = 0.0

    def columns(self, start: int, stop: int) -> Tensor:
        return F.dropout(super().columns(start, stop), self.dropout, self.training)


@register
@dataclass
class PTuningV2Config(PrefixTuningConfig):
    """P-Tuning v2's configuration: prefix tuning's fields and a dropout.

    Args:
        prefix_dropout: on the keys and values, in training.
    """

    prefix_dropout: float = 0.1

    method: ClassVar[str] = "P_TUNING_V2"
    summary: ClassVar[str] = "deep prompts for understanding tasks"
    paper: ClassVar[str] = "arXiv 2110.07602"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.prefix_dropout < 1:
            raise ConfigError(f"prefix_dropout must be in [0, 1), not {self.prefix_dropout}")

    def table_of(self, width: int) -> Table:
        table = super().table_of(width)
        table.__class__ = DroppedProjection if self.prefix_projection else DroppedTable
        table.dropout = self.prefix_dropout  # type: ignore[assignment]
        return table
