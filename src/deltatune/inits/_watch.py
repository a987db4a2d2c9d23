"""The inputs of weights and their gradients, seen while the base runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.ops import ConvOp
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import Request


@dataclass(frozen=True)
class Spot:
    """A weight that will get a pair of rank `r`; its product is multiplied by `scale`.

    Attributes:
        name: tells it apart from all others. site: what `rank_pattern` is matched against.
    """

    name: str
    site: str
    ref: WeightRef
    r: int
    scale: float

    def request(self, config: Any) -> Request:
        return Request(config.init_name, self.ref, self.name, self.r, self.scale, config)


class InputWatch:
    """Calls `see(spot, args)` with what the module of each spot is called with.

    Weights that get the very same tensor (q, k and v) have one leader, for which alone `see` is called.

    Args:
        share: False calls `see` for every spot.

    Raises:
        ConfigError: a weight whose input cannot be watched.
    """

    def __init__(self, spots: Sequence[Spot], see: Callable[[Spot, tuple[Any, ...]], None], share: bool = True) -> None:
        for spot in spots:
            _refuse_unwatchable(spot)
        self.spots, self.see, self.share = spots, see, share
        self.leader: dict[str, str] = {}
        self._alive: list[tuple[weakref.ref[Tensor], Spot]] = []

    def __enter__(self) -> InputWatch:
        hook: Any
        self._handles = []
        for spot in self.spots:
            hook = self._hook(spot)
            self._handles.append(spot.ref.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, spot: Spot) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            args = args or tuple(kwargs.values())
            if self._leader(spot, args[0]) == spot.name:
                self.see(spot, args)

        return hook

    def _leader(self, spot: Spot, x: Tensor) -> str:
        """Decided when a spot is first called: the first one that got this very tensor."""
        if spot.name not in self.leader:
            self._alive = [(ref, other) for ref, other in self._alive if ref() is not None]
            same = (
                other.name for ref, other in self._alive if ref() is x and other.ref.shape[-1] == spot.ref.shape[-1]
            )
            self.leader[spot.name] = next(same, spot.name) if self.share else spot.name
            if self.leader[spot.name] == spot.name:
                self._alive.append((weakref.ref(x), spot))
        return self.leader[spot.name]


class GradientWatch:
    """Calls `see(id of a parameter, its gradient in float32)` as soon as backward has it, and frees it then.

    Args:
        root: the model; while it is watched nothing else in it gets a gradient, or the memory for one.
        params: the parameters to watch; one that is used twice in a call has one gradient.
    """

    def __init__(self, root: nn.Module, params: Iterable[Tensor], see: Callable[[int, Tensor], None]) -> None:
        self.root, self.params, self.see = root, {id(p): p for p in params}, see

    def __enter__(self) -> GradientWatch:
        self._before = [(p, p.requires_grad) for p in (*self.root.parameters(), *self.params.values())]
        self._handles = []
        for param, _ in self._before:
            param.requires_grad_(id(param) in self.params)
        for key, param in self.params.items():
            register: Any = param.register_post_accumulate_grad_hook
            self._handles.append(register(self._hook(key)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        for param, flag in self._before:
            param.requires_grad_(flag)

    def _hook(self, key: int) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            grad = param.grad
            assert grad is not None
            param.grad = None
            self.see(key, (grad.to_dense() if grad.is_sparse else grad).detach().float())

        return hook


def _refuse_unwatchable(spot: Spot) -> None:
    if spot.ref.op.looks_up:
        why = "is looked up and multiplied with nothing"
    elif not spot.ref.bypass:
        why = "is read by its module, so its input cannot be seen"
    else:
        return
    raise ConfigError(
        f"the weight of {spot.name!r} {why}; leave it out of target_modules, or use an init that does not start from "
        "inputs"
    )


def rows_of(spot: Spot, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The vectors that a weight multiplies, `(n, in)` in float32, without masked positions.

    Args:
        x: the module's input. mask: `(B, T)`, True where a position counts; ignored where `x` has other axes.
    """
    ref = spot.ref
    if isinstance(ref.op, ConvOp):
        module: Any = ref.module
        every = torch.eye(ref.shape[-1], device=x.device, dtype=x.dtype).repeat(module.groups, 1)
        patches = ref.op.apply(module, x, every)  # (N, groups · in, *S); a convolution with unit kernels
        axis = 1 - module.weight.ndim
        return patches.movedim(axis, -1).reshape(-1, ref.shape[-1]).float()
    if mask is not None:
        if x.shape[:-1] == mask.shape:
            return x[mask].float()
        if x.ndim == 2 and len(x) == mask.numel():
            return x[mask.flatten()].float()
    return x.reshape(-1, x.shape[-1]).float()


def attention_mask_of(batch: Any) -> Tensor | None:
    """True where a token is no padding; None if the batch does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
