"""EVA under peft's names: an attached adapter is started anew from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltatune.core.checkpoint import PREFIX
from deltatune.errors import ConfigError, hint
from deltatune.inits._watch import Spot
from deltatune.inits.data import Forward, base_of, call_model, reattach, run_batches, spots_of
from deltatune.inits.eva import (
    EvaCollector,
    EvaHooks,
    LayerInputs,
    prepare_model_inputs_fn_language_modeling,
    use_components,
)


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """Calls the model as its inputs ask for; peft's name."""
    return call_model(model, inputs)


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """The tokens of a linear layer's input that count, `(n, in)`."""
    x: Tensor = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    mask = model_input if isinstance(model_input, Tensor) else None
    return x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Forward | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | dict[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """path -> the rows of A, `(r_i, in)`, that EVA gives each weight; see peft for the arguments.

    Args:
        model: a PeftModel whose adapter is meant, or a base model with `peft_config`.

    Raises:
        ConfigError: there is no configuration for EVA, or the data are not enough.
    """
    _, adapters = base_of(model)
    if peft_config is None:
        if adapters is None:
            raise ConfigError("get_eva_state_dict needs peft_config for a model without adapters")
        adapters.check(adapter_name)
        peft_config = adapters.configs[adapter_name]
    if getattr(peft_config, "init_lora_weights", None) != "eva":
        raise ConfigError('EVA needs a LoraConfig with init_lora_weights="eva"')
    own = prepare_layer_inputs_fn is prepare_layer_inputs_fn_language_modeling
    layer_inputs = None if own else prepare_layer_inputs_fn
    prefix = PREFIX if hasattr(model, "base_model") and adapters is not None else ""
    hooks = EvaHooks(prepare_model_inputs_fn, layer_inputs, gather_distributed_inputs, prefix)
    collector = EvaCollector(model, peft_config, hooks)
    run_batches(model, collector, dataloader, forward_fn or call_model, progress=show_progress_bar)
    return {f"{prefix}{name}": a for name, a in collector.components().items()}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs | dict[str, LayerInputs] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> nn.Module:
    """Starts an attached adapter by EVA, from data or from what `get_eva_state_dict` gave; see peft.

    Its tensors are new objects of other ranks: call this before an optimiser is made.

    Raises:
        ConfigError: neither or both sources are given, the adapter is not for EVA, or the data are not enough.
    """
    if (dataloader is None) == (eva_state_dict is None):
        raise ConfigError("initialize_lora_eva_weights takes either a dataloader or an eva_state_dict")
    if dataloader is not None:
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    assert eva_state_dict is not None
    _, adapters = base_of(model)
    if adapters is None:
        raise ConfigError("initialize_lora_eva_weights needs a model with an adapter; attach it with get_peft_model")
    adapters.check(adapter_name)
    config: Any = adapters.configs[adapter_name]
    spots = spots_of(model, config)
    components = {k.removeprefix(PREFIX): t for k, t in eva_state_dict.items()}
    _check_components(spots, components)
    config.prepared = use_components(config, spots, components)
    reattach(adapters, adapter_name)
    return model


def _check_components(spots: Sequence[Spot], components: Mapping[str, Tensor]) -> None:
    names = {spot.name: spot for spot in spots}
    for name, a in components.items():
        if name not in names:
            raise ConfigError(f"eva_state_dict has {name!r}, which is not adapted{hint(name, names)}")
        if a.ndim != 2 or a.shape[1] != names[name].ref.shape[-1]:
            wanted = names[name].ref.shape[-1]
            raise ConfigError(f"eva_state_dict[{name!r}] has shape {tuple(a.shape)}; (r, {wanted}) is needed")
    for name in names:
        if name not in components:
            raise ConfigError(f"eva_state_dict lacks {name!r}{hint(name, components)}")
