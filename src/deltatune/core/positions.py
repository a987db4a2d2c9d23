"""Rotary positions for a longer context: linear interpolation (arXiv 2306.15595), position m becomes m / factor."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from deltatune.core.edits import AdapterTensors
from deltatune.errors import ConfigError


def interpolate_positions(root: nn.Module, length: int) -> int:
    """Linear interpolation of a model's rotary positions for a longer context; returns the factor.

    A model that reaches that length already stays as it is.

    Raises:
        ConfigError: its positions are not plain rotary ones.
    """
    return factor_of(root) if stretch(root, length) is not None else 1


def factor_of(root: nn.Module) -> int:
    """By which a model's positions are divided now."""
    rope = getattr(getattr(root, "config", None), "rope_parameters", None)
    linear = isinstance(rope, dict) and rope.get("rope_type") == "linear"
    return int(rope["factor"]) if linear and rope is not None else 1


def stretch_first(root: nn.Module, length: int) -> Callable[[], None] | None:
    """As `stretch`, for an adapter that is being attached: the positions of others must not change under them.

    Raises:
        ConfigError: other adapters are attached, which have the positions of a shorter context.
    """
    undo = stretch(root, length)
    if undo is not None and any(isinstance(m, AdapterTensors) for m in root.modules()):
        undo()
        raise ConfigError(
            f"context_length={length} changes the positions of the whole model, and other adapters are attached that "
            "have those of the shorter context; attach this adapter first, or to a model of its own"
        )
    return undo


def stretch(root: nn.Module, length: int) -> Callable[[], None] | None:
    """Interpolates in place; returns what undoes it, None where the model reaches that far already.

    Raises:
        ConfigError: the positions are not plain rotary ones.
    """
    config: Any = getattr(root, "config", None)
    known: int | None = getattr(config, "max_position_embeddings", None)
    if known is None:
        raise ConfigError(f"{type(root).__name__} does not say how long its context is; leave the context out")
    if known >= length:
        return None
    rotary = [m for m in root.modules() if hasattr(m, "inv_freq") and hasattr(m, "rope_type")]
    rope = getattr(config, "rope_parameters", None)
    if not rotary or not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ConfigError(
            "positions of this model cannot be interpolated, for they are not plain rotary ones; leave the context "
            "out, or set the scaling in the model's own configuration"
        )
    factor = math.ceil(length / known)
    _set(config, rotary, {**rope, "rope_type": "linear", "factor": float(factor)}, known * factor)
    return partial(_set, config, rotary, rope, known)  # not a closure: a copied model undoes itself


def _set(config: Any, rotary: list[nn.Module], rope: dict[str, Any], length: int) -> None:
    """Gives a model these positions: its configuration, and what the rotary modules have computed from it."""
    config.rope_parameters, config.max_position_embeddings = rope, length
    for module in rotary:
        fresh: Any = type(module)(config=config).to(next(module.buffers()).device)
        module.__dict__.update({k: v for k, v in fresh.__dict__.items() if not k.startswith("_") and k != "training"})
        module._buffers.update(fresh._buffers)
