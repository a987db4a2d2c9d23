"""Merging, written once: fold in float32, keep the base's own parameters, give them back bit for bit.

A weight in few bits becomes an ordinary dense weight (its layer an ordinary layer) where its store says which, since
writing back rounds; `same` asks for the storage the base has, and says how to round (`rounding`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.combine import added, fold, matrix_of, refuse_merge
from deltatune.core.edits import Delta, Edit, LowRank, ModuleEdit
from deltatune.core.hosts import Host, hosted_class
from deltatune.core.rounding import Rounding
from deltatune.core.sites import base_modules
from deltatune.errors import ConfigError
from deltatune.stores import find_store, put_weight, strip, table_of, weight_of


@contextlib.contextmanager
def evaluating(edits: Sequence[Edit]) -> Iterator[None]:
    """Runs the body with the edits as they are outside training, without what training does at random."""
    hosts = [e.host for e in edits if not isinstance(e, Bank) and e.host.training]
    for module in hosts:
        module.training = False
    try:
        yield
    finally:
        for module in hosts:
            module.training = True


#: a weight: the id of the module that has it, and its name there
Key = tuple[int, str]


@dataclass
class New:
    """A merged tensor, where it goes, and the class that its module needs to compute with it (None: any)."""

    owner: nn.Module
    leaf: str
    value: Any
    kind: type | None
    deltas: Sequence[Delta] = ()


class Merged:
    """The base's own tensors while others stand in their place."""

    def __init__(self) -> None:
        #: the base's own parameters
        self.originals: dict[Key, Any] = {}
        self._places: dict[Key, New] = {}
        #: the modules' own classes and the order of their tensors
        self._before: dict[int, tuple[type, list[str]]] = {}
        self._refs: list[Delta] = []
        self._tied: Any = None
        #: how numbers were rounded to the base's own storage; None if that was not kept
        self.same: Rounding | None = None

    def __bool__(self) -> bool:
        return bool(self.originals)

    @torch.no_grad()
    def fold(
        self,
        adapters: Sequence[tuple[str, Sequence[Edit]]],
        *,
        safe: bool,
        root: nn.Module,
        same: Rounding | None = None,
        aware: Rounding | None = None,
        for_good: bool = False,
    ) -> None:
        """Puts the folded weights of all these adapters in place; nothing changes if one cannot merge.

        Args:
            same: keep the base's storage, and how to round where that is quantised; None for dense weights.
            aware: how the adapters run merge-aware, so that dense weights hold the numbers that they run with.
            for_good: nobody will restore, so ordinary weights may be written over, which takes no memory of their size.
        """
        edits = [edit for _, es in adapters for edit in es if not isinstance(edit, Bank)]
        for edit in edits:
            if not isinstance(edit, (Delta, ModuleEdit)):
                raise refuse_merge(edit, getattr(edit.host, "path", ""))
        groups = self._by_weight(edits)
        over = self._overwritable(groups, root) if for_good and not safe else {}
        with evaluating(edits):
            rest = [deltas for key, deltas in groups.items() if key not in over]
            new = [*self._folded_deltas(rest, safe, (same, aware), root), *self._replaced(edits)]
            for pair, w in over.values():  # what could fail is behind us
                added(pair, w, w)
        self.same = same
        self._untie(root, [n.owner for n in new])
        for n in new:
            key = (id(n.owner), n.leaf)
            if key not in self.originals:
                self._before.setdefault(id(n.owner), (type(n.owner), list(n.owner._parameters)))
                self.originals[key] = weight_of(n.owner, n.leaf)
            self._places[key] = n
            put_weight(n.owner, n.leaf, n.value, n.kind)
            for delta in n.deltas:
                delta.ref.original = self.originals[key]
        self._refs += [e for e in edits if isinstance(e, Delta)]

    @staticmethod
    def _by_weight(edits: Sequence[Edit]) -> dict[Key, list[Delta]]:
        """The deltas of every weight that has some."""
        groups: dict[Key, list[Delta]] = {}
        for edit in edits:
            if isinstance(edit, Delta):
                groups.setdefault((id(edit.ref.owner), edit.ref.leaf), []).append(edit)
        return groups

    def _overwritable(self, groups: dict[Key, list[Delta]], root: nn.Module) -> dict[Key, tuple[LowRank, Tensor]]:
        """The weights that `added` can fold where they stand: no original is kept for them, and no other reads them."""
        readers = Counter(
            p.untyped_storage().data_ptr()
            for module in root.modules()
            for p in module._parameters.values()
            if type(p) is nn.Parameter and type(p.data) is Tensor
        )
        found = {}
        for key, deltas in groups.items():
            w = None if key in self.originals else matrix_of(deltas)
            if w is not None and readers[w.untyped_storage().data_ptr()] == 1:
                found[key] = cast(LowRank, deltas[0]), w
        return found

    def _folded_deltas(
        self,
        groups: Sequence[list[Delta]],
        safe: bool,
        how: tuple[Rounding | None, Rounding | None],
        root: nn.Module,
    ) -> Iterator[New]:
        same, aware = how
        for deltas in groups:
            ref, w, dense = deltas[0].ref, matrix_of(deltas), None
            if w is not None:
                new = torch.empty_like(w, memory_format=torch.contiguous_format)
                dense = added(cast(LowRank, deltas[0]), w, new)
            full = fold(deltas) if dense is None else dense
            rounds = not ref.store.exact and (same or aware) is not None  # codes could not tell of it
            if (safe or rounds) and not torch.isfinite(full).all():
                raise ConfigError(
                    f"merging {ref.module.path!r} would give numbers that are not finite; the adapter is broken"
                )
            own = self._before.get(id(ref.owner), (type(ref.owner), []))[0]
            if dense is not None:
                yield New(ref.owner, ref.leaf, nn.Parameter(dense, ref.param.requires_grad), None, deltas)
                continue
            if ref.store.exact:
                yield New(ref.owner, ref.leaf, ref.store.save(ref.param, full), None, deltas)
                continue
            plain = getattr(ref.store, "dense_layer", None)
            if same is not None or plain is None:
                yield New(ref.owner, ref.leaf, (same or Rounding()).write(ref, full), own, deltas)
            else:
                full = full if aware is None else ref.store.load(aware.write(ref, full)).to(full.dtype)
                value = nn.Parameter(full.to(dense_dtype(ref.store, ref.param, root)), requires_grad=False)
                yield New(ref.owner, ref.leaf, value, plain_class(own, plain), deltas)

    def _replaced(self, edits: Sequence[Edit]) -> Iterator[New]:
        for edit in edits:
            if isinstance(edit, ModuleEdit):
                for owner, leaf, tensor in edit.replacements():
                    own = table_of(owner, leaf)[leaf]
                    value = tensor.detach().to(own.dtype).clone() if own is not None else tensor
                    is_param = isinstance(own, nn.Parameter)
                    value = nn.Parameter(value, own.requires_grad) if is_param else value
                    yield New(owner, leaf, value, None)

    def _untie(self, root: nn.Module, owners: Sequence[nn.Module]) -> None:
        """A merged weight is no longer its tied partner's: say so in the model's configuration."""
        config = getattr(root, "config", None)
        if config is None or not getattr(config, "tie_word_embeddings", False) or self._tied is not None:
            return
        ends = [getattr(root, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
        parts = {id(m) for end in ends if end is not None for m in end.modules()}
        if any(id(owner) in parts for owner in owners):
            self._tied = config
            config.tie_word_embeddings = False

    def tell(self, deltas: Sequence[Delta]) -> None:
        """Lets deltas that are live beside what is merged read the base's own weight still."""
        for delta in deltas:
            original = self.originals.get((id(delta.ref.owner), delta.ref.leaf))
            if original is not None:
                delta.ref.original = original
                self._refs.append(delta)

    def restore(self, root: nn.Module) -> None:
        """Puts the base's own tensors back."""
        self._put_originals()
        if self._tied is not None:
            self._tied.tie_word_embeddings = True
        self.forget()

    def _put_originals(self) -> None:
        for key, n in self._places.items():
            kind, order = self._before[id(n.owner)]
            # a module that kept its class may have been hosted, or freed, in the meantime
            put_weight(n.owner, n.leaf, self.originals[key], None if n.kind is None else kind)
            reorder(n.owner, order)

    def bake(self) -> None:
        """Makes what is merged stay: nothing of the originals is kept, on the layers either."""
        for key, n in self._places.items():
            if n.kind is not None and self._before[id(n.owner)][0] is not n.kind:
                strip(n.owner, find_store(self.originals[key]))
        self.forget()

    def forget(self) -> None:
        """Lets the originals go: what is merged stays for good."""
        for delta in self._refs:
            delta.ref.original = None
        self.originals, self._places, self._before, self._refs, self._tied = {}, {}, {}, [], None

    @contextlib.contextmanager
    def base_in_place(self) -> Iterator[None]:
        """Runs the body with the base's own tensors, then puts the merged ones back."""
        self._put_originals()
        try:
            yield
        finally:
            for n in self._places.values():
                put_weight(n.owner, n.leaf, n.value, n.kind)


def plain_class(own: type, plain: type[nn.Module]) -> type:
    """The class of a layer with a dense weight in place of `own`, hosted as that is."""
    return hosted_class(plain) if issubclass(own, Host) else plain


def dense_dtype(store: Any, param: Any, root: nn.Module) -> torch.dtype:
    """The type of a dense weight in place of `param`: what its layer computes in, else what the model is in."""
    if getattr(store, "own_dtype", True):
        return store.dtype(param)  # type: ignore[no-any-return]
    counts: Counter[torch.dtype] = Counter()
    for _, module in base_modules(root):
        for p in module._parameters.values():
            if p is not None and p.is_floating_point() and find_store(p).exact:
                counts[p.dtype] += p.numel()
    return counts.most_common(1)[0][0] if counts else store.dtype(param)


def reorder(owner: nn.Module, names: Sequence[str]) -> None:
    """Puts a module's parameters into the order they had."""
    table = owner._parameters
    for name in [n for n in names if n in table]:
        table[name] = table.pop(name)
