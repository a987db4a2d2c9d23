"""WHO runs: which adapters are active, and what this call carries.

One `Plan` is shared by all hosts of a model. Its state is an immutable value that is swapped whole, so that
switching or disabling adapters is O(1) and a checkpointed block can be run again under the state it had.
Activity says nothing about training: `requires_grad` is the caller's own matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from deltatune.core.composition import BASE as BASE
from deltatune.core.composition import Composition, Node, leaves
from deltatune.errors import MixedBatchError

if TYPE_CHECKING:
    from deltatune.core.rounding import Rounding

T = TypeVar("T")

#: plans of this thread whose weights do not change now -> what was computed from them; see `Plan.steady`
_STEADY: ContextVar[dict[Plan, dict[Hashable, Any]] | None] = ContextVar("deltatune_steady", default=None)


@dataclass(frozen=True)
class RowPlan:
    """Row i of the batch uses adapter `names[i]`.

    Attributes:
        groups: adapter (or composition) -> the batch rows that use it; rows of the plain base are in no group.
        batch: number of rows. tokens: rows × positions, for modules that see the batch flattened.
    """

    groups: tuple[tuple[Node, tuple[int, ...]], ...]
    batch: int
    tokens: int
    #: positions worked out before, for every module of this call
    _known: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, names: Sequence[Node], positions: int = 1) -> RowPlan:
        groups: dict[Node, list[int]] = {}
        for i, name in enumerate(names):
            if name != BASE:
                groups.setdefault(name, []).append(i)
        return cls(tuple((n, tuple(rows)) for n, rows in groups.items()), len(names), len(names) * positions)

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()` the first time in this call."""
        if key not in self._known:
            self._known[key] = compute()
        return cast(T, self._known[key])

    def index(self, rows: tuple[int, ...], size: int, device: torch.device, where: str) -> torch.Tensor:
        """Positions along an axis of `size` that belong to batch `rows`.

        Raises:
            MixedBatchError: the axis is neither the batch nor the batch flattened with its positions.
        """
        key = (rows, size, device)
        if key not in self._known:
            self._known[key] = self._positions(rows, size, device, where)
        return cast(torch.Tensor, self._known[key])

    def joined(
        self, parts: Sequence[tuple[int, ...]], size: int, device: torch.device, where: str
    ) -> tuple[torch.Tensor | None, list[int]]:
        """The positions of several groups one after the other, and how many each has; None for all in order."""
        key = (tuple(parts), size, device)
        if key not in self._known:
            each = [self.index(rows, size, device, where) for rows in parts]
            index = torch.cat(each)
            whole = len(index) == size and bool((index == torch.arange(size, device=device)).all())
            self._known[key] = (None if whole else index, [len(i) for i in each])
        return cast("tuple[torch.Tensor | None, list[int]]", self._known[key])

    def _positions(self, rows: tuple[int, ...], size: int, device: torch.device, where: str) -> torch.Tensor:
        index = torch.tensor(rows, device=device)
        if size == self.batch:
            return index
        if size == self.tokens:
            k = size // self.batch
            return (index[:, None] * k + torch.arange(k, device=device)).flatten()
        raise MixedBatchError(
            f"adapter_names has {self.batch} entries but {where} is called with {size} rows, so rows cannot be "
            "told apart there; leave this module out of target_modules or run the adapters one by one"
        )


@dataclass(frozen=True)
class State:
    """What a call runs under: `names` are live (active and not merged), `rows` a mixed batch, `tree` how the names are
    composed; without one they add up."""

    names: tuple[str, ...] = ()
    rows: RowPlan | None = None
    tree: Composition | None = None
    #: layers below this number run as the base's (AdapterDrop)
    dropped: int = 0

    @property
    def adapters(self) -> tuple[str, ...]:
        """All that take part in the call."""
        if self.rows is None:
            return self.names
        return tuple(dict.fromkeys(name for node, _ in self.rows.groups for name in leaves(node)))

    def rows_of(self, adapter: str) -> tuple[int, ...] | None:
        """The batch rows that an adapter has in this call; None for all."""
        if self.rows is None:
            return None
        return tuple(i for node, rows in self.rows.groups if adapter in leaves(node) for i in rows)


class Plan:
    """Shared by every host of one model."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        #: how the active adapters are composed; None adds them up
        self.tree: Composition | None = None
        self.merged: tuple[str, ...] = ()
        self.enabled = True
        #: AdapterDrop: adapters in layers below this number do not run
        self.dropped = 0
        #: merge-aware: quantised weights run as a merge into their storage would leave them; how it rounds
        self.rounding: Rounding | None = None
        self.state = State()
        #: one task number per row of this call, for methods with a prompt per task
        self.tasks: torch.Tensor | None = None
        #: outputs made before their modules are called; see `deltatune.core.together`
        self.ahead: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ahead": {}}  # parts of a graph, which cannot be copied

    def refresh(self) -> None:
        """Derives the state after `active`, `merged` or `enabled` changed."""
        live = tuple(n for n in self.active if n not in self.merged) if self.enabled else ()
        self.state = State(live, None, self.tree if live else None, self.dropped)

    @contextlib.contextmanager
    def call(self, state: State) -> Iterator[None]:
        """Runs the body under `state`."""
        before, self.state = self.state, state
        try:
            yield
        finally:
            self.state = before

    @contextlib.contextmanager
    def carrying(self, tasks: torch.Tensor | None) -> Iterator[None]:
        """Runs the body with one task number per row."""
        before, self.tasks = self.tasks, tasks
        try:
            yield
        finally:
            self.tasks = before

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Runs the body under the promise that no weight changes in it (a generation), so that edits may keep
        what they compute from weights alone; see `remember`. Other threads promise for themselves."""
        outer = _STEADY.get() or {}
        token = _STEADY.set({self: {}, **outer})
        try:
            yield
        finally:
            _STEADY.reset(token)

    @property
    def _memo(self) -> dict[Hashable, Any] | None:
        plans = None if torch.compiler.is_compiling() else _STEADY.get()
        return None if plans is None else plans.get(self)

    @property
    def is_steady(self) -> bool:
        """Whether `remember` keeps anything now."""
        return self._memo is not None

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()`, or within `steady` its first result for this key."""
        memo = self._memo
        if memo is None:
            return compute()
        if key not in memo:
            memo[key] = compute()
        return cast(T, memo[key])

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Runs the body as the plain base."""
        before, self.enabled = (self.enabled, self.state), False
        self.state = State()
        try:
            yield
        finally:
            self.enabled, self.state = before

    def checkpoint_contexts(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """`context_fn` for `torch.utils.checkpoint`: the recomputation runs under the forward's state."""
        return contextlib.nullcontext(), self.call(replace(self.state))
