"""What procedures do to the base itself: train it in place, fold an adapter in, save what has become of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from deltatune.core.adapters import LOW_PRECISION, AdapterSet, adapters_of
from deltatune.core.combine import fold
from deltatune.core.edits import Delta, Edit, ModuleEdit
from deltatune.core.merge import evaluating
from deltatune.core.ops import VectorOp
from deltatune.core.sharded import whole
from deltatune.core.sites import base_modules, base_parameters
from deltatune.errors import ConfigError
from deltatune.schedules._optimizer import forget
from deltatune.schedules.base import Run
from deltatune.stores import find_store

#: name of the adapter that exists only while a changed base is written
_WRITING = "written"


def where(delta: Delta) -> str:
    """The name of a delta's weight in the base."""
    path = getattr(delta.host, "path", "")
    return f"{path}.{delta.ref.name}" if path else delta.ref.name


def deltas_of(run: Run, procedure: str) -> list[Delta]:
    """The deltas that a procedure folds into the base.

    Raises:
        ConfigError: there is none, one has no equivalent weight, or the base could not take it without damage.
    """
    if run.adapters is None or not run.adapter:
        raise ConfigError(f"{procedure} folds an adapter into the base, and this model has none; use get_peft_model")
    if run.adapters.plan.merged:
        raise ConfigError(
            f"adapter {run.adapters.plan.merged[0]!r} is merged, so {procedure} cannot change the base; call "
            "unmerge_adapter() first"
        )
    # trained biases are values of their own and stay beside the base
    deltas = [e for e in run.edits() if isinstance(e, Delta) and not isinstance(e.ref.op, VectorOp)]
    _check_own(run.root, deltas, procedure)
    for delta in deltas:
        if not delta.ref.store.exact:
            raise ConfigError(
                f"{procedure} folds the adapter into the base over and over, and {where(delta)!r} is stored quantised, "
                "so each time would round it away: load the base in 16 or 32 bits, or train plain LoRA on it"
            )
        if delta.ref.dtype in LOW_PRECISION and delta.ref.dtype != torch.bfloat16:
            raise ConfigError(
                f"{procedure} folds the adapter into the base over and over, and float16 overflows and rounds; load "
                "the base with dtype=float32 (or bfloat16)"
            )
    return deltas


def _check_own(root: nn.Module, deltas: Sequence[Delta], procedure: str) -> None:
    """Raises ConfigError where a weight belongs to another module too, which a fold would change with it."""
    for delta in deltas:
        holders = [path for path, m in base_modules(root) if any(p is delta.ref.param for p in m._parameters.values())]
        if len(holders) > 1:
            raise ConfigError(
                f"{procedure} folds the adapter into {where(delta)!r}, and {' and '.join(sorted(holders))} share that "
                "weight, so all of them would change; leave it out of target_modules, or untie the weights"
            )


@torch.no_grad()
def fold_in(deltas: Sequence[Delta]) -> None:
    """Adds the deltas to the base's weights for good, in float32; the parameters stay the same objects."""
    groups: dict[tuple[int, str], list[Delta]] = {}
    for delta in deltas:
        groups.setdefault((id(delta.ref.owner), delta.ref.leaf), []).append(delta)
    with evaluating(deltas):
        for group in groups.values():
            param = group[0].ref.param
            param.copy_(fold(group).to(param.dtype))


def weights_of(root: nn.Module, deltas: Iterable[Delta]) -> dict[str, Tensor]:
    """The base's parameters that these deltas change, by name."""
    taken = {id(d.ref.param) for d in deltas}
    return {name: p for name, p in base_parameters(root) if id(p) in taken}


def rest_of(root: nn.Module, edits: Iterable[Edit]) -> dict[str, Tensor]:
    """The base's own parameters that no delta of an adapter stands for: embeddings, norms, the head."""
    taken = {id(e.ref.param) for e in edits if isinstance(e, Delta)}
    return {name: p for name, p in base_parameters(root) if id(p) not in taken and p.is_floating_point()}


def changed(run: Run, procedure: str) -> None:
    """Notes that the base is no longer what it was, so that nobody takes it for the plain one."""
    if run.adapters is not None:
        run.adapters.base_changed = procedure


