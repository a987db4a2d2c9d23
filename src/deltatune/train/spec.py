"""The parts of a recipe that say how to train, evaluate and report. Data has its own spec in `data.py`.

Names follow `transformers.TrainingArguments` where both have the thing, so that what people know carries over.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
#: YAML reads a bare `no` as false
Interval = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(lambda value: "no" if value is False else value)]


class Spec(BaseModel):
    """Base of every recipe section: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class MergeAware(Spec):
    """Training with the merged weight rounded as a merge into a quantised base's own storage rounds it."""

    start: float = Field(0.0, ge=0, lt=1, description="Share of the steps that run as plain QLoRA before.")
    rounding: Literal["dithered", "nearest"] = Field(
        "dithered", description="dithered lets changes below half a step of the grid through; nearest does not."
    )
    seed: int = Field(0, description="Of the dither.")


def _switch(value: Any) -> Any:
    """True and false stand for the defaults and for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class TrainSpec(Spec):
    """How long, how fast, in which precision, and what is kept on the way."""

    epochs: float = Field(3.0, gt=0, description="Passes over the training set; `max_steps` overrides it.")
    max_steps: int | None = Field(None, gt=0, description="Optimiser steps in all.")
    batch_size: int = Field(8, gt=0, description="Rows per device and forward pass.")
    gradient_accumulation: int = Field(1, gt=0, description="Forward passes per optimiser step.")
    learning_rate: float = Field(2e-4, gt=0)
    lr_scheduler: Scheduler = "linear"
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    warmup_steps: int | None = Field(None, ge=0, description="Steps of linear warm-up.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Warm-up as a share of all steps.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient norm here; 0 is off.")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    optim: str = Field("adamw_torch", description="Any optimiser name of transformers' Trainer.")
    optim_args: str | None = Field(None, description="`key=value,key=value`, given to the optimiser.")
    optim_target_modules: list[str] | str | None = Field(
        None, description="What GaLore and APOLLO project: names, a regular expression, or all-linear (the default)."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Arithmetic of the forward pass; auto is bf16 where a GPU has it, else fp32."
    )
    merge_aware: Annotated[MergeAware | None, BeforeValidator(_switch)] = Field(
        None,
        description="On a quantised base: train with the merged weight rounded as a merge into the same storage rounds "
        "it, so that such a merge is what was trained. True, or start, rounding and seed.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    neftune_noise_alpha: float | None = Field(None, gt=0, description="NEFTune: noise on the embeddings.")
    torch_compile: bool = False
    full_determinism: bool = Field(False, description="Deterministic GPU kernels, slower.")
    group_by_length: bool = Field(False, description="Batches of like length: less padding.")
    padding_free: bool = Field(
        False, description="Each batch as one row without padding: the same loss, less work on short examples."
    )
    init_batches: int = Field(
        8, gt=0, description="Batches run first where the method's init starts from data (eva, corda, lora_ga)."
    )
    num_workers: int = Field(0, ge=0, description="Processes that load data.")
    seed: int = 42
    logging_steps: int = Field(10, gt=0)
    logging: list[str] = Field(
        default_factory=list,
        description="Besides metrics.jsonl: csv, tensorboard, or another reporter of transformers (wandb, …).",
    )
    eval_strategy: Interval = Field("no", description="When to evaluate during training.")
    eval_steps: int | None = Field(None, gt=0)
    save_strategy: Interval = Field("epoch", description="When to write a checkpoint.")
    save_steps: int | None = Field(None, gt=0)
    save_total_limit: int | None = Field(2, gt=0, description="Checkpoints to keep.")
    load_best: bool = Field(False, description="End with the best checkpoint instead of the last.")
    metric_for_best: str = Field("loss", description="Metric that says which checkpoint is best.")
    greater_is_better: bool | None = Field(None, description="Default: yes, unless the metric is a loss.")
    early_stopping_patience: int | None = Field(None, gt=0, description="Evaluations without a gain.")
    early_stopping_threshold: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            raise ValueError("train.eval_strategy is 'steps': set train.eval_steps as well")
        if self.save_strategy == "steps" and self.save_steps is None:
            raise ValueError("train.save_strategy is 'steps': set train.save_steps as well")
        if self.eval_strategy != "steps" and self.eval_steps is not None:
            raise ValueError("train.eval_steps is used only with train.eval_strategy=steps")
        if self.save_strategy != "steps" and self.save_steps is not None:
            raise ValueError("train.save_steps is used only with train.save_strategy=steps")
        if self.warmup_steps is not None and self.warmup_ratio > 0:
            raise ValueError("train.warmup_steps and train.warmup_ratio say the same thing: set one of them")
        if self.padding_free and self.group_by_length:
            raise ValueError("train.padding_free leaves no padding for train.group_by_length to save: use one")
        for name, wanted in (("load_best", self.load_best), ("early_stopping_patience", self._stops_early)):
            if wanted and self.eval_strategy == "no":
                raise ValueError(f"train.{name} needs evaluations: set train.eval_strategy to steps or epoch")
        if self.load_best and (self.save_strategy, self.save_steps) != (self.eval_strategy, self.eval_steps):
            raise ValueError(
                "train.load_best needs a checkpoint at every evaluation: "
                "give train.save_strategy and train.save_steps the values of eval_strategy and eval_steps"
            )
        return self

    @property
    def _stops_early(self) -> bool:
        return self.early_stopping_patience is not None


class EvalSpec(Spec):
    """What is measured on the held-out examples, and which of them are shown."""

    before: bool = Field(True, description="Measure the base model first, for the before/after table.")
    after: bool = Field(True, description="Measure the tuned model at the end.")
    batch_size: int = Field(16, gt=0)
    max_new_tokens: int | None = Field(
        None, gt=0, description="Length of generated answers; default: what the longest label needs."
    )
    generate: bool = Field(
        True, description="Write out answers and score them, where the data has short answers; else loss only."
    )
    score_labels: bool = Field(
        False, description="Also choose the likeliest label of a closed set; one more pass for each label."
    )
    generate_during_training: bool = Field(
        False, description="Score answers at every evaluation, so that metric_for_best can be accuracy."
    )
    samples: int = Field(3, ge=0, description="Held-out examples shown with the answers of base and tuned.")
    sample_during_training: bool = Field(
        False, description="Write those examples' answers to samples.jsonl at every evaluation."
    )


class ReportSpec(Spec):
    """Which files describe the finished run."""

    plot: bool = Field(True, description="Write loss.png.")
    model_card: bool = Field(True, description="Write README.md, a model card.")
