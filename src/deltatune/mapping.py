"""From a model and a configuration to an adapted model."""

from __future__ import annotations

import contextlib

from torch import Tensor, nn

from deltatune.config import PeftConfig
from deltatune.core.adapters import AdapterSet, adapters_of
from deltatune.core.checkpoint import load_adapter_state
from deltatune.errors import ConfigError
from deltatune.inits import loading
from deltatune.peft_model import PeftModel, class_for


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freezes `model` and attaches an adapter to it, in place; any `nn.Module` will do.

    Args:
        mixed: accepted for peft's sake; adapters of different methods always go together here.
        revision: of the base, written into the configuration.

    Raises:
        TargetError, ConfigError: one sentence; the model is as before.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("this model is a PeftModel already; use add_adapter for another adapter")
    if not isinstance(model, nn.Module) or not isinstance(peft_config, PeftConfig):
        given = f"{type(model).__name__} and {type(peft_config).__name__}"
        raise ConfigError(
            f"get_peft_model takes a model (an nn.Module) and a configuration, in this order, not {given}"
        )
    if revision is not None:
        peft_config.revision = revision
    return class_for(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Attaches and activates an adapter in place and returns the same model, without a PeftModel around it."""
    adapters = adapters_of(model) or AdapterSet(model)
    with loading() if state_dict is not None else contextlib.nullcontext():
        adapters.add(peft_config, adapter_name, meta=low_cpu_mem_usage)
    mine = {id(p) for p in adapters.parameters(adapter_name)}
    others = {id(p) for n in adapters.configs for p in adapters.parameters(n)} - mine
    for p in model.parameters():
        if id(p) not in mine and id(p) not in others:
            p.requires_grad_(False)
    adapters.activate([*adapters.plan.active, adapter_name])
    if state_dict is not None:
        load_adapter_state(adapters, adapter_name, state_dict)
    return model
