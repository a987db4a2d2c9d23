"""`layer_replication`: a deeper model whose new layers share the base's weights (arXiv 2312.15166's depth up-scaling,
without the memory), each with an adapter of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from deltatune.core.edits import AdapterTensors
from deltatune.core.sites import base_modules
from deltatune.errors import ConfigError


def replicate_layers(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Rebuilds the model's layer list from `[start, end)` ranges of it, in place; returns what undoes it.

    Raises:
        ConfigError: no layer list, or a range outside it, or adapters are attached already.
    """
    owner, name, layers = _layers(model)
    if any(isinstance(m, AdapterTensors) for m in model.modules()):
        raise ConfigError("layer_replication changes the layers, so it must be the first adapter of a model")
    for start, end in ranges:
        if not 0 <= start < end <= len(layers):
            raise ConfigError(
                f"layer_replication range [{start}, {end}) is not within the model's {len(layers)} layers"
            )
    order = [i for start, end in ranges for i in range(start, end)]
    seen: set[int] = set()
    new = []
    for place, i in enumerate(order):
        layer = _share(layers[i]) if i in seen else layers[i]
        seen.add(i)
        new.append((layer, place))
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    indices = [(m, m.layer_idx) for layer, _ in new for m in layer.modules() if hasattr(m, "layer_idx")]
    for layer, place in new:
        _number(layer, place)
    setattr(owner, name, nn.ModuleList(layer for layer, _ in new))
    if count is not None:
        config.num_hidden_layers = len(new)

    def undo() -> None:
        setattr(owner, name, layers)
        for module, index in indices:
            module.layer_idx = index
        if count is not None:
            config.num_hidden_layers = count

    return undo


def _layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The longest list of layers of one class, which is where a transformer keeps its blocks."""
    best: tuple[nn.Module, str, nn.ModuleList] | None = None
    for _, module in base_modules(model):
        for name, child in module.named_children():
            same = isinstance(child, nn.ModuleList) and len({type(m) for m in child}) == 1
            if same and (best is None or len(child) > len(best[2])):  # type: ignore[arg-type]
                best = (module, name, child)  # type: ignore[assignment]
    if best is None:
        raise ConfigError(f"{type(model).__name__} has no list of layers to replicate")
    return best


def _share(layer: nn.Module) -> nn.Module:
    """A copy of a layer's modules around the same parameters and buffers."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(t): t for t in tensors})


def _number(layer: nn.Module, place: int) -> None:
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = place  # type: ignore[assignment]
