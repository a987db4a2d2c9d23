"""LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning (arXiv 2308.03303).

    y = W x + b + s · B (A x)        A: (r, in) frozen at its random start, B: (out, r) trained, zero at the start

The gradient of B needs A x, r numbers per position, and not x: what a linear layer keeps for backward does not grow
with its input. So there is no dropout on x, whose mask would have to be kept. Merged: W + s · B A.

The optimiser form, `project_gradients`, gives the optimiser

    g (A Aᵀ + 1e-8 I)⁻¹ / s²        for each gradient g of B

so that the first-order change of W is the whole gradient G projected onto the rows of A: s ΔB A = -η G Aᵀ (A Aᵀ)⁻¹ A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltatune.config import register
from deltatune.core.edits import Edit
from deltatune.core.sharded import fill, whole
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraConfig, LoraDelta


@register
@dataclass
class LoraFAConfig(LoraConfig):
    """LoRA-FA's configuration: LoRA's fields but dropout and DoRA.

    Raises:
        ConfigError: a value is out of range, or an option cancels the saving.
    """

    method: ClassVar[str] = "LORA_FA"
    summary: ClassVar[str] = "LoRA with A frozen: little is kept for backward"
    paper: ClassVar[str] = "arXiv 2308.03303"
    variants: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout is not possible in LoRA-FA: its mask would be kept for backward, as large as the input "
                "whose keeping the method avoids; set it to 0"
            )
        if self.use_dora:
            raise ConfigError("use_dora is not possible in LoRA-FA: magnitudes need the whole output for backward")

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        edit = super().build(ref, site)
        if isinstance(edit, LoraDelta):
            edit.lora_A.trainable = False
        return edit

    def init_for(self, ref: WeightRef) -> str:
        # an embedding's A starts at zero in LoRA, and frozen it would stay there
        return "gaussian" if ref.op.looks_up and self.init_name == "default" else self.init_name


def project_gradients(
    optimizer: torch.optim.Optimizer, model: nn.Module, adapter_name: str | None = None
) -> RemovableHandle:
    """LoRA-FA's optimiser form on any optimiser: B's gradients are projected just before each of its steps.

    Clipping and unscaling come first, as they do in a training loop. `.remove()` on what is returned ends it.

    Raises:
        ConfigError: no pair of the adapter has a frozen A and a B that trains.
    """
    from deltatune.schedules.attach import _find

    _, adapters, name = _find(model, adapter_name)
    deltas = frozen_a(adapters.edits[name] if adapters is not None else [], "project_gradients")

    def hook(*_: Any) -> None:
        for delta in deltas:
            project(delta)

    return optimizer.register_step_pre_hook(hook)


def frozen_a(edits: Sequence[Edit], who: str) -> list[LoraDelta]:
    """The pairs whose A is frozen and whose B trains.

    Raises:
        ConfigError: there is none.
    """
    deltas = [
        e
        for e in edits
        if isinstance(e, LoraDelta) and e.lora_B.weight.requires_grad and not e.lora_A.weight.requires_grad
    ]
    if not deltas:
        raise ConfigError(
            f"{who} needs pairs whose A is frozen and whose B trains, and this model has none; "
            "adapt it with LoraFAConfig"
        )
    return deltas


@torch.no_grad()
def project(delta: LoraDelta) -> None:
    """Projects the gradient of one B, in place."""
    grad = delta.lora_B.weight.grad
    if grad is None:
        return
    a, g = delta.ref.op.unpack(whole(delta.lora_A.weight.detach()), whole(grad))  # (*batch, r, in), (*batch, out, r)
    a, g = a.float(), g.float()
    gram = a @ a.mT + 1e-8 * torch.eye(a.shape[-2], device=a.device)
    projected = torch.linalg.solve(gram, g, left=False) / delta.scale**2
    fill(grad, delta.ref.op.pack(delta.ref.module, a, projected)[1])
