"""A quantised model as an ordinary one: every weight in few bits unpacked, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.errors import CannotMergeError
from deltatune.stores import find_store, put_weight, quantised, settle, strip

#: what transformers keeps on a model that it has quantised
FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Gives every quantised layer an ordinary weight, one at a time; a model without any stays as it is.

    Args:
        dtype: of the weights; default: what their layers compute in.

    Raises:
        CannotMergeError: a storage does not say which ordinary layer stands for it.
    """
    from deltatune.core.merge import dense_dtype

    for path, module in model.named_modules():
        weight = quantised(module)
        if weight is not None:
            store: Any = find_store(weight)
            plain = getattr(store, "dense_layer", None)
            if plain is None:
                raise CannotMergeError(
                    f"{type(store).__name__} at {path!r} does not say how its layer becomes a dense one"
                )
            value = store.load(weight).to(dtype or dense_dtype(store, weight, model))
            put_weight(module, "weight", nn.Parameter(value, requires_grad=False), plain)
            strip(module, store)
    _unmark(model)
    return model


def keep_savable(model: nn.Module) -> None:
    """Drops what transformers did to tensors in reading quantised files and cannot undo in writing.

    The state dict of such layers is what the files hold, so that there is nothing to undo. Layers keep it so.
    """
    settle(model, still=True)
    done = model.__dict__.get("_weight_conversions")
    if done:
        model._weight_conversions = [step for step in done if _turns_back(step)]  # type: ignore[assignment]


def _turns_back(step: Any) -> bool:
    try:
        step.reverse_transform()
    except NotImplementedError:
        return False
    return True


def _unmark(model: nn.Module) -> None:
    """Nothing may tell transformers that the model is quantised still."""
    keep_savable(model)
    for name in FLAGS:
        model.__dict__.pop(name, None)
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        del config.quantization_config
