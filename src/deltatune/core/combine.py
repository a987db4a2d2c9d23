"""How the edits of one module run together: added up, or row by row in a mixed batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import kernels
from deltatune.core import prompts, rounding, together
from deltatune.core.bank import Bank
from deltatune.core.compose import FusionEdit, composed
from deltatune.core.composition import Composition, Node, leaves, ordered
from deltatune.core.edits import Args, Delta, Edit, KVEdit, Kwargs, LowRank, ModuleEdit, PromptEdit, Witness
from deltatune.core.lazy import LowRankWeight
from deltatune.core.plan import RowPlan, State
from deltatune.errors import CannotMergeError, MixedBatchError
from deltatune.kernels.reading import Reader

Base = Callable[..., Any]


def fold(deltas: Sequence[Delta]) -> Tensor:
    """The whole stored weight under several deltas of one parameter, in float32.

    One delta gives its `merged` weight itself; several add their changes to the same base weight.
    """
    base = deltas[0].ref.load_full()
    full = base
    for i, delta in enumerate(deltas):
        ref = delta.ref
        w = ref.take(base)
        new = delta.merged(w)
        full = ref.put(full, new if i == 0 else ref.take(full) + (new - w))
    return deltas[0].ref.stored(full)


#: numbers of a weight that are folded at once; they stay in the cache
BLOCK = 2**18


def matrix_of(deltas: Sequence[Delta]) -> Tensor | None:
    """The ordinary matrix that a single low-rank pair changes, which `added` can fold; None for others."""
    delta = deltas[0]
    if len(deltas) > 1 or not isinstance(delta, LowRank) or type(delta).merged is not LowRank.merged:
        return None
    return delta.ref.dense_matrix()


def added(delta: LowRank, w: Tensor, out: Tensor) -> Tensor:
    """`fold` of one low-rank pair and the matrix `w` into `out` of the same dtype, which may be `w` itself: summed in
    float32 a block of rows at a time, so that nothing but the result is ever whole in memory."""
    wide = torch.promote_types(w.dtype, torch.float32)
    a, b = (t.to(wide) for t in delta.factors())
    step = max(1, BLOCK // w.shape[1])
    for start in range(0, w.shape[0], step):
        rows = slice(start, start + step)
        if w.dtype == wide:
            torch.addmm(w[rows], b[rows], a, out=out[rows])
        else:
            out[rows] = torch.addmm(w[rows].to(wide), b[rows], a)
    return out


@contextlib.contextmanager
def substituted(pairs: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Runs the body with other tensors in place of parameters: (module, leaf, tensor)."""
    saved = [(module, leaf, module._parameters[leaf]) for module, leaf, _ in pairs]
    for module, leaf, tensor in pairs:
        module._parameters[leaf] = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, leaf, param in saved:
            module._parameters[leaf] = param


def rebuilds(edits: Sequence[Edit]) -> list[tuple[nn.Module, str, Tensor]]:
    """The weights to put in place for a call: one per parameter that cannot be bypassed."""
    by_name: dict[str, list[Delta]] = {}
    for edit in edits:
        if isinstance(edit, Delta) and not edit.ref.bypass:
            by_name.setdefault(edit.ref.name, []).append(edit)
    return [(ds[0].ref.owner, ds[0].ref.leaf, _in_place(ds)) for ds in by_name.values()]


def _in_place(deltas: Sequence[Delta]) -> Tensor:
    """The weight of a call: formed, or left as base and factors where the module reads only parts of it."""
    ref = deltas[0].ref
    if not ref.indexed or not all(isinstance(d, LowRank) for d in deltas):
        return fold(deltas).to(ref.dtype)
    pairs = [d.factors() for d in deltas if isinstance(d, LowRank)]
    a, b = torch.cat([a for a, _ in pairs], -2), torch.cat([b for _, b in pairs], -1)
    weight = LowRankWeight.of(ref.op.matrix(ref.store.load(ref.param)), a, b)
    return ref.stored(weight)


def first_tensor(args: Args, kwargs: Kwargs) -> Tensor:
    """The module's input: its first positional argument, or its first keyword."""
    x = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(x, Tensor), "a hosted module is called with a tensor first"
    return x


