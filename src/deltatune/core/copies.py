"""Whole tensors and modules as edits: `modules_to_save`, trained biases, full fine-tuning of named parts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.edits import Args, Delta, Kwargs, ModuleEdit, Slot, container_at
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.stores import quantised

MODULES_TO_SAVE = "modules_to_save"


class ValueDelta(Delta):
    """The adapter's own value of a whole parameter, started at the base's: exact at init and when merged."""

    def __init__(self, ref: WeightRef, name: str = "tuned", file_name: str | None = None) -> None:
        super().__init__(ref)
        leaf = ref.leaf
        value = ref.store.load(ref.param).clone()
        self.value = self.tensor(f"{name}_{leaf}", value, leaf=None, file_name=file_name or leaf)

    def merged(self, w: Tensor) -> Tensor:
        return self.ref.take(self.ref.op.matrix(self.value.weight))


class CopySlot(Slot):
    """A tensor inside a copied module; it stays where the module put it."""

    def __init__(self, holder: nn.Module, attr: str, file_name: str, buffer: bool) -> None:
        super().__init__(attr, torch.empty(0), file_name=file_name, buffer=buffer)
        self.holder, self.attr, self.value = holder, attr, None
        self.trainable = not buffer and getattr(holder, attr).is_floating_point()

    def place(self, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        self.key = f"{path}.{self.file_name}" if path else self.file_name


def refuse_quantised(module: nn.Module) -> None:
    """A copy of packed bytes cannot train."""
    for path, part in module.named_modules():
        if quantised(part) is not None:
            name = path or type(module).__name__
            raise ConfigError(
                f"{name!r} is stored in few bits, so a copy of it cannot train: keep it in 16 bits "
                "(llm_int8_skip_modules), or adapt it with a method that adds to the weight"
            )


class ModuleCopy(ModuleEdit):
    """A trained copy of a module, called in its place: `<module>.modules_to_save.<adapter>`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        refuse_quantised(module)
        self.original = module
        self.copy = copy_module(module)
        for path, part in self.copy.named_modules():
            prefix = f"{path}." if path else ""
            for name in part._parameters:
                if part._parameters[name] is not None:
                    self.slots.append(CopySlot(part, name, prefix + name, buffer=False))
            for name in part._buffers:
                if part._buffers[name] is not None and name not in part._non_persistent_buffers_set:
                    self.slots.append(CopySlot(part, name, prefix + name, buffer=True))

    def place(self, host: nn.Module, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        super().place(host, home, path, adapter, tag)
        container_at(home, MODULES_TO_SAVE).add_module(adapter, self.copy)

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        return self.copy(*args, **kwargs)

    def replacements(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        originals = dict(self.original.named_modules())
        for path, part in self.copy.named_modules():
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
                if tensor is not None:
                    yield originals[path], name, tensor


class InPlace(ModuleEdit):
    """A module that trains itself: no copy, no memory beside it, and no plain base to go back to."""

    changes_base = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for name, param in module._parameters.items():
            if param is not None:
                self.slots.append(CopySlot(module, name, name, buffer=False))
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self.slots.append(CopySlot(module, name, name, buffer=True))

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        from deltatune.core.hosts import base_forward

        return base_forward(self.host)(*args, **kwargs)

    def replacements(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        return iter(())  # it is in place already


def copy_module(module: nn.Module) -> nn.Module:
    """A copy of a module as the base has it: its own class, and none of the adapters in it."""
    from deltatune.core.edits import AdapterTensors
    from deltatune.core.hosts import Host, unhost

    skip = {id(m): AdapterTensors() for m in module.modules() if isinstance(m, AdapterTensors)}
    hosts = [m for m in module.modules() if isinstance(m, Host)]
    edits = [(h, h._edits) for h in hosts]
    plans = {id(h.plan): h.plan for h in hosts}
    try:
        for h in hosts:
            h._edits = {}
        twin: nn.Module = copy.deepcopy(module, {**skip, **plans})
    finally:
        for h, e in edits:
            h._edits = e
    for part in list(twin.modules()):
        for name in [n for n, child in part._modules.items() if isinstance(child, AdapterTensors)]:
            del part._modules[name]
        if isinstance(part, Host):
            unhost(part)
    return twin
