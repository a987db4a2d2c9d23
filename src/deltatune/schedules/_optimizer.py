"""What procedures do to an optimiser's state: forget it, or prune its moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from deltatune.core.sharded import part_like, whole
from deltatune.errors import ConfigError

Reset = Literal["zero", "random", "magnitude"]
#: of an optimiser: the procedures that act in its steps
ATTRIBUTE = "_deltatune_schedule"


def forget(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> None:
    """Frees the optimiser's state of these parameters; it makes a new one when they train again."""
    for p in params:
        state = optimizer.state.pop(p, {})
        # what the constructor has set (APOLLO's seed) is not made again
        own = {k: v for k, v in state.items() if isinstance(v, int) and k != "step"}
        if own:
            optimizer.state[p] = own


def check_forgets(optimizer: torch.optim.Optimizer) -> None:
    """State that the constructor makes is not made again when it is freed.

    Raises:
        ConfigError: this optimiser's is of that kind.
    """
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ConfigError("Adagrad makes its state once, so it cannot be freed while parameters sleep; use adamw_torch")


def check_own_weights(optimizer: torch.optim.Optimizer, procedure: str) -> None:
    """A schedule-free optimiser keeps its weights in its state, and sets the parameters from there.

    Raises:
        ConfigError: this is one.
    """
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ConfigError(
            f"{procedure} sets weights, and {type(optimizer).__name__} keeps its own copies of them, which would undo "
            "that; use adamw_torch"
        )


def moments(optimizer: torch.optim.Optimizer, param: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the state's tensors that have the parameter's shape: Adam's m and v."""
    for key, value in optimizer.state.get(param, {}).items():
        if isinstance(value, Tensor) and value.shape == param.shape and value.ndim:
            yield key, value


def check_prunable(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], how: Reset) -> None:
    """Part of the moments can be pruned only where they are numbers.

    Raises:
        ConfigError: they are kept in 8 bits.
    """
    for p in params:
        if how != "zero" and any(not value.is_floating_point() for _, value in moments(optimizer, p)):
            raise ConfigError(
                f"reset={how!r} prunes the optimiser's moments, and {type(optimizer).__name__} keeps them in 8 bits: "
                "use reset='zero', or an optimiser with 32-bit state"
            )


def prune(
    optimizer: torch.optim.Optimizer, params: Iterable[Tensor], how: Reset, share: float, generator: torch.Generator
) -> None:
    """Sets a share of the optimiser's moments to zero, the same entries of all moments of a parameter.

    The authors' code prunes m and v apart. An entry that keeps its m and loses its v then moves by m / epsilon, as the
    gradient of A is exactly zero while B is; so both go together here.

    Args:
        how: all of them; random ones; those whose first moment is smallest, by tensor.
        share: of the entries that become zero, for the last two.
    """
    for p in params:
        found = [value for _, value in moments(optimizer, p)]
        if any(not value.is_floating_point() for value in found):  # 8 bits have no code for "nothing yet": begin anew
            forget(optimizer, [p])
        elif found:
            keep = _kept(whole(found[0]), how, share, generator)
            for value in found:
                value.mul_(part_like(keep.to(value.dtype), value))


def _kept(value: Tensor, how: Reset, share: float, generator: torch.Generator) -> Tensor:
    if how == "zero":
        return torch.zeros_like(value)
    if how == "random":
        return (torch.rand(value.shape, generator=generator) >= share).to(value.device)
    size = value.abs().flatten()
    dropped = size.argsort(stable=True)[: int(share * len(size))]
    return torch.ones_like(size).index_fill_(0, dropped, 0.0).view(value.shape)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Runs the body with random numbers of its own; equal in all processes, and none of the run's are used up."""
    devices: list[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def rate_of(optimizer: torch.optim.Optimizer, param: Tensor) -> tuple[float, float]:
    """(learning rate, weight decay) of one parameter in the step under way, all procedures' rates included."""
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    rate = getattr(optimizer, ATTRIBUTE).rate(param)
    lr = float(group["lr"])
    if rate.lr is not None:
        initial = float(group.get("initial_lr", lr))
        lr = rate.lr * (lr / initial if initial else 0.0)
    return lr * rate.factor, float(group.get("weight_decay", 0.0)) if rate.decay else 0.0
