"""Puts procedures on a model and its optimiser: `attach` before the loop, `finish` after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.adapters import AdapterSet, adapters_of
from deltatune.core.sharded import fill, whole
from deltatune.core.sites import base_parameters
from deltatune.errors import ConfigError
from deltatune.schedules._base import write_changed
from deltatune.schedules._optimizer import ATTRIBUTE, check_forgets
from deltatune.schedules.base import Procedure, Rate, Run, Schedule

#: what a part of a group does not share with it while a step runs
_OWN = ("params", "lr", "weight_decay")


def attach(
    model: nn.Module,
    optimizer: Any,
    *procedures: Procedure,
    total_steps: int | None = None,
    adapter_name: str | None = None,
    seed: int = 0,
) -> Attached:
    """Makes procedures act at every step of an optimiser, beside those that the adapter's method brings itself.

    Args:
        model: a PeftModel or any other, wrapped (DDP, FSDP2, compiled) or not.
        optimizer: torch's or one that wraps it. Make its learning-rate scheduler afterwards.
        total_steps: optimiser steps of the whole run, for procedures that plan ahead.
        adapter_name: the adapter that trains; the first active one if there are several.
        seed: of what procedures draw (which layers, fresh factors); the same in all processes.

    Raises:
        ConfigError: a procedure does not go with the model, the optimiser or the number of steps.
    """
    plain = getattr(optimizer, "optimizer", optimizer)
    if hasattr(plain, ATTRIBUTE):
        raise ConfigError("this optimiser already has procedures; give all of them to one call of attach")
    root, adapters, name = _find(model, adapter_name)
    chosen = _all(procedures, adapters, name)
    if not chosen:
        raise ConfigError("there is no procedure to attach, and the adapter's method brings none; name one")
    for procedure in chosen if total_steps is not None else ():
        procedure.check_total(total_steps or 0, adapters.configs.get(name) if adapters is not None else None)
    if any(procedure.switches for procedure in chosen):
        check_forgets(plain)
    trained = {id(p) for p in root.parameters() if p.requires_grad}
    mark(model, *procedures, adapter_name=adapter_name)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        _check_ddp(model, chosen, trained)
    _add_missing(root, plain)
    run = Run(root, adapters, name, plain, total_steps, seed)
    return Attached(run, {p.name: p.start(run) for p in chosen})


def mark(model: nn.Module, *procedures: Procedure, adapter_name: str | None = None) -> None:
    """Makes everything trainable that a procedure trains; `attach` does it too, this is for optimisers made before."""
    root, adapters, name = _find(model, adapter_name)
    for procedure in _all(procedures, adapters, name):
        procedure.mark(root, adapters, name)


def implied(model: nn.Module, adapter_name: str | None = None) -> list[Procedure]:
    """The procedures that the adapter's own method brings."""
    _, adapters, name = _find(model, adapter_name)
    return _all((), adapters, name)


