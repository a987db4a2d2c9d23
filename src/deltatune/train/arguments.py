"""From a recipe to `transformers.TrainingArguments`, with what this machine cannot do said beforehand."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.errors import ConfigError, hint

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from deltatune.train.recipe import Recipe
    from deltatune.train.spec import TrainSpec

#: metrics that every evaluation has; others need answers, see `eval.generate_during_training`
LOSS_METRICS = ("loss", "perplexity")
#: logging targets that are ours and not a reporter of transformers
OWN_LOGGING = ("csv",)


def total_steps(spec: TrainSpec, rows: int) -> int:
    """Optimiser steps of a run over `rows` training rows, as the trainer counts them."""
    batches = math.ceil(rows / spec.batch_size)
    per_epoch = max(math.ceil(batches / spec.gradient_accumulation), 1)
    return spec.max_steps or math.ceil(spec.epochs * per_epoch)


def training_arguments(recipe: Recipe, directory: Path, rows: int) -> TrainingArguments:
    """The trainer's arguments for `recipe`, whose training set has `rows` rows."""
    from transformers import TrainingArguments

    spec = recipe.train
    steps = total_steps(spec, rows)
    warmup = spec.warmup_steps if spec.warmup_steps is not None else math.ceil(spec.warmup_ratio * steps)
    precision = resolve_precision(recipe)
    watched = spec.load_best or spec.early_stopping_patience is not None
    args = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps or -1,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=recipe.eval.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.lr_scheduler,
        lr_scheduler_kwargs=spec.lr_scheduler_kwargs or None,
        warmup_steps=warmup,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim=spec.optim,
        optim_args=spec.optim_args,
        optim_target_modules=_projected(spec),
        adam_beta1=spec.adam_beta1,
        adam_beta2=spec.adam_beta2,
        adam_epsilon=spec.adam_epsilon,
        use_cpu=accelerator() is None,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        neftune_noise_alpha=spec.neftune_noise_alpha,
        torch_compile=spec.torch_compile,
        full_determinism=spec.full_determinism,
        dataloader_num_workers=spec.num_workers,
        dataloader_pin_memory=accelerator() is not None,
        seed=spec.seed,
        data_seed=spec.seed,
        logging_steps=spec.logging_steps,
        logging_nan_inf_filter=False,
        report_to=[name for name in spec.logging if name not in OWN_LOGGING] or "none",
        eval_strategy=spec.eval_strategy,
        eval_steps=spec.eval_steps,
        save_strategy=spec.save_strategy,
        save_steps=spec.save_steps or 500,
        save_total_limit=spec.save_total_limit,
        load_best_model_at_end=spec.load_best,
        metric_for_best_model=spec.metric_for_best if watched else None,
        greater_is_better=greater_is_better(spec) if watched else None,
        restore_callback_states_from_checkpoint=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # never nn.DataParallel: it would copy hosts to every device
    return args


def _projected(spec: TrainSpec) -> list[str] | str | None:
    """What a projecting optimiser projects; all linear layers if nobody says."""
    if any(part in spec.optim for part in PROJECTING):
        return spec.optim_target_modules or "all-linear"
    return None


def greater_is_better(spec: TrainSpec) -> bool:
    """Whether more of the watched metric is better: yes for all but losses and what comes from them."""
    if spec.greater_is_better is not None:
        return spec.greater_is_better
    return spec.metric_for_best not in (*LOSS_METRICS, "invalid")


def resolve_precision(recipe: Recipe) -> str:
    """fp32, bf16 or fp16 for the forward pass on this machine."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if _has_bf16_accelerator() else "fp32"


def resolve_dtype(recipe: Recipe) -> str:
    """Name of the type that the base weights are loaded in."""
    if recipe.dtype != "auto":
        return recipe.dtype
    return "bfloat16" if _has_bf16_accelerator() else "float32"


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """The forward pass's type where it is not the weights' own."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolve_precision(recipe))


def accelerator() -> str | None:
    """`cuda` or the like if this machine has one."""
    import torch

    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return device.type if device is not None else None


def _has_bf16_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def check_machine(recipe: Recipe) -> None:
    """Refuse early what this machine or installation cannot do.

    Raises:
        ConfigError: one sentence with the setting to change or the package to install.
    """
    spec = recipe.train
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("deltatune train runs in one process: start it without torchrun or accelerate launch")
    if spec.precision == "fp16" and accelerator() is None:
        raise ConfigError("train.precision=fp16 needs a GPU: use fp32 or bf16 on the CPU")
    if spec.precision == "fp16" and recipe.dtype == "bfloat16":
        raise ConfigError("train.precision=fp16 and dtype=bfloat16 contradict each other: use one of them")
    _check_optimizer(spec.optim)
    _check_projection(recipe)
    _check_in_backward(recipe)
    _check_logging(spec)
    _check_metric(recipe)


