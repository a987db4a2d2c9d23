"""WHO runs: which adapters are active, and what this call carries.

One `Plan` is shared by all hosts of a model. Its state is an immutable value that is swapped whole, so that
switching or disabling adapters is O(1) and a checkpointed block can be run again under the state it had.
Activity says nothing about training: `requires_grad` is the caller's own matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import local
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from deltatune import kernels
from deltatune.core.composition import BASE as BASE
from deltatune.core.composition import Composition, Node, leaves
from deltatune.errors import MixedBatchError

if TYPE_CHECKING:
    from deltatune.core.rounding import Rounding

T = TypeVar("T")


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
    #: positions worked out before, for every module of this call; None where nothing may be noted
    _known: dict[Hashable, Any] | None = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, names: Sequence[Node], positions: int = 1) -> RowPlan:
        groups: dict[Node, list[int]] = {}
        for i, name in enumerate(names):
            if name != BASE:
                groups.setdefault(name, []).append(i)
        return cls(tuple((n, tuple(rows)) for n, rows in groups.items()), len(names), len(names) * positions)

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute()` the first time in this call."""
        known = self._known
        if known is None:
            return compute()
        if key not in known:
            known[key] = compute()
        return cast(T, known[key])

    def index(self, rows: tuple[int, ...], size: int, device: torch.device, where: str) -> torch.Tensor:
        """Positions along an axis of `size` that belong to batch `rows`.

        Raises:
            MixedBatchError: the axis is neither the batch nor the batch flattened with its positions.
        """
        return self.remember((rows, size, device), lambda: self._positions(rows, size, device, where))

    def joined(
        self, parts: Sequence[tuple[int, ...]], size: int, device: torch.device, where: str
    ) -> tuple[torch.Tensor | None, list[int]]:
        """The positions of several groups one after the other, and how many each has; None for all in order."""
        return self.remember((tuple(parts), size, device), lambda: self._joined(parts, size, device, where))

    def _joined(
        self, parts: Sequence[tuple[int, ...]], size: int, device: torch.device, where: str
    ) -> tuple[torch.Tensor | None, list[int]]:
        each = [self.index(rows, size, device, where) for rows in parts]
        whole = [row for rows in parts for row in rows] == list(range(self.batch))
        return None if whole else torch.cat(each), [len(i) for i in each]

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


class Call(local):
    """What one thread's calls of one model run under, so that several can generate at once."""

    #: in place of the plan's own state
    state: State | None = None
    #: one task number per row of this call, for methods with a prompt per task
    tasks: torch.Tensor | None = None
    #: while weights do not change: what was computed from them; see `Plan.steady`
    memo: dict[Hashable, Any] | None = None

    def __init__(self) -> None:
        #: outputs made before their modules are called; see `deltatune.core.together`
        self.ahead: dict[int, Any] = {}

    def __reduce__(self) -> Any:
        return Call, ()  # parts of a graph, which cannot be copied


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
        #: what runs where this thread's call does not say otherwise
        self.chosen = State()
        self.own = Call()
        #: bodies of `disabled` that run now, and whether adapters were enabled before the first
        self._disabled, self._before = 0, True

    @property
    def state(self) -> State:
        """What runs now."""
        own = self.own.state
        return self.chosen if own is None else own

    def refresh(self) -> None:
        """Derives the state after `active`, `merged` or `enabled` changed."""
        live = tuple(n for n in self.active if n not in self.merged) if self.enabled else ()
        self.chosen = State(live, None, self.tree if live else None, self.dropped)

    @contextlib.contextmanager
    def call(self, state: State) -> Iterator[None]:
        """Runs the body under `state`, in this thread."""
        own = self.own
        before, own.state = own.state, state
        try:
            yield
        finally:
            own.state = before

    @contextlib.contextmanager
    def carrying(self, tasks: torch.Tensor | None) -> Iterator[None]:
        """Runs the body with one task number per row."""
        own = self.own
        before, own.tasks = own.tasks, tasks
        try:
            yield
        finally:
            own.tasks = before

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Runs the body under the promise that no weight changes in it (a generation), so that edits may keep
        what they compute from weights alone; see `remember`. Other threads promise for themselves."""
        own = self.own
        before, own.memo = own.memo, {} if own.memo is None else own.memo
        try:
            yield
        finally:
            own.memo = before

    @property
    def _memo(self) -> dict[Hashable, Any] | None:
        return None if torch.compiler.is_compiling() else self.own.memo

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
        """Runs the body as the plain base, in all threads."""
        if not self._disabled:
            self._before = self.enabled
        self._disabled, self.enabled = self._disabled + 1, False
        self.refresh()
        try:
            with self.call(State()) if self.own.state is not None else contextlib.nullcontext():
                yield
        finally:
            self._disabled -= 1
            if not self._disabled:
                self.enabled = self._before
            self.refresh()

    def checkpointed(self, checkpoint: Callable[..., T], function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`checkpoint(function, *args)`, where it is a function as `torch.utils.checkpoint`'s, with the recomputation
        under the forward's state and kernels."""
        state = replace(self.state)
        if torch.compiler.is_compiling():  # the compiler has both in one graph; nothing may be noted in such a part
            rows = None if state.rows is None else replace(state.rows, _known=None)
            with self.call(replace(state, rows=rows)):
                return checkpoint(function, *args, **kwargs)
        again = partial(self._again, state, kernels.mode())

        def run(*args: Any, **kwargs: Any) -> T:
            with again():
                return function(*args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    @contextlib.contextmanager
    def _again(self, state: State, mode: str) -> Iterator[None]:
        with self.call(state), contextlib.nullcontext() if mode == kernels.mode() else kernels.use(mode):
            yield
