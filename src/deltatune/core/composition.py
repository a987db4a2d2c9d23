"""Compositions of adapters as data (the blocks of the library `adapters`); they nest.

    Stack(a, b)                       one after the other: b sees what a gave
    Average(a, b, weights=[w1, w2])   the weighted mean of what each gives for the same input
    Split(a, b, splits=[n1, n2])      the first n1 positions of a sequence go through a, the next n2 through b
    BatchSplit(a, b, batch_sizes=[k1, k2])   the first k1 rows of a batch through a, the next k2 through b
    Parallel(a, b)                    the whole batch once through each; the outputs stand one below the other
    Fuse(a, b)                        attention over what each gives (AdapterFusion, `methods/fusion.py`)

A leaf is an adapter's name, of any method whose edits have an update. A list of names, without any of these, is a sum:
every change relative to the same base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Union

from deltatune.errors import ConfigError, hint

Node = Union[str, "Composition"]
BASE = "__base__"


@dataclass(frozen=True, init=False)
class Composition:
    """A node of a composition.

    Args:
        children: adapters' names or compositions, at least `least` of them.

    Raises:
        ConfigError: too few children, or something that is no name and no composition.
    """

    children: tuple[Node, ...]
    least: ClassVar[int] = 1

    def __init__(self, *children: Node) -> None:
        kind = type(self).__name__
        for child in children:
            if not isinstance(child, (str, Composition)):
                raise ConfigError(f"{kind} takes adapters' names and compositions, not {child!r}")
        if len(children) < self.least:
            raise ConfigError(f"{kind} needs at least {self.least} adapters, not {len(children)}: {list(children)}")
        object.__setattr__(self, "children", tuple(children))

    def __repr__(self) -> str:
        inner = [repr(child) for child in self.children]
        inner += [f"{f.name}={list(getattr(self, f.name))}" for f in fields(self) if f.name != "children"]
        return f"{type(self).__name__}({', '.join(inner)})"

    def _sizes(self, name: str, values: Sequence[float], whole: bool) -> None:
        """Keeps one number per child; whole ones must be positive."""
        kind = type(self).__name__
        if len(values) != len(self.children):
            raise ConfigError(f"{kind} has {len(self.children)} adapters and {len(values)} {name}; give one for each")
        if whole and not all(isinstance(v, int) and v > 0 for v in values):
            raise ConfigError(f"{name} of {kind} must be whole numbers of at least 1, not {list(values)}")
        object.__setattr__(self, name, tuple(values))


class Stack(Composition):
    """One after the other."""


class Parallel(Composition):
    """The whole batch once through each child; the first child's rows come first in the output."""

    least = 2


@dataclass(frozen=True, init=False, repr=False)
class Average(Composition):
    """The weighted mean; `normalize=True` divides the weights by their sum."""

    weights: tuple[float, ...]
    least = 2

    def __init__(self, *children: Node, weights: Sequence[float] | None = None, normalize: bool = True) -> None:
        super().__init__(*children)
        given = [1.0] * len(children) if weights is None else [float(w) for w in weights]
        self._sizes("weights", given, False)
        total = sum(given)
        if normalize and total == 0:
            raise ConfigError("the weights of Average add up to zero; give others, or normalize=False")
        object.__setattr__(self, "weights", tuple(w / total if normalize else w for w in given))


@dataclass(frozen=True, init=False, repr=False)
class Split(Composition):
    """Positions of the sequence, from the left."""

    splits: tuple[int, ...]
    least = 2

    def __init__(self, *children: Node, splits: Sequence[int]) -> None:
        super().__init__(*children)
        self._sizes("splits", splits, True)


@dataclass(frozen=True, init=False, repr=False)
class BatchSplit(Composition):
    """Rows of the batch, from the top."""

    batch_sizes: tuple[int, ...]
    least = 2

    def __init__(self, *children: Node, batch_sizes: Sequence[int]) -> None:
        super().__init__(*children)
        self._sizes("batch_sizes", batch_sizes, True)