def with_first(args: Args, kwargs: Kwargs, x: Tensor) -> tuple[Args, Kwargs]:
    """The module's arguments with another input; see `first_tensor`."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def call(base: Base, edits: Sequence[Edit], args: Args, kwargs: Kwargs) -> Any:
    """The module's own call under the edits that are not additive."""
    for edit in edits:
        if isinstance(edit, ModuleEdit):
            return edit.run(args, kwargs)
    pairs = rebuilds(edits)
    if not pairs:
        return base(*args, **kwargs)
    with substituted(pairs):
        return base(*args, **kwargs)


def update(edit: Edit, x: Tensor, y: Tensor, merged: bool) -> Tensor | None:
    """One edit's contribution; `merged` tells that `y` is not the plain base's output."""
    if isinstance(edit, Delta) and merged and edit.reads_output:
        return edit.apart(x)
    return edit.update(x, y)


def is_additive(edit: Edit) -> bool:
    """Whether this edit adds to the module's output (others change its input, its weight or its attention)."""
    if isinstance(edit, Delta):
        return edit.ref.bypass
    return type(edit).update is not Edit.update


def run(host: Any, base: Base, state: State, args: Args, kwargs: Kwargs) -> Any:
    """A hosted module's call under `state`: its prompts around everything else."""
    for edit in host.edits_of(state.adapters):
        if isinstance(edit, Witness):
            edit.see(args, kwargs)
    groups = prompts.groups_of(host, state)
    if not groups:
        return run_layer(host, base, state, args, kwargs)

    def inner(*args: Any, **kwargs: Any) -> Any:
        return run_layer(host, base, host.plan.state, args, kwargs)

    return prompts.run(host, inner, groups, args, kwargs)


def _edits(host: Any, state: State) -> list[Edit]:
    """What runs at a module in a call without rows."""
    if state.tree is not None and not ordered_and_plain(host, state.tree):
        return composed(host, state.tree, is_additive, changes_input)
    return [e for e in host.edits_of(state.names) if not isinstance(e, Witness)]


def ordered_and_plain(host: Any, tree: Node) -> bool:
    """Whether at this module a composition is a single adapter's, so that it needs no walk."""
    here = [name for name in leaves(tree) if host.edits_of((name,))]
    return ordered(tree) and len(here) < 2


def read(host: Any, state: State, x: Tensor) -> Tensor | None:
    """The call of a host in a generation, by what its first call there has worked out; None where that cannot be."""
    if torch.is_grad_enabled():
        return None
    rows = 0 if state.rows is None else x.shape[0]
    # the state is kept with the answer, so that no other can get its id
    _, reader = host.plan.remember((id(host), id(state), rows, x.dtype), lambda: (state, _reader(host, state, x)))
    return None if reader is None else reader(x)


def _reader(host: Any, state: State, x: Tensor) -> Reader | None:
    edits: list[Edit] = host.edits_of(state.adapters)
    plain = not host.plan.merged and host.plan.rounding is None and state.tree is None and kernels.possible()
    pairs = [e for e in edits if isinstance(e, LowRank)]
    if not plain or not pairs or len(pairs) < len(edits):
        return None
    if state.rows is None:
        return pairs[0].reader(x) if len(pairs) == 1 else None
    shared = _shared(host, state.rows)
    if shared is None or len(shared) != 1:
        return None
    where = f"{type(host).__name__} {host.path!r}"
    index, sizes = state.rows.joined([rows for _, rows in shared[0]], x.shape[0], x.device, where)
    first, *others = (edit for edit, _ in shared[0] if isinstance(edit, LowRank))
    return first.reader(x, others, index) if len(set(sizes)) == 1 else None