#: what keeps an optimiser of transformers from training here
_UNFIT = {
    "xla": "it runs on TPUs",
    "npu": "it runs on Ascend NPUs",
    "anyprecision": "its package, torchdistx, is no longer maintained",
    "galore_adafactor_layerwise": "transformers gives it a learning rate and relative_step, which it refuses",
}
#: optimisers whose state can be on a GPU only
_ON_GPU = ("adalomo", "galore_adamw_8bit")
#: a part of an optimiser's name, the package that implements it, how to install that; the first hit counts
_PACKAGES = (
    ("adamw_torch_8bit", "torchao", "torchao"),
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("galore", "galore_torch", "galore-torch"),
    ("8bit", "bitsandbytes", '"deltatune[quant]"'),
    ("paged", "bitsandbytes", '"deltatune[quant]"'),
    ("bnb", "bitsandbytes", '"deltatune[quant]"'),
    ("lion", "bitsandbytes", '"deltatune[quant]"'),
    ("ademamix", "bitsandbytes", '"deltatune[quant]"'),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
)
#: those that project the gradients of whole weights
PROJECTING = ("galore", "apollo")


def _check_optimizer(optim: str) -> None:
    from transformers.training_args import OptimizerNames

    names = [str(name.value) for name in OptimizerNames]
    if optim not in names:
        raise ConfigError(f"train.optim {optim!r} is no optimiser of transformers{hint(optim, names)}")
    for part, reason in _UNFIT.items():
        if part in optim:
            raise ConfigError(f"train.optim={optim} cannot be used: {reason}; use adamw_torch")
    if accelerator() is None:
        _check_without_gpu(optim, names)
    for part, package, install in _PACKAGES:
        if part in optim:
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"train.optim={optim} needs {package}, which is not installed: pip install {install}")
            return


def _check_without_gpu(optim: str, names: Sequence[str]) -> None:
    """Raises ConfigError for what needs a GPU; names the nearest that does not."""
    near = optim.removeprefix("paged_") if optim.startswith("paged_") else optim.replace("_8bit", "")
    use = f"use {near}, or adamw_torch" if near in names and near != optim else "use adamw_torch"
    if optim.startswith("paged"):
        raise ConfigError(
            f"train.optim={optim} moves its state between GPU and main memory, and there is no GPU: {use}"
        )
    if optim.startswith(_ON_GPU):
        raise ConfigError(f"train.optim={optim} keeps its state on a GPU, and there is none: {use}")


def _check_in_backward(recipe: Recipe) -> None:
    """What steps inside the backward pass leaves no gradients for anything else."""
    from deltatune import get_peft_config

    spec = recipe.train
    if not (spec.optim.endswith("layerwise") or "lomo" in spec.optim):
        return
    known = [recipe.procedure["name"]] if recipe.procedure else []
    known += [procedure.name for procedure in get_peft_config(dict(recipe.method)).procedures()]
    other = spec.optim.removesuffix("_layerwise") if spec.optim.endswith("layerwise") else "adamw_torch"
    if known:
        raise ConfigError(
            f"train.optim={spec.optim} steps during the backward pass, where procedure {known[0]!r} cannot see it: "
            f"use {other}"
        )
    if spec.gradient_accumulation > 1:
        raise ConfigError(
            f"train.optim={spec.optim} steps during every backward pass, so gradients cannot be accumulated: set "
            "train.gradient_accumulation=1"
        )
    if spec.optim == "adalomo" and spec.save_strategy != "no":
        raise ConfigError(
            "train.optim=adalomo keeps moments that no checkpoint holds, so a run could not go on: set "
            "train.save_strategy=no"
        )


def _check_projection(recipe: Recipe) -> None:
    """GaLore and APOLLO need whole weights that train, and keep a state that only some checkpoints can hold."""
    spec = recipe.train
    projects = any(part in spec.optim for part in PROJECTING)
    if not projects:
        if spec.optim_target_modules is not None:
            raise ConfigError(
                f"train.optim_target_modules says what GaLore and APOLLO project, not {spec.optim}; drop it"
            )
        return
    if not recipe.method.get("in_place"):
        raise ConfigError(
            f"train.optim={spec.optim} projects the gradients of whole weights, which are frozen here: use method FULL "
            "with in_place=true, or adamw_torch"
        )
    if spec.save_strategy != "no":
        raise ConfigError(
            f"train.optim={spec.optim} keeps its projections as objects that no checkpoint can be read back with: set "
            "train.save_strategy=no"
        )


def _check_logging(spec: TrainSpec) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    known = [*OWN_LOGGING, *INTEGRATION_TO_CALLBACK]
    for name in spec.logging:
        if name not in known:
            raise ConfigError(f"train.logging has no target {name!r}{hint(name, known)}")
        if name not in OWN_LOGGING and name not in get_available_reporting_integrations():
            raise ConfigError(f"train.logging={name} needs {name}, which is not installed: pip install {name}")


def _check_metric(recipe: Recipe) -> None:
    spec = recipe.train
    watched = spec.load_best or spec.early_stopping_patience is not None
    answers = recipe.eval.generate and recipe.eval.generate_during_training
    if watched and spec.metric_for_best not in LOSS_METRICS and not answers:
        raise ConfigError(
            f"train.metric_for_best={spec.metric_for_best} needs answers at every evaluation: "
            "set eval.generate_during_training=true, or watch loss"
        )
