"""Tensors that FSDP2 has cut into parts: whole for reading, cut again for writing. Others pass unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (differentiable); every process must call it."""
    full = getattr(tensor, "full_tensor", None)
    return full() if callable(full) else tensor


def part_like(value: Tensor, like: Tensor) -> Tensor:
    """`value`, whole and the same in every process, cut as `like` is."""
    here: Any = like
    value = value.to(here.device)
    if not hasattr(here, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, here.device_mesh, here.placements)


@torch.no_grad()
def fill(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded; the object stays, so an optimiser keeps its state."""
    target.copy_(part_like(value, target).to(target.dtype))
