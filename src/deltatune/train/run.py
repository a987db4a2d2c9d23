"""One training run from recipe to report: resume or start, measure, train, measure again, write it all down."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.errors import ConfigError
from deltatune.train.files import write_json, write_text
from deltatune.train.plan import Plan, plan
from deltatune.train.recipe import Recipe
from deltatune.train.rundir import BEFORE, RESULTS, Decision, begin, decide, locked

if TYPE_CHECKING:
    from rich.console import Console

    from deltatune.train.session import Data

__all__ = ["Plan", "RunResult", "load_result", "plan", "train"]


@dataclass(frozen=True)
class RunResult:
    """What a run did and what it changed; `results.json` holds the same.

    Attributes:
        status: "trained" now, or "finished" earlier and read back.
        before, after: metrics of the held-out examples (loss, perplexity, accuracy …); empty without any.
        samples: held-out examples as `prompt`, `expected`, `base`, `tuned`.
        seconds: of the training steps alone, those before a resume included.
        peak_memory: bytes; of the accelerator if there is one, else of the process.
        adapter_bytes: size of the weights file.
        procedures: what training procedures tell, by name.
    """

    name: str
    output_dir: str
    status: str
    model: str
    method: str
    steps: int
    train_loss: float | None
    before: dict[str, Any]
    after: dict[str, Any]
    samples: list[dict[str, str]]
    trainable: int
    total: int
    seconds: float
    peak_memory: int
    adapter_bytes: int
    data: str = ""
    best_step: int | None = None
    procedures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_result(directory: Path) -> RunResult:
    """The result of a finished run."""
    return RunResult(**{**json.loads((directory / RESULTS).read_text(encoding="utf-8")), "status": "finished"})


def train(
    recipe: Recipe, *, console: Console | None = None, resume: bool | None = None, overwrite: bool = False
) -> RunResult:
    """Train an adapter as `recipe` says and write it, with its report, into the recipe's run directory.

    Args:
        console: where progress is shown; nothing is printed without it.
        resume: True insists on continuing a run, False on a new one; None continues a broken-off run of the
            same recipe and returns the result of a finished one.
        overwrite: start again in place of the run that is there.

    Raises:
        ValueError: the recipe, the data or the output directory cannot be used; one sentence.
        OSError: a file could not be written; the last checkpoint is intact.
    """
    from rich.console import Console

    decision = decide(recipe, resume=resume, overwrite=overwrite)
    if decision.action == "finished":
        return load_result(recipe.run_dir)
    console = console or Console(quiet=True)
    with locked(recipe.run_dir):
        return _Run(recipe, console, decision).go()


class _Run:
    """The steps of one run, in order; what one step finds, the next ones use."""

    def __init__(self, recipe: Recipe, console: Console, decision: Decision) -> None:
        self.recipe, self.console, self.decision = recipe, console, decision
        self.directory = recipe.run_dir
        self.resuming = decision.action == "resume"

    def go(self) -> RunResult:
        from deltatune.train.loading import hush

        hush()
        self.prepare()
        begin(self.recipe, self.decision, self.data.examples.template)
        before = self.measure_before()
        self.attach()
        trainer = self.make_trainer()
        self.run(trainer)
        trainer.save_final(self.directory)
        after = self.measure_after()
        result = self.collect(trainer, before, after)
        for part in trainer.procedures:
            part.attached.draw(self.directory)
        self.report(result)
        write_json(self.directory / RESULTS, result.to_json())  # last: it says that the run is finished
        return result

    # ---- before training ----

    def prepare(self) -> None:
        """Everything that can fail for the user's reasons, before anything of an earlier run is touched."""
        from deltatune.train.arguments import check_machine
        from deltatune.train.measure import Measurer
        from deltatune.train.models import load_tokenizer, resolve_model
        from deltatune.train.session import (
            check_apart,
            check_length,
            check_targets,
            load_base,
            prepare_data,
            procedures_of,
        )

        check_machine(self.recipe)
        if self.decision.note:
            self.say(self.decision.note)
        self.resolved = resolve_model(self.recipe.model, revision=self.recipe.revision)
        self.say(f"Model: {self.resolved.source}")
        self.tokenizer = load_tokenizer(self.resolved)
        self.data: Data = prepare_data(self.recipe, self.tokenizer)
        self.say(f"Data: {self.data.examples.describe}")
        self.check_evaluation()
        self.procedures = procedures_of(self.recipe, len(self.data.rows))
        self.base = load_base(self.recipe, self.resolved)
        check_length(self.recipe, self.data, self.base)
        check_targets(self.recipe, self.base)
        check_apart(self.recipe, self.base)
        self.measurer = Measurer(self.recipe, self.tokenizer, self.data.examples, self.console)

    def check_evaluation(self) -> None:
        if self.recipe.train.eval_strategy != "no" and not self.data.examples.eval:
            raise ConfigError(
                "train.eval_strategy asks for evaluations, but there are no held-out examples: "
                "set data.eval_path or data.eval_fraction"
            )

    def measure_before(self) -> dict[str, Any]:
        """Metrics and shown answers of the bare base; read back when the run is a continuation."""
        path = self.directory / BEFORE
        if self.resuming and path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        measured = {}
        if self.recipe.eval.before and self.measurer.examples:
            self.say(f"Measuring the base model on {len(self.measurer.examples)} held-out examples.")
            measured = self.measurer.whole(self.base)
        write_json(path, measured)
        return measured

    def attach(self) -> None:
        from deltatune.train.session import attach, check_apart, init_batches

        self.model = attach(self.recipe, self.base, init_batches(self.recipe, self.data, self.tokenizer))
        check_apart(self.recipe, self.model)  # virtual tokens can join what the base keeps apart
        if self.recipe.train.gradient_checkpointing:
            self.model.activation_checkpointing_enable()

    # ---- training ----

    def make_trainer(self) -> Any:
        from transformers import PrinterCallback

        from deltatune.train.arguments import training_arguments
        from deltatune.train.data import Collator
        from deltatune.train.trainer import AdapterTrainer, FlatCollator

        spec, rows = self.recipe.train, self.data.rows
        collator = Collator(self.tokenizer, pad_to_multiple_of=8)
        with _tensorboard_in(self.directory):
            trainer = AdapterTrainer(
                model=self.model,
                args=training_arguments(self.recipe, self.directory, len(rows)),
                data_collator=FlatCollator(collator) if spec.padding_free else collator,
                train_dataset=rows,
                eval_dataset=self.data.examples.eval or None,
                callbacks=self.callbacks(),
                evaluator=self.measurer.now,
                lengths=[len(row) for row in rows] if spec.group_by_length else None,
                label_smoothing=spec.label_smoothing,
            )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def callbacks(self) -> list[Any]:
        from transformers import EarlyStoppingCallback

        from deltatune.schedules.attach import implied
        from deltatune.train import callbacks
        from deltatune.train.procedures import ProcedureCallback

        spec = self.recipe.train
        self.progress = callbacks.ProgressCallback(self.console)
        self.measurer.pause = self.progress.paused
        chosen: list[Any] = [
            *([ProcedureCallback(*self.procedures)] if self.procedures or implied(self.model) else []),
            callbacks.Stopwatch(),
            callbacks.DivergenceCallback(),
            callbacks.MetricsCallback(self.directory, as_csv="csv" in spec.logging),
            self.progress,
        ]
        if spec.merge_aware is not None:
            chosen.append(callbacks.MergeAwareCallback(spec.merge_aware))
        if spec.early_stopping_patience is not None:
            chosen.append(EarlyStoppingCallback(spec.early_stopping_patience, spec.early_stopping_threshold))
        if self.recipe.eval.sample_during_training and self.measurer.shown:
            answer = partial(self.measurer.samples_now, self.model)
            chosen.append(callbacks.SamplesCallback(self.directory, answer))
        return chosen

    def run(self, trainer: Any) -> None:
        """Train to the end, unless the checkpoint says that the end was reached and only the report is missing."""
        from deltatune.train.arguments import total_steps

        checkpoint = self.decision.checkpoint
        steps = total_steps(self.recipe.train, len(self.data.rows))
        cache = self.base.config.use_cache
        try:
            if checkpoint is not None and trainer.is_over(checkpoint, steps, self.recipe.train.early_stopping_patience):
                trainer.load_final(checkpoint)
            else:
                self.say(f"Training {steps} steps.")
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            self.progress.close()
            self.say(
                f"Stopped after step {trainer.state.global_step}; the same command goes on from the last checkpoint."
            )
            raise
        finally:
            self.progress.close()
            self.base.config.use_cache = cache

    # ---- after training ----

    def measure_after(self) -> dict[str, Any]:
        if not self.recipe.eval.after or not self.measurer.examples:
            return {}
        self.say(f"Measuring the tuned model on {len(self.measurer.examples)} held-out examples.")
        return self.measurer.whole(self.model)

    def collect(self, trainer: Any, before: dict[str, Any], after: dict[str, Any]) -> RunResult:
        from deltatune.train.callbacks import Stopwatch

        trainable, total = self.model.get_nb_trainable_parameters()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        watches = [c for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch)]
        weights = self.directory / "adapter_model.safetensors"
        return RunResult(
            name=self.recipe.name,
            output_dir=str(self.directory),
            status="trained",
            model=self.recipe.model,
            method=str(self.recipe.method["peft_type"]),
            steps=trainer.state.global_step,
            train_loss=losses[-1] if losses else None,
            before=before.get("metrics", {}),
            after=after.get("metrics", {}),
            samples=self.measurer.compare(before, after),
            trainable=trainable,
            total=total,
            seconds=round(watches[0].seconds, 1),
            peak_memory=peak_memory(),
            adapter_bytes=weights.stat().st_size,
            data=self.data.examples.describe,
            best_step=trainer.state.best_global_step if self.recipe.train.load_best else None,
            procedures={name: told for part in trainer.procedures for name, told in part.report.items()},
        )

    def report(self, result: RunResult) -> None:
        from deltatune.train.model_card import model_card
        from deltatune.train.report import plot_loss

        if self.recipe.report.plot:
            plot_loss(self.directory, result)
        if self.recipe.report.model_card:
            card = model_card(result, self.recipe, self.resolved, self.data.examples)
            write_text(self.directory / "README.md", card)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


def peak_memory() -> int:
    """Most bytes in use so far: on the accelerator if there is one, else by this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # Linux counts in kilobytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def _tensorboard_in(directory: Path) -> Iterator[None]:
    """TensorBoard's callback reads its directory from the environment, once, when it is made."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(directory / "tensorboard")
    try:
        yield
    finally:
        del os.environ[name]