def run_layer(host: Any, base: Base, state: State, args: Args, kwargs: Kwargs) -> Any:
    """A hosted module's call under the edits that are no prompts."""
    if state.rows is not None:
        return run_rows(host, base, state.rows, args, kwargs)
    edits = _edits(host, state)
    if not edits:
        return base(*args, **kwargs)
    if len(edits) == 1 and len(args) == 1 and not kwargs and not host.plan.merged and host.plan.rounding is None:
        whole = together.run(host, edits[0], state, args[0])
        whole = edits[0].whole(args[0], base) if whole is None else whole
        if whole is not None:
            return whole
    for edit in edits:
        args, kwargs = edit.pre(args, kwargs)
    additive = [e for e in edits if is_additive(e)]
    if host.plan.rounding is not None:
        additive = rounding.join(additive, host.plan.rounding)
    if not additive:
        return call(base, edits, args, kwargs)
    x = first_tensor(args, kwargs)
    moving = [e for e in additive if isinstance(e, Delta) and e.moves_input]
    if host.plan.merged or len(additive) < len(edits):
        moving = []  # the call does not run with the base's own weight
    if moving:
        args, kwargs = with_first(args, kwargs, sum((e.moved(x) for e in moving), x))
    out = call(base, edits, args, kwargs)
    y = out[0] if isinstance(out, tuple) else out
    total = y
    for edit in [e for e in additive if e not in moving]:
        change = update(edit, x, y, bool(moving or host.plan.merged))
        if change is not None:
            total = total + change.to(total.dtype)
    return (total, *out[1:]) if isinstance(out, tuple) else total


# ---------------------------------------------------------------------- mixed batches
def run_rows(host: Any, base: Base, rows: RowPlan, args: Args, kwargs: Kwargs) -> Any:
    """A batch whose rows use different adapters: one base call, then each group's change on its rows.

    Edits that say so (`Edit.group`) share one product over the rows of all their adapters.
    """
    shared = None if torch.compiler.is_compiling() else rows.remember(("shared", id(host)), lambda: _shared(host, rows))
    if shared is not None:
        return _run_shared(host, base, rows, shared, args, kwargs)
    groups = [group for n, r in rows.groups for group in [(_row_edits(host, n), r)] if group[0]]
    where = f"{type(host).__name__} {host.path!r}"
    args, kwargs = _pre_rows(groups, rows, args, kwargs, where)
    out = base(*args, **kwargs)
    if not groups:
        return out
    y = out[0] if isinstance(out, tuple) else out
    x = first_tensor(args, kwargs)
    total = y
    together: dict[Hashable, list[tuple[Edit, tuple[int, ...]]]] = {}
    for edits, members in groups:
        index = rows.index(members, x.shape[0], x.device, where)
        own = _rerun(base, edits, index, args, kwargs, where)
        if own is not None:
            total = total.index_copy(0, index, own.to(total.dtype))
        for edit in (e for e in edits if is_additive(e)):
            key = edit.group()
            if key is None:
                total = _add_alone(edit, index, x, y[index] if own is None else own, total, where)
            else:
                together.setdefault(key, []).append((edit, members))
    for members_of in together.values():
        total = _add_together(members_of, rows, x, y, total, where)
    return (total, *out[1:]) if isinstance(out, tuple) else total


Members = list[tuple[Edit, tuple[int, ...]]]


def _shared(host: Any, rows: RowPlan) -> list[Members] | None:
    """The edits of all rows by the product they share; None if one runs alone on its rows. Worked out once a call."""
    together: dict[Hashable, Members] = {}
    for name, members in rows.groups:
        for edit in _row_edits(host, name):
            key = edit.group() if is_additive(edit) and type(edit).pre is Edit.pre else None
            if key is None:
                return None
            together.setdefault(key, []).append((edit, members))
    return list(together.values())


def _run_shared(host: Any, base: Base, rows: RowPlan, shared: list[Members], args: Args, kwargs: Kwargs) -> Any:
    out = base(*args, **kwargs)
    if not shared:
        return out
    y = out[0] if isinstance(out, tuple) else out
    x, total = first_tensor(args, kwargs), y
    for members in shared:
        total = _add_together(members, rows, x, y, total, f"{type(host).__name__} {host.path!r}")
    return (total, *out[1:]) if isinstance(out, tuple) else total


def _row_edits(host: Any, name: Node) -> list[Edit]:
    """An adapter's edits on this module; prompts and attention edits see to their rows themselves."""
    if isinstance(name, Composition):
        return composed(host, name, is_additive, changes_input)
    edits = [e for e in host.edits_of((name,)) if not isinstance(e, (PromptEdit, KVEdit, Witness))]
    return edits if host.plan.rounding is None else rounding.join(edits, host.plan.rounding)


