"""LISA: Layerwise Importance Sampling for Memory-Efficient LLM Fine-Tuning (arXiv 2403.17919).

    every K steps:   γ of the N blocks, drawn uniformly without replacement, train; the others sleep
    always:          the embedding, the head, the final norm (whatever lies outside the blocks) train

There is no adapter in the usual sense: the base's own weights move, at full rank, and no parameter is added. Sleeping
blocks have no gradients, and their optimiser state is freed, so memory is that of γ blocks and the ends (the authors'
code keeps the states, which grow to full size with time). What is saved are the modules that have ever trained.

    model = get_peft_model(base, FullConfig(in_place=True))       # or the plain model
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.core.adapters import AdapterSet
from deltatune.core.sites import base_parameters
from deltatune.errors import ConfigError
from deltatune.schedules._base import changed, check_trainable, write_changed
from deltatune.schedules._optimizer import forget
from deltatune.schedules.base import Procedure, Run, Schedule, check_whole, procedure


@procedure
@dataclass
class Lisa(Procedure):
    """A few blocks at a time.

    Args:
        layers: γ, how many blocks train together.
        every: K, optimiser steps between two draws; the paper advises about a fiftieth of the run.
    """

    layers: int = 2
    every: int = 20

    name: ClassVar[str] = "lisa"
    summary: ClassVar[str] = "a few random blocks of the base train at a time, in full"
    paper: ClassVar[str] = "arXiv 2403.17919"

    def __post_init__(self) -> None:
        check_whole("layers", self.layers, 1)
        check_whole("every", self.every, 1)

    @property
    def switches(self) -> bool:
        return True

    def check_total(self, total: int, config: Any = None) -> None:
        if self.every >= total:
            raise ConfigError(
                f"every={self.every} draws only once in a run of {total} steps, so most blocks would never train; use "
                f"every={max(total // 50, 1)}"
            )

    def mark(self, root: nn.Module, adapters: AdapterSet | None, adapter: str) -> None:
        for p in own_parameters(root, adapters, adapter).values():
            p.requires_grad_(True)

    def start(self, run: Run) -> Schedule:
        if run.adapter and not all(edit.changes_base for edit in run.edits()):
            raise ConfigError(
                "LISA trains the base's own weights and no adapter beside them; use method FULL with in_place=true, or "
                "the model as it is"
            )
        params = own_parameters(run.root, run.adapters, run.adapter)
        check_trainable(run, "LISA")
        blocks = in_blocks(params)
        if not blocks:
            raise ConfigError(
                f"LISA draws from numbered blocks, and this {type(run.root).__name__} has none that train; use "
                "another procedure"
            )
        if self.layers > len(blocks):
            raise ConfigError(
                f"layers={self.layers} is more than the {len(blocks)} blocks that there are; use layers={len(blocks)}, "
                "which trains everything"
            )
        return LisaSchedule(run, self, params, blocks)

    @classmethod
    def example(cls) -> Lisa:
        return cls(layers=1, every=3)

    @classmethod
    def example_method(cls) -> dict[str, Any]:
        return {"peft_type": "FULL", "in_place": True}


def own_parameters(root: nn.Module, adapters: AdapterSet | None, adapter: str) -> dict[str, nn.Parameter]:
    """The base's parameters that may train: those of an adapter that trains in place, or all there are."""
    params = {name: p for name, p in base_parameters(root) if p.is_floating_point()}
    if adapters is None or not adapter:
        return params
    chosen = {id(p) for edit in adapters.edits[adapter] if edit.changes_base for p in edit.trainable()}
    return {name: p for name, p in params.items() if id(p) in chosen}


def in_blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """path of a block -> the names of its parameters, for all that lie in numbered blocks."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = re.match(r"(.*?\.\d+)\.", f".{name}")
        if found:
            blocks.setdefault(found[1][1:], []).append(name)
    return blocks


class LisaSchedule(Schedule):
    """
    Attributes:
        awake: paths of the blocks that train now.
        peak: bytes of the optimiser's state of the base, the most so far.
    """

    def __init__(self, run: Run, options: Lisa, params: dict[str, nn.Parameter], blocks: dict[str, list[str]]) -> None:
        super().__init__(run)
        self.options, self.params, self.blocks = options, params, blocks
        self.awake: list[str] = []
        self.peak = 0

    def drawn(self, window: int) -> list[str]:
        """The blocks of a window of K steps; the same in every process and after every resume."""
        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + window)
        order = torch.randperm(len(self.blocks), generator=generator)[: self.options.layers].tolist()
        paths = list(self.blocks)
        return [paths[i] for i in sorted(order)]

    def begin(self) -> None:
        changed(self.run, "LISA")
        self.wake(self.drawn(self.run.step // self.options.every), free=False)

    def wake(self, paths: list[str], free: bool = True) -> None:
        """Lets these blocks train and the others sleep: no gradient, no optimiser state.

        Args:
            free: False keeps the optimiser's state, which may be that of a checkpoint at another step.
        """
        self.awake = paths
        for path, names in self.blocks.items():
            for name in names:
                p = self.params[name]
                p.requires_grad_(path in paths)
                if path not in paths:
                    p.grad = None
                    forget(self.run.optimizer, [p] if free else [])

    def before_step(self) -> None:
        for p in self.params.values():
            if not p.requires_grad:
                p.grad = None  # zeros would still move it: weight decay and momentum

    def after_step(self) -> None:
        self.peak = max(self.peak, sum(map(self._state_bytes, self.params.values())))
        if self.run.step % self.options.every == 0 and self.run.step != self.run.total:
            self.wake(self.drawn(self.run.step // self.options.every))

    def _state_bytes(self, param: Tensor) -> int:
        """Of one parameter's moments; of a sharded one those of all processes."""
        values = self.run.optimizer.state.get(param, {}).values()
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor) and v.ndim)

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.peak = state["peak"]
        self.wake(self.drawn(max(self.run.step - (self.run.step == self.run.total), 0) // self.options.every))

    def ever_awake(self) -> list[str]:
        """Paths of the blocks that have trained so far, in the model's order."""
        windows = range((self.run.step + self.options.every - 1) // self.options.every)
        seen = {path for window in windows for path in self.drawn(window)}
        return [path for path in self.blocks if path in seen]

    def finish(self) -> None:
        for p in self.params.values():
            p.requires_grad_(True)

    def report(self) -> dict[str, Any]:
        """`trained`: how many blocks have trained at some time, of `blocks`; `state_mb`: the optimiser's state at its
        peak, of `whole_state_mb` if every block had trained all the time."""
        ends = set(self.params) - {name for names in self.blocks.values() for name in names}
        awake = ends.union(*(self.blocks[path] for path in self.awake))
        share = sum(p.numel() for p in self.params.values()) / sum(self.params[name].numel() for name in awake)
        told = {"state_mb": self.peak / 2**20, "whole_state_mb": self.peak * share / 2**20}
        return {"trained": len(self.ever_awake()), "blocks": len(self.blocks), **told}

    def save(self, folder: Path) -> bool:
        asleep = {name for path, names in self.blocks.items() if path not in self.ever_awake() for name in names}
        moved: list[Tensor] = [p for name, p in self.params.items() if name not in asleep]
        write_changed(self.run.root, moved, folder, self.run.adapter)
        return True
