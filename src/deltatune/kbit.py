"""`prepare_model_for_kbit_training`: what a quantised base needs before an adapter trains on it, and no more.

Nothing is upcast. Norms of transformers and torch compute in float32 whatever they are stored in; the output layer and
the embeddings stay as they are, which for a large vocabulary is gigabytes. peft's function of this name casts both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.errors import ConfigError
from deltatune.stores import find_store, quantised


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freezes the base and recomputes activations, non-reentrantly unless told otherwise.

    Args:
        gradient_checkpointing_kwargs: of torch's checkpointing; `use_reentrant` is False by default, so that frozen
            embeddings do not cut the gradient.

    Raises:
        ConfigError: the quantised layers compute in different types, or the model has no checkpointing.
    """
    check_compute_types(model)
    for param in model.parameters():
        param.requires_grad_(False)
    if use_gradient_checkpointing:
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        base: Any = model
        enable = getattr(base, "activation_checkpointing_enable", getattr(base, "gradient_checkpointing_enable", None))
        if enable is None:
            raise ConfigError(
                f"{type(model).__name__} has no gradient checkpointing; set use_gradient_checkpointing=False"
            )
        if options["use_reentrant"]:
            base.enable_input_require_grads()
        enable(options)
    return model


def check_compute_types(model: nn.Module) -> None:
    """Raises ConfigError if two quantised layers unpack to different types, which no call could add up unnoticed."""
    first: dict[torch.dtype, str] = {}
    for path, module in model.named_modules():
        weight = quantised(module)
        if weight is None:
            continue
        store: Any = find_store(weight)
        if getattr(store, "own_dtype", True):
            first.setdefault(store.dtype(weight), path)
    if len(first) > 1:
        (a, here), (b, there) = list(first.items())[:2]
        raise ConfigError(
            f"{here!r} computes in {str(a).removeprefix('torch.')} and {there!r} in {str(b).removeprefix('torch.')}: "
            "quantise all layers from weights of one type (dtype=… when loading)"
        )
