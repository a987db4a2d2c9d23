"""The contract of a procedure: a dataclass of options, and the schedule that carries them out in one run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from deltatune.core.adapters import AdapterSet
from deltatune.core.edits import Edit
from deltatune.errors import ConfigError, hint


class Rate(NamedTuple):
    """How fast one parameter moves in the step that is under way.

    Attributes:
        factor: times the learning rate that the optimiser's group (and its scheduler) gives.
        lr: a rate of its own in place of the group's; the scheduler's course still applies.
        decay: False switches the group's weight decay off.
    """

    factor: float = 1.0
    lr: float | None = None
    decay: bool = True

    def times(self, other: Rate) -> Rate:
        """Both together."""
        lr = self.lr if other.lr is None else other.lr
        return Rate(self.factor * other.factor, lr, self.decay and other.decay)


@dataclass
class Run:
    """What a schedule works on.

    Attributes:
        root: the base model, no wrapper. adapters: what is attached to it, if anything.
        adapter: name of the adapter that trains.
        optimizer: torch's own, unwrapped.
        total: optimiser steps of the whole run, None if nobody knows.
        seed: of what a schedule draws; equal in all processes.
        step: optimiser steps that are done. In `before_step` that is the number of the step under way, from 0.
    """

    root: nn.Module
    adapters: AdapterSet | None
    adapter: str
    optimizer: torch.optim.Optimizer
    total: int | None = None
    seed: int = 0
    step: int = 0
    #: measured values of the last step, for the log
    logs: dict[str, float] = field(default_factory=dict)

    def need_total(self, why: str) -> int:
        """The number of steps.

        Raises:
            ConfigError: nobody knows it.
        """
        if self.total is None:
            raise ConfigError(f"{why} needs the number of optimiser steps of the whole run: give attach total_steps")
        return self.total

    def edits(self) -> list[Edit]:
        """The edits of the adapter that trains."""
        return self.adapters.edits[self.adapter] if self.adapters is not None and self.adapter else []


class Schedule:
    """One procedure in one run. What a subclass does not override does nothing.

    Everything that later steps depend on is in `state_dict` (or follows from `run.step`), so that a killed and resumed
    run goes on as an unbroken one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def begin(self) -> None:
        """Called once, before the first step or before the state of an earlier run is loaded."""

    def penalty(self) -> Tensor | None:
        """A term of the loss that depends on weights alone; its gradient is added before `before_step`."""
        return None

    def before_step(self) -> None:
        """Gradients are what the optimiser is about to use, and may be changed."""

    def rate(self, param: Tensor) -> Rate | None:
        """How fast a parameter moves in the step under way; None leaves it to the optimiser's group."""
        return None

    def after_step(self) -> None:
        """The weights have moved, gradients are still there; `run.step` counts this step."""

    def base_tensors(self) -> Mapping[str, Tensor]:
        """The base's own tensors that this schedule changes: checkpoints of the run hold them beside the adapter."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; `run.step` and the base's tensors are those of the checkpoint already."""

    def finish(self) -> None:
        """The run is over: leaves the model as it should be saved."""

    def report(self) -> dict[str, Any]:
        """What is worth telling after the run, as plain values."""
        return {}

    def draw(self, folder: Path) -> list[Path]:
        """Writes figures of `report` and returns them."""
        return []

    def save(self, folder: Path) -> bool:
        """Writes what the run has made as an adapter; False where the adapter's own saving does."""
        return False


@dataclass
class Procedure:
    """The options of a procedure; `@procedure` makes a subclass known under its `name`.

    Raises:
        ConfigError: from `__post_init__`, if an option cannot be; from `start`, if it does not go with the run.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    @property
    def switches(self) -> bool:
        """Whether what trains changes during the run, which DDP must be told."""
        return False

    def mark(self, root: nn.Module, adapters: AdapterSet | None, adapter: str) -> None:
        """Makes everything trainable that trains at some time, so that an optimiser made afterwards has it."""

    def check_total(self, total: int, config: Any = None) -> None:
        """Whether a run of so many optimiser steps can be; asked before anything is loaded.

        Args:
            config: the adapter's configuration.

        Raises:
            ConfigError: it cannot; with the nearest number that works.
        """

    def start(self, run: Run) -> Schedule:
        """The schedule of a run; `check_total` was asked already if the total is known.

        Raises:
            ConfigError: the model, the adapter or the number of steps does not go with it.
        """
        raise NotImplementedError

    @classmethod
    def example(cls) -> Procedure:
        """Options for a run of a dozen steps, for tests and documentation."""
        return cls()

    @classmethod
    def example_method(cls) -> dict[str, Any]:
        """An adapter that it goes with, as a recipe's `method`; empty where one needs more than its configuration."""
        return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


#: name -> the class of a procedure's options
PROCEDURES: dict[str, type[Procedure]] = {}
P = TypeVar("P", bound="type[Procedure]")


def procedure(cls: P) -> P:
    """Class decorator: makes a procedure known under its `name`, to recipes too.

    Raises:
        ConfigError: another class has this name.
    """
    if PROCEDURES.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ConfigError(f"a procedure named {cls.name!r} is already registered")
    PROCEDURES[cls.name] = cls
    return cls


def find_procedure(options: Mapping[str, Any]) -> Procedure:
    """The procedure that `{"name": …, option: value, …}` describes.

    Raises:
        ConfigError: no such procedure or option (names the nearest), or a value that cannot be.
    """
    import deltatune.schedules  # noqa: F401  (registers the shipped ones)

    asked = str(options.get("name") or "")
    name = next((known for known in PROCEDURES if known.casefold() == asked.casefold()), None)
    if name is None:
        known = ", ".join(sorted(PROCEDURES))
        raise ConfigError(
            f"procedure.name {asked!r} is no procedure{hint(asked.lower(), PROCEDURES)} (known: {known})"
            if asked
            else f"procedure.name is missing: name one of {known}"
        )
    fields = [f.name for f in dataclasses.fields(PROCEDURES[name]) if f.init]
    for key in options:
        if key not in (*fields, "name"):
            raise ConfigError(f"unknown key 'procedure.{key}': {name} has no such option{hint(key, fields)}")
    return PROCEDURES[name](**{k: v for k, v in options.items() if k != "name"})


def check_whole(what: str, value: Any, least: int = 0) -> None:
    """Raises ConfigError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what} must be a whole number of at least {least}, not {value!r}")


def check_number(what: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises ConfigError unless `low <= value <= high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        span = f"of at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"{what} must be a number {span}, not {value!r}")
