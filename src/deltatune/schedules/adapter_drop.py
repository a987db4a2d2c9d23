"""AdapterDrop: On the Efficiency of Adapters in Transformers (arXiv 2010.11918).

Adapters in the lowest n layers are left out, of every method. *Specialised* training fixes n; *robust* training draws n
anew for every batch, uniformly from 0 to L - 1, and one adapter then serves with any n (`model.drop_layers(n)`). Below
the first layer with an adapter there is no backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deltatune.errors import ConfigError
from deltatune.schedules.base import Procedure, Run, Schedule, procedure


class _Drop(Schedule):
    def __init__(self, run: Run, layers: int | None) -> None:
        super().__init__(run)
        assert run.adapters is not None
        self.adapters, self.layers = run.adapters, layers
        numbers = {getattr(edit.host, "_layer", 0) for edit in run.edits() if hasattr(edit, "host")}
        self.count = 1 + max((n for n in numbers if n < 10**6), default=0)
        if layers is not None and layers > self.count:
            raise ConfigError(f"adapter_drop leaves out {layers} layers, and the adapter is in {self.count}")

    def begin(self) -> None:
        self._draw()

    def after_step(self) -> None:
        self._draw()

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._draw()

    def _draw(self) -> None:
        """n of the next batch; it follows from the step's number, so a resumed run draws the same."""
        if self.layers is not None:
            self.adapters.drop_layers(self.layers)
            return
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + self.run.step)
        self.adapters.drop_layers(int(torch.randint(self.count, (), generator=generator)))

    def finish(self) -> None:
        self.adapters.drop_layers(0 if self.layers is None else self.layers)


@procedure
@dataclass
class AdapterDrop(Procedure):
    """Trains without the adapters of the lowest layers.

    Args:
        layers: n; None draws it for every optimiser step.
    """

    layers: int | None = None

    name: ClassVar[str] = "adapter_drop"
    summary: ClassVar[str] = "adapters of the lowest layers are left out, a fixed or a random number of them"
    paper: ClassVar[str] = "arXiv 2010.11918"

    def __post_init__(self) -> None:
        if self.layers is not None and (not isinstance(self.layers, int) or self.layers < 0):
            raise ConfigError(f"layers must be a whole number of at least 0, or absent, not {self.layers!r}")

    def start(self, run: Run) -> Schedule:
        if run.adapters is None or not run.adapter:
            raise ConfigError("procedure 'adapter_drop' leaves out adapters, and this model has none")
        return _Drop(run, self.layers)