def _find(model: Any, adapter: str | None) -> tuple[nn.Module, AdapterSet | None, str]:
    """(the base, its adapters, the name of the one that trains)."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            break
        model = inner
    adapters: AdapterSet | None = adapters_of(model) or getattr(model, "adapters", None)
    if adapters is None:
        if adapter is not None:
            raise ConfigError(f"adapter_name={adapter!r}, but this {type(model).__name__} has no adapters")
        return model, None, ""
    if adapter is None:
        adapter = next(iter(adapters.plan.active or adapters.configs), "")
    adapters.check(adapter)
    return adapters.root, adapters, adapter


def _all(procedures: Sequence[Procedure], adapters: AdapterSet | None, name: str) -> list[Procedure]:
    names = [p.name for p in procedures]
    for doubled in {n for n in names if names.count(n) > 1}:
        raise ConfigError(f"procedure {doubled!r} is given twice")
    own = adapters.configs[name].procedures() if adapters is not None and name else []
    return [*(p for p in own if p.name not in names), *procedures]


def _check_ddp(model: nn.parallel.DistributedDataParallel, procedures: Sequence[Procedure], trained: set[int]) -> None:
    """DDP averages the gradients of what trained when it was made, and waits for all of them.

    Raises:
        ConfigError: it would not see a parameter, or wait for one that sleeps.
    """
    if any(p.requires_grad and id(p) not in trained for p in model.parameters()):
        raise ConfigError(
            "the procedure trains parameters that were frozen when DDP was made, so their gradients would not be "
            "averaged: call mark(model, procedure) before DistributedDataParallel"
        )
    asleep = [p.name for p in procedures if p.switches]
    if asleep and not model.find_unused_parameters:
        raise ConfigError(
            f"procedure {asleep[0]!r} lets parameters sleep, and DDP would wait for them: make it with "
            "find_unused_parameters=True (ddp_find_unused_parameters=True in a Trainer)"
        )


def _add_missing(root: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What trains and is in no group becomes a group of its own, with the first group's settings."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in root.parameters() if p.requires_grad and id(p) not in known]
    if not missing:
        return
    if any("initial_lr" in group for group in optimizer.param_groups):
        raise ConfigError(
            f"{len(missing)} parameters that the procedure trains are not in the optimiser, and its learning-rate "
            "scheduler would not see them: make the scheduler after attach, or call mark(model, procedure) before the "
            "optimiser is made"
        )
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.add_param_group({**settings, "params": missing})


class Attached:
    """Procedures at work on a model and an optimiser.

    Attributes:
        run: what they work on; `run.step` counts the optimiser's steps.
        schedules: procedure name -> its schedule.
    """

    def __init__(self, run: Run, schedules: dict[str, Schedule]) -> None:
        self.run, self.schedules = run, schedules
        self._groups: list[dict[str, Any]] | None = None
        self._parts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._initial = [group.get("initial_lr", group["lr"]) for group in run.optimizer.param_groups]
        for schedule in schedules.values():
            schedule.begin()
        before = run.optimizer.register_step_pre_hook(self._before)
        after = run.optimizer.register_step_post_hook(self._after)
        self._handles = [before, after]
        setattr(run.optimizer, ATTRIBUTE, self)

    # ------------------------------------------------------------------ inside optimizer.step()
    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(callable(a) for a in (*args[1:], *kwargs.values())):
            raise ConfigError("procedures need the gradients before the step: call optimizer.step() without a closure")
        if self._overflowed():
            return
        self._unscale()
        for schedule in self.schedules.values():
            self._add_penalty(schedule)
        for schedule in self.schedules.values():
            schedule.before_step()
        self._split()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._groups is None:
            return
        self._join()
        self.run.step += 1
        for schedule in self.schedules.values():
            schedule.after_step()

    def _overflowed(self) -> bool:
        """Whether a fused optimiser will skip this step inside its kernel, as a loss scaler told it."""
        found = getattr(self.run.optimizer, "found_inf", None)
        return found is not None and bool(found)

    def _unscale(self) -> None:
        """A fused optimiser leaves unscaling to its kernel; it is done here, where the gradients are looked at."""
        scale = getattr(self.run.optimizer, "grad_scale", None)
        if scale is None:
            return
        for group in self.run.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(scale.to(p.grad.device))
        self.run.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def _add_penalty(self, schedule: Schedule) -> None:
        with torch.enable_grad():
            term = schedule.penalty()
            if term is None:
                return
            params = [p for group in self.run.optimizer.param_groups for p in group["params"] if p.requires_grad]
            grads = torch.autograd.grad(term, params, allow_unused=True)
        for p, grad in zip(params, grads, strict=True):
            if grad is not None:
                p.grad = grad.to(p.dtype) if p.grad is None else p.grad + grad.to(p.grad.dtype)

    def _split(self) -> None:
        """Each group becomes one part per rate, for the step; the caller's groups stay what they are."""
        optimizer = self.run.optimizer
        self._groups, self._parts = optimizer.param_groups, []
        self._initial += [g.get("initial_lr", g["lr"]) for g in self._groups[len(self._initial) :]]
        parts: list[dict[str, Any]] = []
        for group, initial in zip(self._groups, self._initial, strict=True):
            rates: dict[Rate, list[Tensor]] = {}
            for p in group["params"]:
                rates.setdefault(self.rate(p), []).append(p)
            if set(rates) <= {Rate()}:
                parts.append(group)
                continue
            for rate, params in rates.items():
                lr = group["lr"] if rate.lr is None else rate.lr * (group["lr"] / initial if initial else 0.0)
                part = {**group, "params": params, "lr": lr * rate.factor}
                if not rate.decay and "weight_decay" in part:
                    part["weight_decay"] = 0.0
                parts.append(part)
                self._parts.append((group, part))
        optimizer.param_groups = parts

    def _join(self) -> None:
        """Back to the caller's groups, with what the optimiser has noted in the parts."""
        assert self._groups is not None
        for group, part in self._parts:
            group.update({k: v for k, v in part.items() if k not in _OWN})
        self.run.optimizer.param_groups = self._groups
        self._groups = None

    def rate(self, param: Tensor) -> Rate:
        """How fast a parameter moves in the step under way."""
        total = Rate()
        for schedule in self.schedules.values():
            total = total.times(schedule.rate(param) or Rate())
        return total

    # ------------------------------------------------------------------ checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the adapter and the optimiser; plain values and tensors."""
        base: dict[str, Tensor] = {}
        for schedule in self.schedules.values():
            base.update({name: whole(t.detach()) for name, t in schedule.base_tensors().items()})
        states = {name: schedule.state_dict() for name, schedule in self.schedules.items()}
        return {"step": self.run.step, "initial": list(self._initial), "schedules": states, "base": base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`; load the adapter and the optimiser before.

        Raises:
            ConfigError: it is the state of other procedures.
        """
        if set(state["schedules"]) != set(self.schedules):
            raise ConfigError(
                f"the checkpoint is of a run with procedures {', '.join(sorted(state['schedules']))}, and this run has "
                f"{', '.join(sorted(self.schedules))}; start again, or resume with the same"
            )
        self.run.step, self._initial = state["step"], list(state["initial"])
        own = dict(base_parameters(self.run.root))
        for name, value in state["base"].items():
            fill(own[name], value)
        for name, schedule in self.schedules.items():
            schedule.load_state_dict(state["schedules"][name])

    # ------------------------------------------------------------------ after training
    def detach(self) -> None:
        """Takes the hooks off the optimiser."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if hasattr(self.run.optimizer, ATTRIBUTE):
            delattr(self.run.optimizer, ATTRIBUTE)

    def finish(self) -> dict[str, Any]:
        """Ends the run: the model becomes what is to be saved. Returns what there is to tell, by procedure."""
        self.detach()
        for schedule in self.schedules.values():
            schedule.finish()
        return self.report()

    def report(self) -> dict[str, Any]:
        """What there is to tell, by procedure."""
        reports = {name: schedule.report() for name, schedule in self.schedules.items()}
        return {name: report for name, report in reports.items() if report}

    def draw(self, folder: Path) -> list[Path]:
        """Writes the figures of the report."""
        return [path for schedule in self.schedules.values() for path in schedule.draw(folder)]

    def save(self, folder: str | Path) -> bool:
        """Writes what the run has made as an adapter for the base it started from, where a procedure has changed the
        base itself; False where nothing but the adapter has changed and `save_pretrained` does."""
        changing = [schedule for schedule in self.schedules.values() if schedule.base_tensors()]
        if len(changing) < 2:
            return any(schedule.save(Path(folder)) for schedule in self.schedules.values())
        tensors = [t for schedule in changing for t in schedule.base_tensors().values()]
        write_changed(self.run.root, tensors, Path(folder), self.run.adapter)
        return True
