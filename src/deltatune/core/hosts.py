"""Hosts: a module whose class was swapped for a cached subclass of its own class.

This is what `torch.nn.utils.parametrize` and FSDP2 do. Names of parameters, `isinstance` and `.weight` stay as
they were, and there is no wrapper module and no forward hook.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from threading import RLock
from typing import Any, cast

import torch
from torch import nn

from deltatune.core import together
from deltatune.core.combine import read, run
from deltatune.core.edits import Edit
from deltatune.core.ops import class_names
from deltatune.core.plan import Plan

#: Modules with a fused inference path that reads their children's weights and skips the children's forward.
#: An adapter below would be a silent no-op there, so the path is switched off: class -> (attribute, value).
FUSED_PATHS: dict[str, tuple[str, Any]] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("activation_relu_or_gelu", 0),
    "torch.nn.modules.transformer.TransformerEncoder": ("use_nested_tensor", False),
}

#: held while a module is called that other weights are put into, which all threads see
_PLACING = RLock()


class Host:
    """Mixed in front of a module's own class."""

    path: str
    #: the number of the layer that it is in; very large outside of layers
    _layer: int
    plan: Plan
    #: whether an edit puts another weight in place for a call
    _places = False
    _edits: dict[str, tuple[Edit, ...]]
    _plain: type[nn.Module]

    def edits_of(self, names: tuple[str, ...]) -> list[Edit]:
        """The edits of these adapters on this module, in order."""
        edits = self._edits
        if self._layer < self.plan.state.dropped:
            return []
        return [e for name in names if name in edits for e in edits[name]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._places or torch.compiler.is_compiling():
            return self._deltatune_call(args, kwargs)
        with _PLACING:
            return self._deltatune_call(args, kwargs)

    def _deltatune_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner = self.__dict__.get("_inner_forward")
        base = super().forward if inner is None else inner  # type: ignore[misc]
        state = self.plan.state
        if not state.names and state.rows is None:
            return base(*args, **kwargs)
        if self.plan.is_steady and len(args) == 1 and not kwargs and (y := read(self, state, args[0])) is not None:
            return y
        return run(self, base, state, args, kwargs)

    forward._deltatune_host = True  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the swapped class has no importable name: pickle the plain class and swap again
        return _rebuild, (self._plain,), self.__dict__


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The call of a host without any edit, for edits that make it themselves."""
    assert isinstance(module, Host)
    inner: Callable[..., Any] | None = module.__dict__.get("_inner_forward")
    return inner if inner is not None else partial(module._plain.forward, module)


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    module: Any = plain.__new__(plain)
    module.__class__ = hosted_class(plain)
    return cast(nn.Module, module)


_HOSTED: dict[type, type] = {}


def hosted_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The hosted subclass of a module class; made once per class."""
    if plain not in _HOSTED:
        body = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain": plain}
        _HOSTED[plain] = type(plain.__name__, (Host, plain), body)
    return _HOSTED[plain]


def host(module: nn.Module, plan: Plan, path: str) -> Host:
    """Makes `module` a host (once); `path` is its place in the model, for messages."""
    if not isinstance(module, Host):
        swap: Any = module
        swap.__class__ = hosted_class(type(module))
        state = swap.__dict__
        if "forward" in state:  # patched on the instance, as accelerate's hooks do: adopt it
            state["_inner_forward"] = state.pop("forward")
        state["_edits"], state["plan"], state["path"] = {}, plan, path
        number = re.search(r"\.(\d+)(?:\.|$)", path)
        state["_layer"] = int(number[1]) if number else sys.maxsize
    return cast(Host, module)


def unhost(module: nn.Module) -> None:
    """Gives a host its own class back."""
    assert isinstance(module, Host)
    state = module.__dict__
    for name in ("_edits", "plan", "path", "_layer"):
        state.pop(name)
    state.pop("_places", None)
    state.pop(together.ATTRIBUTE, None)
    if "_inner_forward" in state:
        state["forward"] = state.pop("_inner_forward")
    swap: Any = module
    swap.__class__ = module._plain


def close_fused_paths(modules: dict[str, nn.Module], paths: Iterable[str]) -> None:
    """Switches off the fused paths of the modules above `paths` (see `FUSED_PATHS`); `modules` has all by path."""
    above = {""}
    for path in paths:
        while path and (path := path.rpartition(".")[0]) not in above:
            above.add(path)
    for parent in (modules[path] for path in above):
        for name in class_names(type(parent)):
            if name in FUSED_PATHS:
                attribute, value = FUSED_PATHS[name]
                parent.__dict__.setdefault("_fused_path", getattr(parent, attribute))
                setattr(parent, attribute, value)


def reopen_fused_paths(root: nn.Module) -> None:
    """Undoes `close_fused_paths` everywhere below `root`."""
    for module in root.modules():
        if "_fused_path" in module.__dict__:
            name = next(n for n in class_names(type(module)) if n in FUSED_PATHS)
            setattr(module, FUSED_PATHS[name][0], module.__dict__.pop("_fused_path"))
