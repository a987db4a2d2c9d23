"""Adapters of any method with a ΔW as LoRA checkpoints, which everything reads."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.core.changes import total
from deltatune.errors import CannotMergeError, ConfigError
from deltatune.methods.lora import LoraConfig
from deltatune.plain_lora import Builder, LoraReport
from deltatune.state import find_adapters, get_peft_model_state_dict, write_adapter

#: the name under which the LoRA is attached while it is read out
TEMPORARY = "deltatune_lora"


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether an adapter changes weights by a ΔW, so that it can be written as a LoRA."""
    adapters = find_adapters(model)
    adapters.check(adapter_name)
    try:
        _builder(model, None, adapter_name, False)
    except (CannotMergeError, ConfigError):
        return False
    return True


def convert_to_lora(
    model: nn.Module,
    rank: int | float | None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as a LoRA: its configuration and the tensors of its checkpoint. The model does not change.

    Biases and whole modules that the adapter trains come along.

    Args:
        rank: of every weight's factors; a float in (0, 1] is a share of ‖ΔW‖², and every weight gets the fewest
            ranks that hold it; None takes all there are, so that outputs are the same.
        progressbar: show one; large matrices take seconds each.

    Raises:
        CannotMergeError: the adapter has no ΔW. ConfigError: an impossible rank.
    """
    if compile_kwargs is not None:
        raise ConfigError("compile_kwargs has nothing to compile: a conversion is one decomposition per weight")
    with as_lora(model, rank, adapter_name, progressbar) as (name, _):
        config = copy.copy(find_adapters(model).configs[name])
        assert isinstance(config, LoraConfig)
        state = get_peft_model_state_dict(model, adapter_name=name)
        return config, {key: tensor.detach().clone() for key, tensor in state.items()}


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float | None = None,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> LoraReport:
    """Writes an adapter as a LoRA checkpoint into the directory `path`; arguments as `convert_to_lora`.

    Returns:
        the rank and the error of every weight.

    Raises:
        CannotMergeError, ConfigError: as there. OSError: nothing was replaced.
    """
    if compile_kwargs is not None:
        raise ConfigError("compile_kwargs has nothing to compile: a conversion is one decomposition per weight")
    if os.path.isfile(path):
        raise ConfigError(f"{os.fspath(path)!r} is a file; save_as_lora needs a directory")
    with as_lora(model, rank, adapter_name, progressbar) as (name, report):
        tensors = get_peft_model_state_dict(model, adapter_name=name)
        write_adapter(find_adapters(model), name, Path(path), tensors)
        return report


@contextlib.contextmanager
def as_lora(
    model: nn.Module, rank: int | float | None, adapter_name: str = "default", progressbar: bool = False
) -> Iterator[tuple[str, LoraReport]]:
    """The model has the adapter as a LoRA too while the body runs, not active: (its name, its report)."""
    adapters = find_adapters(model)
    report = _builder(model, rank, adapter_name, progressbar).add(TEMPORARY)
    try:
        yield TEMPORARY, report
    finally:
        adapters.delete(TEMPORARY)


def _builder(model: nn.Module, rank: int | float | None, name: str, progress: bool) -> Builder:
    builder = Builder(
        find_adapters(model),
        [name],
        lambda changes: total([c for c in changes if c is not None]),
        lambda changes: rank,
        progress=progress,
    )
    _check_rank(rank, max(min(builder.refs[p].full_shape[-2:]) for p in builder.matrices))
    return builder


def _check_rank(rank: int | float | None, limit: int) -> None:
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ConfigError(f"rank must be a whole number, a share in (0, 1] or None, not {rank!r}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(f"a rank of {rank!r} is a share of the change and must be in (0, 1]; for ranks use an int")
    if isinstance(rank, int) and not 1 <= rank <= limit:
        raise ConfigError(
            f"rank must be at least 1 and at most {limit}, the full rank of the largest weight, not {rank}"
        )
