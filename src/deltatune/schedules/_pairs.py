"""The pairs of a plain LoRA and their gradients, as matrices: what rules on gradients of A and B work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltatune.core.sharded import fill, whole
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._base import where
from deltatune.schedules.base import Run

#: added to the diagonal of Gram matrices before they are inverted
TINY = 1e-8


def pairs_of(run: Run, procedure: str) -> list[LoraDelta]:
    """The pairs of an adapter whose A and B both train.

    Raises:
        ConfigError: there is none, or a delta is more than s · B A.
    """
    lora = [e for e in run.edits() if isinstance(e, LoraDelta)]
    for delta in lora:
        if type(delta) is not LoraDelta:
            raise ConfigError(
                f"{procedure} is a rule for s · B A, and the adapter at {where(delta)!r} is more than that "
                f"({type(delta).__name__}); use a plain LoraConfig"
            )
        if not (delta.lora_A.trainable and delta.lora_B.trainable):
            raise ConfigError(
                f"{procedure} moves A and B together, and only one of them trains at {where(delta)!r}; use LoraConfig"
            )
    if not lora:
        raise ConfigError(f"{procedure} works on LoRA's pairs, and this model has none; use get_peft_model, LoraConfig")
    return lora


def factors(delta: LoraDelta) -> tuple[Tensor, Tensor]:
    """A `(*batch, r, in)` and B `(*batch, out, r)` in at least float32, without s."""
    return _matrices(delta, delta.lora_A.weight, delta.lora_B.weight)


def gradients(delta: LoraDelta) -> tuple[Tensor, Tensor] | None:
    """The gradients of A and B, of the same shapes; None where a step has none."""
    a, b = delta.lora_A.weight.grad, delta.lora_B.weight.grad
    return None if a is None or b is None else _matrices(delta, a, b)


def set_gradients(delta: LoraDelta, a: Tensor, b: Tensor) -> None:
    """Replaces the gradients of A and B."""
    for slot, value in zip((delta.lora_A, delta.lora_B), delta.ref.op.pack(delta.ref.module, a, b), strict=True):
        assert slot.weight.grad is not None
        fill(slot.weight.grad, value)


def _matrices(delta: LoraDelta, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = delta.ref.op.unpack(whole(a.detach()), whole(b.detach()))
    kind = torch.promote_types(a.dtype, torch.float32)
    return a.to(kind), b.to(kind)


def ridge(gram: Tensor, size: float = TINY) -> Tensor:
    """A Gram matrix with a little on its diagonal."""
    return gram + size * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def names_of(deltas: Sequence[LoraDelta]) -> list[str]:
    """A name for each delta, by which checkpoints know it; parts of one weight are numbered."""
    return [f"{i}:{where(delta)}" for i, delta in enumerate(deltas)]