def changes_input(edit: Edit) -> bool:
    """Whether this edit does nothing but replace the module's input."""
    kind = type(edit)
    return kind.pre is not Edit.pre and kind.update is Edit.update and not isinstance(edit, (Delta, ModuleEdit))


def composable(edit: Edit) -> bool:
    """Whether an edit can stand anywhere in a composition: it adds, changes an input, or is a module's own copy."""
    return is_additive(edit) or changes_input(edit) or isinstance(edit, (ModuleEdit, Witness, FusionEdit, Bank))


def _pre_rows(
    groups: Sequence[tuple[list[Edit], tuple[int, ...]]], rows: RowPlan, args: Args, kwargs: Kwargs, where: str
) -> tuple[Args, Kwargs]:
    """The module's input with every adapter's change of it on its own rows."""
    changing = [(edits, r) for edits, r in groups if any(changes_input(e) for e in edits)]
    if not changing:
        return args, kwargs
    if len(args) + len(kwargs) != 1:
        raise MixedBatchError(
            f"{where} takes several inputs, so adapter_names cannot change the input of single rows; run the adapters "
            "one by one"
        )
    x = first_tensor(args, kwargs)
    new = x
    for edits, members in changing:
        index = rows.index(members, x.shape[0], x.device, where)
        inner: tuple[Args, Kwargs] = ((x[index],), {})
        for edit in edits:
            inner = edit.pre(*inner) if changes_input(edit) else inner
        new = new.index_copy(0, index, first_tensor(*inner).to(new.dtype))
    return (new,), {}


def _rerun(base: Base, edits: Sequence[Edit], index: Tensor, args: Args, kwargs: Kwargs, where: str) -> Tensor | None:
    """The module's call on one adapter's rows, where an edit is not additive; None where all are."""
    others = [e for e in edits if not is_additive(e) and not changes_input(e)]
    if not others:
        return None
    for edit in others:
        if not isinstance(edit, (Delta, ModuleEdit)):
            raise MixedBatchError(f"{type(edit).__name__} at {where} cannot run on single rows of a mixed batch")
    if len(args) + len(kwargs) != 1:
        raise MixedBatchError(
            f"{where} reads its weight itself and takes several inputs, so adapter_names cannot split its "
            "batch; run the adapters one by one or leave it out of target_modules"
        )
    out = call(base, others, (first_tensor(args, kwargs)[index],), {})
    y: Tensor = out[0] if isinstance(out, tuple) else out
    return y


def _add_alone(edit: Edit, index: Tensor, x: Tensor, y: Tensor, total: Tensor, where: str) -> Tensor:
    """Adds one edit on its rows; `y` is the module's output on them."""
    change = edit.update(x[index], y)
    if change is None and type(edit).pre is Edit.pre:
        return total
    if change is None:
        raise MixedBatchError(f"{type(edit).__name__} at {where} cannot run on single rows of a mixed batch")
    return total.index_add(0, index, change.to(total.dtype).expand(y.shape))


def _add_together(
    members: Sequence[tuple[Edit, tuple[int, ...]]], rows: RowPlan, x: Tensor, y: Tensor, total: Tensor, where: str
) -> Tensor:
    """Adds the edits of several adapters in one product over all their rows."""
    index, sizes = rows.joined([m for _, m in members], x.shape[0], x.device, where)
    edits = [edit for edit, _ in members]
    first = edits[0]
    base = y if first.reads_output else None
    alone = not torch.is_grad_enabled() and not first.reads_output  # then the base's output need not be kept
    if index is None:
        if alone and total.dtype == x.dtype:
            return total.add_(first.update_rows(edits, sizes, x, None))
        return total + first.update_rows(edits, sizes, x, base).to(total.dtype)
    change = first.update_rows(edits, sizes, x[index], None if base is None else base[index])
    return total.index_add(0, index, change.to(total.dtype))


def refuse_merge(edit: Edit, where: str) -> CannotMergeError:
    return CannotMergeError(
        f"{type(edit).__name__} at {where!r} {edit.no_merge}, so it cannot be merged; "
        "keep the adapter beside the base (save_pretrained) instead"
    )
