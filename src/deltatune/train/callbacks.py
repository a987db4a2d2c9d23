"""What is shown and written while a run goes: progress, metrics.jsonl, metrics.csv, samples.jsonl."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from deltatune.errors import ConfigError
from deltatune.train.files import write_text
from deltatune.train.spec import MergeAware

#: columns that come first in metrics.csv; what else was measured follows in the order of its first appearance
CSV_FIRST = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TrainingDivergedError(ConfigError):
    """The loss is no longer a number."""


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """A bar with loss and time left in a terminal; one plain line per logging step elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.loss = math.nan
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("time {task.fields[passed]}  left {task.fields[left]}"),
            console=self.console,
        )
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="-", passed="0:00", left="-"
        )
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            passed = duration(time.monotonic() - self.started)
            left = duration(self._left(state))
            self.bar.update(self.task, completed=state.global_step, passed=passed, left=left)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.loss = logs["loss"]
            if self.bar is not None:
                self.bar.update(self.task, loss=f"{self.loss:.3f}")
            else:
                self.console.print(self._line(state), highlight=False)
        elif "eval_loss" in logs:
            shown = [f"{key} {value:.4g}" for key, value in logs.items() if key in _SHOWN]
            self.console.print(f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown), highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar off the terminal for a while: rich draws one live display at a time."""
        if self.bar is None:
            yield
            return
        self.bar.live.transient = True
        self.bar.stop()
        try:
            yield
        finally:
            self.bar.live.transient = False
            self.bar.start()

    def close(self) -> None:
        """Leave the terminal as it was; also called when training fails."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _left(self, state: Any) -> float:
        done: int = state.global_step - self.first_step
        per_step = (time.monotonic() - self.started) / max(done, 1)
        left: int = state.max_steps - state.global_step
        return per_step * left

    def _line(self, state: Any) -> str:
        passed = time.monotonic() - self.started
        return (
            f"step {state.global_step}/{state.max_steps}  loss {self.loss:.4f}  "
            f"time {duration(passed)}  left {duration(self._left(state))}"
        )


_SHOWN = ("eval_loss", "eval_accuracy", "eval_exact_match", "eval_macro_f1", "eval_token_f1")


class Stopwatch(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Seconds spent training, those before a resume included."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.before = seconds
        self.started: float | None = None

    @property
    def seconds(self) -> float:
        running = 0.0 if self.started is None else time.monotonic() - self.started
        return self.before + running

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before, self.started = self.seconds, None

    def state(self) -> dict[str, Any]:
        return {"args": {"seconds": self.seconds}, "attributes": {}}


class DivergenceCallback(TrainerCallback):  # type: ignore[misc]
    """Stops as soon as the loss is no longer a number: every later step would be wasted."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss became {loss} by step {state.global_step}: lower train.learning_rate "
                f"(it is {args.learning_rate:g}), or use train.precision=fp32"
            )


class MergeAwareCallback(TrainerCallback):  # type: ignore[misc]
    """Rounds the merged weights of a quantised base from a share of the steps on, and whatever follows training."""

    def __init__(self, aware: MergeAware) -> None:
        self.aware = aware

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        wanted = state.global_step >= self.aware.start * state.max_steps
        if wanted != (model.adapters.plan.rounding is not None):  # switching tries a whole weight of every storage
            model.set_merge_aware(wanted, rounding=self.aware.rounding, seed=self.aware.seed)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.set_merge_aware(rounding=self.aware.rounding, seed=self.aware.seed)


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Every logged value as one line of metrics.jsonl; the same as a table in metrics.csv if asked for.

    A resumed run drops the lines after its checkpoint, so the file reads like that of an unbroken run.
    """

    def __init__(self, directory: Path, *, as_csv: bool = False) -> None:
        self.path = directory / "metrics.jsonl"
        self.csv_path = directory / "metrics.csv" if as_csv else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        row = {"step": state.global_step, **{key: _plain(value) for key, value in logs.items()}}
        if state.is_world_process_zero and not row.keys() & {"train_runtime"}:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}) + "\n")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_csv(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write_csv(state)

    def _write_csv(self, state: Any) -> None:
        if self.csv_path is None or not state.is_world_process_zero:
            return
        rows = read_metrics(self.path)
        names = list(dict.fromkeys([*CSV_FIRST, *(key for row in rows for key in row)]))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.csv_path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class SamplesCallback(TrainerCallback):  # type: ignore[misc]
    """Answers to a few held-out examples at every evaluation, as lines of samples.jsonl."""

    def __init__(self, directory: Path, answer: Callable[[], list[dict[str, Any]]]) -> None:
        self.path = directory / "samples.jsonl"
        self.answer = answer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for row in self.answer():
                file.write(json.dumps({"step": state.global_step, **row}, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    """A value that JSON has: numbers that are not finite become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
