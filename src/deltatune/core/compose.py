"""How a composition runs at one module: its tree is walked once where inputs change, and once where outputs do.

A module meets a composition as two edits, so that nothing else of the core knows of it: one that replaces the input and
one that adds to the output. Both walk the same tree; they differ in what a leaf does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltatune.core.composition import Average, BatchSplit, Composition, Fuse, Node, Split, Stack, leaves
from deltatune.core.edits import Args, Delta, Edit, Kwargs, ModuleEdit, Witness
from deltatune.errors import ConfigError


class FusionEdit(Edit):
    """What `Fuse` asks at a module: one change out of several."""

    no_merge = "weighs adapters anew for every token"

    def mix(self, query: Tensor, changes: list[Tensor]) -> Tensor:
        """The change `(…, d)` made of the children's, `(…, d)` each."""
        raise NotImplementedError


@dataclass
class Flow:
    """What runs through the tree: the module's input, fixed, and the value that leaves change."""

    x: Tensor
    value: Tensor

    def part(self, axis: int, start: int, stop: int) -> Flow:
        return Flow(*(t.narrow(axis, start, stop - start) for t in (self.x, self.value)))


Leaf = Callable[[str, Flow], Tensor]


def walk(host: Any, node: Node, flow: Flow, leaf: Leaf) -> Tensor:
    """The value after a composition."""
    if isinstance(node, str):
        return leaf(node, flow)
    if isinstance(node, Stack):
        for child in node.children:
            flow = Flow(flow.x, walk(host, child, flow, leaf))
        return flow.value
    if isinstance(node, Split):
        return _pieces(host, node, node.splits, 1, flow, leaf)
    if isinstance(node, BatchSplit):
        return _pieces(host, node, node.batch_sizes, 0, flow, leaf)
    changes = [walk(host, child, flow, leaf) - flow.value for child in node.children]
    if isinstance(node, Average):
        return flow.value + sum(w * c for w, c in zip(node.weights, changes, strict=True))
    assert isinstance(node, Fuse)
    return _fused(host, node, flow, changes)


def _pieces(host: Any, node: Composition, sizes: tuple[int, ...], axis: int, flow: Flow, leaf: Leaf) -> Tensor:
    """Every child on its own piece of an axis."""
    whole, total = flow.value.shape[axis], sum(sizes)
    what = "positions" if axis else "rows"
    if axis and flow.value.ndim < 3:
        raise ConfigError(
            f"Split cannot tell positions apart at {host.path!r}, which sees them as rows; use BatchSplit"
        )
    times = 1 if axis else max(1, whole // total)  # rows may come with their positions as rows too
    if total * times != whole:
        raise ConfigError(f"{node!r} has sizes for {total} {what}, and {host.path!r} is called with {whole}")
    done, start = [], 0
    for child, size in zip(node.children, sizes, strict=True):
        done.append(walk(host, child, flow.part(axis, start, start + size * times), leaf))
        start += size * times
    return torch.cat(done, axis)


def _fused(host: Any, node: Fuse, flow: Flow, changes: list[Tensor]) -> Tensor:
    """Attention over the children's changes, where any of them has one here."""
    children = [name for child in node.children for name in leaves(child)]
    edits = [e for name in children for e in host.edits_of((name,)) if _runs(e)]
    if not edits:
        return flow.value
    fusion = next((e for e in host.edits_of((node.fusion_name,)) if isinstance(e, FusionEdit)), None)
    if fusion is None:
        raise ConfigError(f"the fusion {node.fusion_name!r} has no weights at {host.path!r}; add it with FusionConfig")
    query = edits[0].query(flow.value)
    return flow.value + fusion.mix(query, changes).to(flow.value.dtype)


def _runs(edit: Edit) -> bool:
    return hasattr(edit, "query")


class ComposedInput(Edit):
    """Replaces a module's input by what a composition makes of it."""

    def __init__(self, host: Any, node: Node, changes_input: Callable[[Edit], bool]) -> None:
        super().__init__()
        self.host, self.node, self.changes_input = host, node, changes_input

    def pre(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if len(args) + len(kwargs) != 1:
            host: Any = self.host
            raise ConfigError(f"{host.path!r} takes several inputs, so {self.node!r} cannot change one of them")
        (x,) = args if args else kwargs.values()
        return (walk(self.host, self.node, Flow(x, x), self._leaf),), {}

    def _leaf(self, name: str, flow: Flow) -> Tensor:
        value = flow.value
        for edit in self.host.edits_of((name,)):  # type: ignore[operator]
            if self.changes_input(edit):
                ((value,), _) = edit.pre((value,), {})
        return value


class ComposedOutput(Edit):
    """Adds to a module's output what a composition changes in it."""

    reads_output = True

    def __init__(self, host: Any, node: Node, is_additive: Callable[[Edit], bool]) -> None:
        super().__init__()
        self.host, self.node, self.is_additive = host, node, is_additive

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return walk(self.host, self.node, Flow(x, y), self._leaf) - y

    def _leaf(self, name: str, flow: Flow) -> Tensor:
        value = flow.value
        for edit in self.host.edits_of((name,)):  # type: ignore[operator]
            if self.is_additive(edit):
                change = edit.update(flow.x, flow.value)
                value = value if change is None else value + change.to(value.dtype)
        return value


def composed(
    host: Any, node: Composition, is_additive: Callable[[Edit], bool], changes_input: Callable[[Edit], bool]
) -> list[Edit]:
    """A composition's edits at a module: what changes its input, what replaces its weights or call, what adds to it."""
    every = [e for name in leaves(node) for e in host.edits_of((name,)) if not isinstance(e, (Witness, FusionEdit))]
    rest = [e for e in every if isinstance(e, (Delta, ModuleEdit)) and not is_additive(e)]
    copies = [e for e in rest if isinstance(e, ModuleEdit)]
    found: list[Edit] = [*(e for e in rest if not isinstance(e, ModuleEdit)), *copies[-1:]]
    if any(changes_input(e) for e in every):
        found.insert(0, ComposedInput(host, node, changes_input))
    if any(is_additive(e) for e in every):
        found.append(ComposedOutput(host, node, is_additive))
    return found
