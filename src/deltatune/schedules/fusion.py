"""AdapterFusion's regulariser (arXiv 2005.00247): c · Σ ‖V - I‖² joins the loss, in training only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.errors import ConfigError
from deltatune.methods.fusion import Fusion, FusionConfig
from deltatune.schedules.base import Procedure, Run, Schedule, procedure


class _Penalty(Schedule):
    def __init__(self, run: Run, config: FusionConfig) -> None:
        super().__init__(run)
        self.weight = config.regularization

    def penalty(self) -> Tensor | None:
        return self.weight * torch.stack([e.distance() for e in self.run.edits() if isinstance(e, Fusion)]).sum()


@procedure
@dataclass
class FusionPenalty(Procedure):
    """Comes with every `FusionConfig` by itself; its weight is that configuration's `regularization`."""

    name: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "the values of an AdapterFusion stay near the identity"
    paper: ClassVar[str] = "arXiv 2005.00247"

    def start(self, run: Run) -> Schedule:
        config = run.adapters.configs[run.adapter] if run.adapters is not None and run.adapter else None
        if not isinstance(config, FusionConfig):
            raise ConfigError("procedure 'fusion' is for an AdapterFusion; use method FUSION (FusionConfig)")
        return _Penalty(run, config)

    @classmethod
    def example_method(cls) -> dict[str, Any]:
        return {}  # a fusion needs the adapters that it combines
