"""HOW a weight is stored: one small class per storage, `load` and `save`, nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor, nn

from deltatune.core.ops import class_names


class Store(Protocol):
    """How frozen numbers are kept. Stores hold no state of their own."""

    #: False where `save` rounds (quantised formats), so that merging reports an error instead of a surprise
    exact: bool

    def shape(self, param: Tensor) -> torch.Size:
        """The logical shape of the weight, whatever the packed tensor's shape is."""

    def dtype(self, param: Tensor) -> torch.dtype:
        """The floating type in which the layer computes."""

    def load(self, param: Tensor) -> Tensor:
        """The numbers as an ordinary tensor of the logical shape, detached."""

    def save(self, param: Tensor, value: Tensor) -> nn.Parameter:
        """A new parameter of the same storage that holds `value`; `param` is left as it was."""


class DenseStore:
    """Ordinary floating-point tensors."""

    exact = True

    def shape(self, param: Tensor) -> torch.Size:
        return param.shape

    def dtype(self, param: Tensor) -> torch.dtype:
        return param.dtype

    def load(self, param: Tensor) -> Tensor:
        return param.detach()

    def save(self, param: Tensor, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(param.dtype).contiguous(), requires_grad=param.requires_grad)


#: class of the parameter (qualified name) -> store
STORES: dict[str, Store] = {"torch.nn.parameter.Parameter": DenseStore()}


def register_store(class_name: str, store: Store) -> None:
    """Teach the core a storage: `class_name` is the qualified name of the parameter's (tensor's) class."""
    STORES[class_name] = store


#: package of the parameter's class -> the module here that knows its storages, imported when one is met
BACKENDS: dict[str, str] = {"bitsandbytes": "deltatune.stores.bnb"}


def find_store(param: Tensor) -> Store:
    """The store for a parameter, by its class; ordinary tensors are dense."""
    names = class_names(type(param)) + class_names(type(param.data))
    for name in names:
        package = name.partition(".")[0]
        if package in BACKENDS:
            import_module(BACKENDS[package])
    return next((STORES[n] for n in names if n in STORES), STORES["torch.nn.parameter.Parameter"])
