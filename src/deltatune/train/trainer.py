"""`transformers.Trainer` for adapters: checkpoints hold the adapter alone, whole or not at all, and resume exactly.

What differs from the parent, and why:

- a checkpoint is written beside its place and renamed, so a kill or a full disk leaves the one before it;
- the base model is never written, and no pickled arguments;
- loading is the library's strict loading, which raises where the parent warns;
- evaluation leaves the random state as it was, so that evaluating never changes the weights that follow;
- logits are computed only where a token is trained, which for short answers is most of a small model's saving;
- the data order depends on seed and epoch only, so a resumed run sees the batches it would have seen.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerState
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LabelSmoother, LengthGroupedSampler

from deltatune.core.sharded import fill
from deltatune.core.sites import base_parameters
from deltatune.errors import ConfigError
from deltatune.schedules.attach import implied
from deltatune.train.data import IGNORE, Collator, Encoded, pack
from deltatune.train.files import staged_directory
from deltatune.train.procedures import ProcedureCallback, read_schedule

CHECKPOINT = "checkpoint-"
TRAINER_STATE = "trainer_state.json"


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; the earlier ones are untouched."""


def checkpoint_step(path: Path) -> int:
    """Optimiser steps behind the checkpoint directory `path`, -1 when it is none."""
    number = path.name.removeprefix(CHECKPOINT)
    return int(number) if path.name.startswith(CHECKPOINT) and number.isdigit() and path.is_dir() else -1


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first."""
    found = [path for path in directory.glob(f"{CHECKPOINT}*") if checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


class EpochLengthSampler(LengthGroupedSampler):  # type: ignore[misc]
    """Length-grouped order that depends on seed and epoch only, whatever the global random state is."""

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class FlatCollator:
    """A batch as one row with no padding, its examples kept apart by their positions.

    The loss is that of the padded batch; the work is that of the tokens alone.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        return self.collator(pack(rows, sum(map(len, rows))))


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose model is a `PeftModel`.

    Args:
        evaluator: model → metrics without prefix; replaces the parent's evaluation loop, whose loss is a mean
            over batches and not over tokens.
        lengths: tokens per training example; batches are then grouped by length.
        label_smoothing: share of the probability given to all tokens alike. The parent's own option does not
            see that a wrapped model is a causal one and would compare each token with itself.
    """

    def __init__(
        self,
        *args: Any,
        evaluator: Callable[[nn.Module], dict[str, Any]] | None = None,
        lengths: Sequence[int] | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        model = kwargs["model"]
        # An adapter whose method has a procedure (AdaLoRA's budget) trains with it, asked for or not.
        own: list[Any] = list(kwargs.get("callbacks") or [])
        if implied(model) and not any(isinstance(part, ProcedureCallback) for part in own):
            kwargs["callbacks"] = [ProcedureCallback(), *own]
        if getattr(model, "is_quantized", False):
            # The parent refuses quantised models without adapters and knows only peft's class by type.
            model._hf_peft_config_loaded = True
        super().__init__(*args, **kwargs)
        base = model.get_base_model()
        # The parent looks at the wrapper, whose signature says less than the model that computes the loss.
        self.model_accepts_loss_kwargs = getattr(base, "accepts_loss_kwargs", _takes_kwargs(base.forward))
        self.evaluator, self.lengths = evaluator, lengths
        self.selects = can_select(model)
        self.smoother = LabelSmoother(label_smoothing) if label_smoothing > 0 else None
        if self.smoother is not None:
            # The parent then leaves the loss alone: it is already divided by the number of tokens.
            self.compute_loss_func = partial(self.smoother, shift_labels=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler(rows, self.lengths, self.args.data_seed)

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The parent's loss, from the logits of the trained positions alone where the model allows it."""
        if not self.selects or inputs.get("labels") is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        targets = inputs["labels"][:, 1:]  # (rows, length - 1): the token after each position
        positions = (targets != IGNORE).any(dim=0).nonzero().squeeze(-1)  # (n,)
        outputs = model(**rest, logits_to_keep=positions)
        targets = targets[:, positions]  # (rows, n)
        if self.smoother is not None:
            loss = self.smoother(outputs, targets, num_items_in_batch=num_items_in_batch)
        else:
            loss = self.base_loss(outputs.logits, targets, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def base_loss(self, logits: torch.Tensor, targets: torch.Tensor, count: torch.Tensor | int | None) -> Any:
        """The base model's own loss of logits (rows, n, vocabulary) against the tokens that should follow."""
        base: Any = self.accelerator.unwrap_model(self.model).get_base_model()
        vocabulary = logits.shape[-1]
        return base.loss_function(logits, None, vocab_size=vocabulary, num_items_in_batch=count, shift_labels=targets)

    # ---- evaluation ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the evaluation set, logged; the random state is the same before and after."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        training = self.model.training
        with torch.random.fork_rng(devices=devices):
            if self.evaluator is None:
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            else:
                metrics = self._run_evaluator(metric_key_prefix)
        self.model.train(training)
        return dict(metrics)

    def _run_evaluator(self, prefix: str) -> dict[str, float]:
        assert self.evaluator is not None
        switch = getattr(self.optimizer, "eval", None)  # schedule-free optimisers swap the weights
        if callable(switch):
            switch()
        self.model.eval()
        metrics = {f"{prefix}_{key}": value for key, value in self.evaluator(self.model).items()}
        self.log(metrics)
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        final = Path(self._get_output_dir(trial)) / f"{CHECKPOINT}{self.state.global_step}"
        self._note_best(final)
        try:
            if self.args.should_save:
                with staged_directory(final) as staging:
                    self._write_checkpoint(staging)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise _save_error(final, error) from error
        if self.args.should_save:
            self._rotate(final)

    def _write_checkpoint(self, directory: Path) -> None:
        self._save(str(directory))
        self._save_optimizer_and_scheduler(str(directory))
        self._save_scaler(str(directory))
        self._save_rng_state(str(directory))
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                self.state.stateful_callbacks[type(part).__name__] = part.state()
            if isinstance(part, ProcedureCallback):
                part.write(directory)
        self.state.save_to_json(str(directory / TRAINER_STATE))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter and its config; no base weights, no tokenizer, no pickled arguments."""
        target = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(target)

    def save_final(self, directory: Path) -> None:
        """Write the finished adapter into the run directory.

        Raises:
            CheckpointSaveError: it could not be written; the checkpoints are untouched.
        """
        try:
            if not any(part.attached is not None and part.attached.save(directory) for part in self.procedures):
                self._save(str(directory))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise _save_error(directory / "adapter_model.safetensors", error) from error

    def _note_best(self, saving: Path) -> None:
        """Point the state at the best checkpoint by its step: the run may have moved since it was written."""
        step = self.state.best_global_step
        best = saving.parent / f"{CHECKPOINT}{step}"
        if step and (best.is_dir() or best == saving):
            self.state.best_model_checkpoint = str(best)

    def _rotate(self, newest: Path) -> None:
        """Remove the oldest checkpoints beyond `save_total_limit`, never the newest nor the best."""
        limit = self.args.save_total_limit
        best = self.state.best_model_checkpoint
        keep = {newest.name, Path(best).name if best else newest.name}
        checkpoints = list_checkpoints(newest.parent)
        surplus = len(checkpoints) - max(limit, len(keep)) if limit else 0
        for path in [path for path in checkpoints if path.name not in keep][: max(surplus, 0)]:
            shutil.rmtree(path)

    # ---- loading ----

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(*args, **kwargs)
        self._note_best(Path(self.args.output_dir) / CHECKPOINT)
        return progress

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume the weights.

        Raises:
            ConfigError: some of what trains is not in checkpoints (a prompt's encoder), so nothing could be exact.
        """
        left_out = unsaved(self.model)
        if left_out and self.procedures:
            kept = read_schedule(Path(resume_from_checkpoint))["base"]
            root = self.model.get_base_model()
            held = {id(p) for name, p in base_parameters(root) if name in kept}
            left_out = [name for name in left_out if id(self.model.get_parameter(name)) not in held]
        if left_out:
            raise ConfigError(
                f"{left_out[0]} trains but is not kept in checkpoints, so this run cannot be resumed exactly; start it "
                "again with --overwrite"
            )
        load_adapter_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        load_adapter_weights(self.model, best)
        self._load_base(best)

    @property
    def procedures(self) -> list[ProcedureCallback]:
        """The callbacks that run training procedures."""
        return [part for part in self.callback_handler.callbacks if isinstance(part, ProcedureCallback)]

    def _load_base(self, checkpoint: Path) -> None:
        """What procedures had made of the base's own weights by a checkpoint."""
        own = dict(base_parameters(self.model.get_base_model()))
        for _ in self.procedures[:1]:
            for name, value in read_schedule(checkpoint)["base"].items():
                fill(own[name], value)

    def is_over(self, checkpoint: Path, steps: int, patience: int | None) -> bool:
        """Whether the run that wrote `checkpoint` had nothing left to train.

        Args:
            steps: optimiser steps of the whole run.
            patience: evaluations without a gain after which the run stops early, if it does.
        """
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        stopper = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        waited = int(stopper.get("early_stopping_patience_counter", 0))
        return bool(state.global_step >= steps or (patience is not None and waited >= patience))

    def load_final(self, checkpoint: Path) -> None:
        """Take over what a finished training left in its last checkpoint: weights, history, best step."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self._load_callback_state()
        self._note_best(checkpoint)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        load_adapter_weights(self.model, checkpoint)
        for part in self.procedures:
            self.create_optimizer()
            part.start(self.args, self.model, self.optimizer, self.state.max_steps)
            assert part.attached is not None
            part.attached.load_state_dict(read_schedule(checkpoint))
        if best:
            self._load_best_model()
        for part in self.procedures:
            part.finish()


def load_adapter_weights(model: Any, directory: Path) -> None:
    """Put the adapter saved in `directory` into the active adapter of `model`.

    Raises:
        AdapterLoadError: the file is damaged or does not fit.
    """
    from deltatune import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(directory), device="cpu")
    set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters[0])


def unsaved(model: Any) -> list[str]:
    """Names of the trained parameters that an adapter's file does not hold."""
    saved = {id(slot.weight) for edits in model.adapters.edits.values() for e in edits for _, slot in e.state()}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]


def can_select(model: Any) -> bool:
    """Whether logits of chosen positions are all that the loss of this model needs.

    Not with virtual tokens, which move the positions, nor with losses that look at more than the logits.
    """
    base = model.get_base_model()
    config = base.config.get_text_config()
    return (
        "logits_to_keep" in inspect.signature(base.forward).parameters
        and LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
        and not getattr(config, "output_router_logits", False)
        and not any(adapter.is_prompt_learning for adapter in model.peft_config.values())
    )


def _takes_kwargs(function: Callable[..., Any]) -> bool:
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _save_error(final: Path, error: Exception) -> CheckpointSaveError:
    earlier = [path for path in list_checkpoints(final.parent) if path != final]
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    kept = (
        f"{earlier[-1].name} is intact: make room, then run again with --resume"
        if earlier
        else "no earlier checkpoint exists: make room, then start again"
    )
    return CheckpointSaveError(f"could not write {final}: {reason}; {kept}")
