"""What is attached where, and in which state: for people who debug and programs that check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from deltatune.core.hosts import Host
from deltatune.core.sites import base_modules
from deltatune.state import find_adapters

Flag = bool | Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted module. `requires_grad` and `devices` are per adapter."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """The whole model; numbers of parameters count trained copies once."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Flag]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


def _flag(values: list[bool]) -> Flag:
    return values[0] if len(set(values)) == 1 else "irregular"


def _tensors(edits: Any) -> list[Any]:
    return [slot.weight for edit in edits for slot in edit.slots if slot.trainable]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of every adapted module, in the model's order."""
    adapters = find_adapters(model)
    plan = adapters.plan
    result = []
    for path, module in base_modules(adapters.root):
        if not isinstance(module, Host):
            continue
        names = list(module._edits)
        tensors = {n: _tensors(module._edits[n]) for n in names}
        stores = [type(e.ref.store).__name__ for es in module._edits.values() for e in es if hasattr(e, "ref")]
        backend = next((s.removesuffix("Store") for s in stores if s != "DenseStore"), None)
        result.append(
            TunerLayerStatus(
                name=f"model.{path}" if path else "model",
                module_type=type(module).__name__,
                enabled=plan.enabled,
                active_adapters=[n for n in plan.active if n in names],
                merged_adapters=[n for n in plan.merged if n in names],
                requires_grad={n: _flag([t.requires_grad for t in ts]) for n, ts in tensors.items() if ts},
                available_adapters=names,
                devices={n: sorted({t.device.type for t in ts}) for n, ts in tensors.items()},
                quantization_backend=backend,
            )
        )
    return result


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the model as a whole."""
    adapters = find_adapters(model)
    layers = get_layer_status(model)
    trainable, total = adapters.count()
    tensors = {n: _tensors(edits) for n, edits in adapters.edits.items()}
    return TunerModelStatus(
        base_model_type=type(adapters.root).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={n: str(c.method) for n, c in adapters.configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=adapters.plan.enabled,
        active_adapters=list(adapters.plan.active),
        merged_adapters=list(adapters.plan.merged),
        requires_grad={n: _flag([t.requires_grad for t in ts]) for n, ts in tensors.items() if ts},
        available_adapters=list(adapters.configs),
        devices={n: sorted({t.device.type for t in ts}) for n, ts in tensors.items()},
        quantization_backend=next((s.quantization_backend for s in layers if s.quantization_backend), None),
    )
