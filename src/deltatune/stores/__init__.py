"""HOW a weight is stored: one small class per storage, `load` and `save`, nothing else.

Most storages are a class of parameter (`STORES`). Some layers spread one weight over several tensors (integers, scales,
zero-points); those are known by the class of the layer (`LAYERS`), and their weight is one `Packed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltatune.core.ops import class_names
from deltatune.kernels.low_rank import Product


class Store(Protocol):
    """How frozen numbers are kept. Stores hold no state of their own.

    A store that knows its grid also has `move(param, change, draw, clip=False)`: a new parameter on the same grid,
    every number moved by `change` and rounded up or down by its `draw`, both of the logical shape; see `grid`.

    A store may have `dense_layer`, the class of an ordinary layer that computes the same from a dense weight; merging
    then goes into a dense weight unless it is asked to round. `leftovers` are the layer's attributes to drop when that
    is for good, and `own_dtype = False` says that the layer takes inputs of any floating type.
    `products` are the classes of layers (qualified names) whose forward is `x Wᵀ + b` and for which `product(layer, x)`
    gives a `Product` that a GPU computes from what is stored, or None where the layer or the input is not for it.
    `settle(layer, still)` is for layers that store their weight anew as they run: True puts it back and keeps the layer
    from it, False lets the layer go on.
    """

    #: False where `save` rounds (quantised formats), so that merging reports an error instead of a surprise
    exact: bool

    def shape(self, param: Any) -> torch.Size:
        """The logical shape of the weight, whatever the packed tensor's shape is."""

    def dtype(self, param: Any) -> torch.dtype:
        """The floating type in which the layer computes."""

    def load(self, param: Any) -> Tensor:
        """The numbers as an ordinary tensor of the logical shape, detached."""

    def save(self, param: Any, value: Tensor) -> Any:
        """A new parameter of the same storage that holds `value`; `param` is left as it was."""


@dataclass(eq=False)
class Packed:
    """A weight that a layer keeps in several tensors; stands where a parameter does.

    Attributes:
        tensors: name in the layer -> tensor.
        about: whatever else reading needs (bits, shape, group size), by the layer's attribute or the store's own name.
    """

    store: LayerStore
    tensors: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    requires_grad = False

    @property
    def _first(self) -> Tensor:
        return next(iter(self.tensors.values()))

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def is_meta(self) -> bool:
        return self._first.is_meta

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def shape(self) -> torch.Size:
        return self.store.shape(self)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def is_floating_point(self) -> bool:
        return False


class LayerStore(Store, Protocol):
    """A storage that is known by the layer."""

    def gather(self, layer: nn.Module) -> Packed:
        """The layer's weight; its tensors are the layer's own."""

    def scatter(self, layer: nn.Module, packed: Packed) -> None:
        """Puts a weight into the layer."""


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
#: class of the layer (qualified name) -> store
LAYERS: dict[str, LayerStore] = {}
#: what was found for classes before
_STORE_OF: dict[tuple[type, type], Store] = {}
_LAYER_STORE_OF: dict[type, LayerStore | None] = {}


def register_store(class_name: str, store: Store) -> None:
    """Teach the core a storage: `class_name` is the qualified name of the parameter's (tensor's) class."""
    STORES[class_name] = store
    _STORE_OF.clear()


def register_layer(class_name: str, store: LayerStore) -> None:
    """Teach the core a layer that spreads its weight over several tensors; its map is `y = x Wᵀ + b`."""
    LAYERS[class_name] = store
    _LAYER_STORE_OF.clear()


#: package of the class of a parameter or layer -> the module here that knows its storages, imported when one is met
BACKENDS: dict[str, str] = {
    "bitsandbytes": "deltatune.stores.bnb",
    "torchao": "deltatune.stores.ao",
    "hqq": "deltatune.stores.hqq",
    "gptqmodel": "deltatune.stores.gptq",
}


