"""Training procedures under `transformers.Trainer`: a callback, for any Trainer and for `AdapterTrainer`.

    trainer = Trainer(model=model, ..., callbacks=[ProcedureCallback(ReLora(cycle=500))])

It attaches the procedures when training begins, with the trainer's own number of steps, keeps their state in every
checkpoint (`schedule.pt`), goes on from it when the trainer resumes, and finishes them when training ends.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deltatune.core.files import write_atomically
from deltatune.errors import ConfigError
from deltatune.schedules import Attached, Procedure, attach, mark

SCHEDULE = "schedule.pt"


class ProcedureCallback(TrainerCallback):  # type: ignore[misc]
    """Runs procedures in a trainer, beside those that the adapter's method brings itself.

    Attributes:
        attached: the procedures at work, from the first step on. report: what they tell at the end.
    """

    def __init__(self, *procedures: Procedure, adapter_name: str | None = None) -> None:
        self.procedures, self.adapter_name = procedures, adapter_name
        self.attached: Attached | None = None
        self.report: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        mark(model, *self.procedures, adapter_name=self.adapter_name)

    def start(self, args: Any, model: Any, optimizer: Any, steps: int) -> Attached:
        """Attaches the procedures.

        Raises:
            ConfigError: they do not go with the model, the optimiser or the number of steps.
        """
        self.attached = attach(
            model, optimizer, *self.procedures, total_steps=steps, adapter_name=self.adapter_name, seed=args.seed
        )
        return self.attached

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        attached = self.start(args, model, optimizer, state.max_steps)
        if state.global_step:
            attached.load_state_dict(read_schedule(_resumed_from(args, state)))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.attached is not None and logs is not None and "loss" in logs:
            logs.update(self.attached.run.logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not (folder / SCHEDULE).exists():
            self.write(folder, args.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def finish(self) -> None:
        """Ends the procedures; the model is then what is to be saved."""
        if self.attached is not None:
            self.report = self.attached.finish()

    def write(self, folder: Path, here: bool = True) -> None:
        """Writes the procedures' state into a checkpoint; `here` is False where a process only takes part."""
        if self.attached is not None:
            state = self.attached.state_dict()
            if here and folder.is_dir():
                write_atomically(folder / SCHEDULE, lambda path: torch.save(state, path))


def read_schedule(folder: Path) -> dict[str, Any]:
    """The procedures' state in a checkpoint.

    Raises:
        ConfigError: it has none.
    """
    if not (folder / SCHEDULE).is_file():
        raise ConfigError(f"{folder} has no {SCHEDULE}, so the procedure cannot go on from there; start the run again")
    state: dict[str, Any] = torch.load(folder / SCHEDULE, map_location="cpu", weights_only=True)
    return state


def _resumed_from(args: Any, state: Any) -> Path:
    """The checkpoint that the trainer has resumed from; a callback is not told."""
    given = args.resume_from_checkpoint
    last = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    return Path(given) if isinstance(given, str) and Path(given).is_dir() else last
