"""A pair begins anew: what is asked of pairs that are drawn again, how they are, and courses that begin again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

from deltatune.core.adapters import LOW_PRECISION
from deltatune.core.edits import Delta
from deltatune.core.sharded import fill
from deltatune.errors import ConfigError
from deltatune.inits import Request, find_init
from deltatune.inits import start as start_of
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._base import deltas_of, where
from deltatune.schedules._optimizer import check_own_weights, seeded
from deltatune.schedules.base import Run

Curve = Literal["given", "linear", "cosine"]


def redrawable(run: Run, procedure: str) -> list[LoraDelta]:
    """The pairs of an adapter, all of which can be folded into the base and drawn anew.

    Raises:
        ConfigError: one cannot, or the optimiser would undo it.
    """
    deltas = deltas_of(run, procedure)
    check_own_weights(run.optimizer, procedure)
    config: Any = run.adapters.configs[run.adapter] if run.adapters is not None else None
    for delta in deltas:
        if type(delta) is not LoraDelta or delta.start is not None:
            raise ConfigError(
                f"{procedure} re-draws a plain LoRA, and the adapter at {where(delta)!r} is another; use LoraConfig "
                "with init_lora_weights=True or 'gaussian'"
            )
    if not deltas:
        raise ConfigError(f"{procedure} re-draws LoRA's pairs, and this adapter has none; use LoraConfig")
    if find_init(config.init_name)[0].needs_data or find_init(config.init_name)[0].freezes_b:
        raise ConfigError(f"{procedure} draws the pair anew; init {config.init_name!r} cannot be drawn, use True")
    warn_of_rounding(deltas, procedure)
    return [d for d in deltas if isinstance(d, LoraDelta)]


def warn_of_rounding(deltas: Sequence[Delta], procedure: str) -> None:
    """Warns where the base has so few bits that small changes are lost."""
    if any(d.ref.dtype in LOW_PRECISION for d in deltas):
        warnings.warn(
            f"{procedure} folds into a bfloat16 base, whose 8 bits round small changes away; dtype=float32 keeps them",
            stacklevel=5,
        )


@torch.no_grad()
def redraw(run: Run, deltas: Sequence[LoraDelta], number: int) -> int:
    """Draws the pairs anew by the adapter's own init; the parameters stay the same objects.

    Args:
        number: of the restart; with the run's seed it decides what is drawn.

    Returns:
        The seed of this restart.
    """
    seed = run.seed + 7919 * number
    assert run.adapters is not None
    config: Any = run.adapters.configs[run.adapter]
    with seeded(seed, deltas[0].ref.device):
        for delta in deltas:
            ref = delta.ref
            fresh = start_of(Request(config.init_for(ref), ref, where(delta), delta.r, delta.scale, config))
            for slot, value in zip(
                (delta.lora_A, delta.lora_B), ref.op.pack(ref.module, fresh.a, fresh.b), strict=True
            ):
                fill(slot.weight, value)
    return seed


def course(step: int, length: int, curve: Curve, warmup: int) -> float:
    """The factor of the learning rate at a step of one stage: a rise over `warmup` steps, then down to 0, or flat."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(length - warmup, 1)
    if curve == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if curve == "cosine" else 1.0


def check_curve(curve: str) -> None:
    """Raises ConfigError unless `curve` is one of `Curve`."""
    if curve not in ("given", "linear", "cosine"):
        raise ConfigError(f"curve must be 'given', 'linear' or 'cosine', not {curve!r}")