def find_store(param: Any) -> Store:
    """The store for a parameter, by its class; ordinary tensors are dense."""
    if isinstance(param, Packed):
        return param.store
    kinds = type(param), type(param.data)
    if kinds not in _STORE_OF:
        names = class_names(kinds[0]) + class_names(kinds[1])
        _import_backends(names)
        _STORE_OF[kinds] = next((STORES[n] for n in names if n in STORES), STORES["torch.nn.parameter.Parameter"])
    return _STORE_OF[kinds]


def find_layer(layer: nn.Module) -> LayerStore | None:
    """The store of a layer that spreads its weight over several tensors; None for layers with a `weight`."""
    kind = type(layer)
    if kind not in _LAYER_STORE_OF:
        names = class_names(kind)
        _import_backends(names)
        _LAYER_STORE_OF[kind] = next((LAYERS[n] for n in names if n in LAYERS), None)
    return _LAYER_STORE_OF[kind]


def product_of(store: Store, runs: type) -> Callable[[nn.Module, Tensor], Product | None] | None:
    """A storage's own product for layers that run the forward of the class `runs`; None where it has none."""
    has = f"{runs.__module__}.{runs.__qualname__}" in getattr(store, "products", ())
    return store.product if has else None  # type: ignore[attr-defined]


def _import_backends(names: Sequence[str]) -> None:
    for name in names:
        package = name.partition(".")[0]
        if package in BACKENDS:
            import_module(BACKENDS[package])


def quantised(layer: nn.Module) -> Any | None:
    """The weight of a layer in few bits (a parameter or a `Packed`); None for every other module."""
    packed = find_layer(layer)
    if packed is not None:
        return packed.gather(layer)
    param = layer._parameters.get("weight")
    return param if param is not None and not find_store(param).exact else None


def settle(model: nn.Module, still: bool) -> None:
    """Keeps every quantised layer's weight as it is stored, or lets the layers store it anew as they run again."""
    for layer in model.modules():
        weight = quantised(layer)
        store: Any = find_store(weight) if weight is not None else None
        if hasattr(store, "settle"):
            store.settle(layer, still)


# ---------------------------------------------------------------------- another weight in a layer's place
def weight_of(owner: nn.Module, leaf: str) -> Any:
    """What a module holds as its parameter, buffer or packed weight `leaf`."""
    packed = find_layer(owner) if leaf == "weight" else None
    return packed.gather(owner) if packed is not None else table_of(owner, leaf)[leaf]


def put_weight(owner: nn.Module, leaf: str, value: Any, kind: type | None = None) -> None:
    """Puts another weight into a module, which becomes a `kind` if that is given (a dense layer for a packed one)."""
    before = find_layer(owner) if leaf == "weight" else None
    if kind is not None and kind is not type(owner):
        if before is not None and not isinstance(value, Packed):
            for name in before.gather(owner).tensors:
                for table in (owner._parameters, owner._buffers):
                    table.pop(name, None)
        owner.__class__ = kind
        if "_old_forward" in owner.__dict__:  # accelerate's hook calls what was the class's forward
            plain: Any = getattr(kind, "_plain", kind)
            owner.__dict__["_old_forward"] = partial(plain.forward, owner)
    if not isinstance(value, Packed):
        table_of(owner, leaf)[leaf] = value
        return
    if leaf not in value.tensors:
        owner._parameters.pop(leaf, None)
    value.store.scatter(owner, value)


def strip(owner: nn.Module, store: Any) -> None:
    """Lets a layer that has a dense weight for good drop what its storage kept beside the weight."""
    for name in getattr(store, "leftovers", ()):
        owner.__dict__.pop(name, None)
        owner._buffers.pop(name, None)
    bias = owner.__dict__.get("bias")
    if isinstance(bias, Tensor):  # a plain attribute, which no state dict would hold
        del owner.__dict__["bias"]
        owner.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))


def table_of(owner: nn.Module, leaf: str) -> dict[str, Any]:
    """The dictionary of a module that holds, or is to hold, the tensor `leaf`.

    Some quantised layers keep their bias as a buffer or as a plain attribute.
    """
    if leaf == "bias" and isinstance(owner.__dict__.get(leaf), Tensor):
        return owner.__dict__
    return owner._buffers if leaf in owner._buffers else owner._parameters