class Fuse(Composition):
    """Attention over the children, with the weights of the fusion adapter of this name (see `fusion_name`)."""

    least = 2

    @property
    def fusion_name(self) -> str:
        """The name of the adapter that holds the attention's weights: the children's, joined by commas."""
        return ",".join(child if isinstance(child, str) else repr(child).replace(".", "_") for child in self.children)


KINDS: dict[str, type[Composition]] = {k.__name__: k for k in (Stack, Parallel, Average, Split, BatchSplit, Fuse)}


# ---------------------------------------------------------------------- looking
def leaves(node: Node) -> tuple[str, ...]:
    """The names of the adapters in a composition, each once, those of its fusions too."""
    if isinstance(node, str):
        return (node,)
    own = (node.fusion_name,) if isinstance(node, Fuse) else ()
    return tuple(dict.fromkeys([*(name for child in node.children for name in leaves(child)), *own]))


def nodes(node: Node) -> Iterator[Node]:
    """Every node, the root first."""
    yield node
    if isinstance(node, Composition):
        for child in node.children:
            yield from nodes(child)


def channels(node: Node) -> list[Node]:
    """A composition without `Parallel`, once per channel: what each copy of the batch runs under.

    Raises:
        ConfigError: two `Parallel` with different numbers of channels, or one where rows or positions are split.
    """
    if isinstance(node, str):
        return [node]
    if isinstance(node, Parallel):
        return [channel for child in node.children for channel in channels(child)]
    each = [channels(child) for child in node.children]
    count = max(len(c) for c in each)
    if count == 1:
        return [node]
    if not isinstance(node, Stack):
        raise ConfigError(f"Parallel cannot stand inside {type(node).__name__}; put it outside or into a Stack")
    if any(len(c) not in (1, count) for c in each):
        raise ConfigError(f"the Parallel blocks of {node!r} have different numbers of channels")
    return [Stack(*(c[i] if len(c) == count else c[0] for c in each)) for i in range(count)]


def per_row(node: Node, batch: int) -> list[Node]:
    """What each row of `batch · len(channels)` rows runs under.

    Raises:
        ConfigError: a `BatchSplit` whose sizes are not the batch.
    """
    return [one for channel in channels(node) for one in _rows(channel, batch)]


def _rows(node: Node, batch: int) -> list[Node]:
    if not isinstance(node, BatchSplit):
        return [node] * batch
    if sum(node.batch_sizes) != batch:
        raise ConfigError(
            f"batch_sizes {list(node.batch_sizes)} of BatchSplit add up to {sum(node.batch_sizes)} rows, and the batch "
            f"has {batch}"
        )
    parts = zip(node.children, node.batch_sizes, strict=True)
    return [one for child, size in parts for one in _rows(child, size)]


def by_rows(node: Node) -> bool:
    """Whether a composition is one adapter (or composition) per row of a batch."""
    return isinstance(node, BatchSplit) or any(isinstance(n, Parallel) for n in nodes(node))


def beside(node: Node) -> tuple[str, ...]:
    """The names of the adapters that something other than a `Stack` has around them, each once."""
    if isinstance(node, str):
        return ()
    if not isinstance(node, Stack):
        return leaves(node)
    return tuple(dict.fromkeys(name for child in node.children for name in beside(child)))


def ordered(node: Node) -> bool:
    """Whether a composition is nothing but adapters one after the other."""
    return all(isinstance(n, (str, Stack)) for n in nodes(node))


# ---------------------------------------------------------------------- as plain values
def to_json(node: Node) -> Any:
    """A composition as JSON has it."""
    if isinstance(node, str):
        return node
    own = {f.name: list(getattr(node, f.name)) for f in fields(node) if f.name != "children"}
    return {"kind": type(node).__name__, "children": [to_json(child) for child in node.children], **own}


def from_json(value: Any) -> Node:
    """Undoes `to_json`.

    Raises:
        ConfigError: no composition of this kind.
    """
    if isinstance(value, str):
        return value
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is no composition{hint(str(kind), KINDS)}")
    options = {k: v for k, v in value.items() if k not in ("kind", "children")}
    if kind == "Average":
        options["normalize"] = False
    return KINDS[kind](*(from_json(child) for child in value["children"]), **options)