class FullFirst:
    """All weights of the base train for the first steps while the adapter waits; then they freeze and it trains.

    Args:
        steps: how many; 0 is none. rest: base's parameters that go on training afterwards.
    """

    def __init__(self, run: Run, steps: int, rest: Iterable[Tensor] = ()) -> None:
        self.run, self.steps = run, steps
        self.base = {n: p for n, p in base_parameters(run.root) if p.is_floating_point()}
        self.free = {id(p) for p in rest}
        self.pair = [p for e in run.edits() for p in e.trainable()]

    @property
    def going(self) -> bool:
        """Whether the step under way is one of them."""
        return self.run.step < self.steps

    def choose(self) -> None:
        """Sets what trains now."""
        if self.steps:
            for p in self.base.values():
                p.requires_grad_(self.going or id(p) in self.free)
            for p in self.pair:
                p.requires_grad_(not self.going)

    def after_step(self) -> bool:
        """After the last of them: switches, and frees the optimiser's state of what has become frozen."""
        if not self.steps or self.run.step != self.steps:
            return False
        self.choose()
        forget(self.run.optimizer, [p for p in self.base.values() if not p.requires_grad])
        return True


def check_trainable(run: Run, procedure: str, names: Iterable[str] | None = None) -> None:
    """Weights that train in place must be numbers.

    Raises:
        ConfigError: the base is stored quantised.
    """
    wanted = None if names is None else set(names)
    for name, p in base_parameters(run.root):
        if (wanted is None or name in wanted) and not find_store(p).exact:
            raise ConfigError(
                f"{procedure} trains the base's own weights, and {name!r} is stored quantised: load the base in 16 "
                "or 32 bits, or train an adapter on it"
            )


def write_changed(root: nn.Module, tensors: Iterable[Tensor], folder: Path, adapter: str = "") -> None:
    """Writes the modules that hold these tensors as an adapter of method FULL: they load on the base as it was.

    Whole values are kept and not differences, so that nothing is rounded.

    Args:
        tensors: the base's parameters that have changed. adapter: one to fold in before, if any.
    """
    from deltatune.methods.full import FullConfig
    from deltatune.peft_model import describe
    from deltatune.state import get_peft_model_state_dict, write_adapter

    found = adapters_of(root)
    adapters = found if found is not None else AdapterSet(root)
    wanted = {id(t) for t in tensors}
    touched = {m for edit in adapters.edits.get(adapter, []) for m in modules_of(edit)}
    paths = [
        path
        for path, m in base_modules(root)
        if m in touched or any(id(p) in wanted for p in m._parameters.values() if p is not None)
    ]
    flags = [(p, p.requires_grad) for p in root.parameters()]
    config = FullConfig(target_modules=paths)
    if adapter:
        known = adapters.configs[adapter]
        config.base_model_name_or_path, config.task_type = known.base_model_name_or_path, known.task_type
    describe(config, root)
    try:
        adapters.add(config, _WRITING)
        names = [prefixed(key) for key in get_peft_model_state_dict(root, adapter_name=_WRITING)]
        if adapter:
            adapters.merge([adapter])
        write_adapter(adapters, _WRITING, folder, {name: _value(root, name) for name in names})
    finally:
        if _WRITING in adapters.configs:
            adapters.delete(_WRITING)
        if adapter in adapters.plan.merged:
            adapters.unmerge([adapter])
        if found is None:
            adapters.remove_all()
        for p, flag in flags:
            p.requires_grad_(flag)


def modules_of(edit: Edit) -> list[nn.Module]:
    """The base's modules whose tensors an edit would change if it were merged."""
    if isinstance(edit, Delta):
        return [edit.ref.owner]
    return [edit.host] if isinstance(edit, ModuleEdit) and not edit.changes_base else []


def _value(root: nn.Module, name: str) -> Tensor:
    """A module's tensor as it stands, by its name in an adapter's file."""
    from deltatune.core.checkpoint import PREFIX

    path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(path), leaf)
    return whole(tensor.detach()).clone()


def prefixed(key: str) -> str:
    from deltatune.core.checkpoint import PREFIX

    return key if key.startswith(PREFIX) else PREFIX + key
