"""Merging, written once: fold in float32, keep the base's own parameters, give them back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.bank import Bank
from deltatune.core.combine import fold, refuse_merge
from deltatune.core.edits import Delta, Edit, ModuleEdit
from deltatune.errors import ConfigError

#: where a module keeps a tensor: its parameters or its buffers
Place = tuple[nn.Module, str]


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


class Merged:
    """The base's own tensors while others stand in their place."""

    def __init__(self) -> None:
        #: (id of the owner, leaf) -> the base's own parameter
        self.originals: dict[tuple[int, str], Tensor] = {}
        self._places: dict[tuple[int, str], tuple[nn.Module, Tensor]] = {}
        self._refs: list[Delta] = []
        self._tied: Any = None

    def __bool__(self) -> bool:
        return bool(self.originals)

    @torch.no_grad()
    def fold(self, adapters: Sequence[tuple[str, Sequence[Edit]]], *, safe: bool, root: nn.Module) -> None:
        """Puts the folded weights of all these adapters in place; nothing changes if one cannot merge."""
        edits = [edit for _, es in adapters for edit in es if not isinstance(edit, Bank)]
        for edit in edits:
            if not isinstance(edit, (Delta, ModuleEdit)):
                raise refuse_merge(edit, getattr(edit.host, "path", ""))
        with evaluating(edits):
            new = [*self._folded_deltas(edits, safe), *self._replaced(edits)]
        self._untie(root, [owner for owner, *_ in new])
        for owner, leaf, tensor, deltas in new:
            key = (id(owner), leaf)
            if key not in self.originals:
                self.originals[key] = _table(owner, leaf)[leaf]
            self._places[key] = (owner, tensor)
            _table(owner, leaf)[leaf] = tensor
            for delta in deltas:
                delta.ref.original = self.originals[key]
        self._refs += [e for e in edits if isinstance(e, Delta)]

    def _folded_deltas(self, edits: Sequence[Edit], safe: bool) -> Iterator[tuple[nn.Module, str, Tensor, list[Delta]]]:
        groups: dict[tuple[int, str], list[Delta]] = {}
        for edit in edits:
            if isinstance(edit, Delta):
                groups.setdefault((id(edit.ref.owner), edit.ref.leaf), []).append(edit)
        for deltas in groups.values():
            ref = deltas[0].ref
            full = fold(deltas)
            if safe and not torch.isfinite(full).all():
                raise ConfigError(
                    f"merging {ref.module.path!r} would give numbers that are not finite; the adapter is broken"
                )
            yield ref.owner, ref.leaf, ref.store.save(ref.param, full), deltas

    def _replaced(self, edits: Sequence[Edit]) -> Iterator[tuple[nn.Module, str, Tensor, list[Delta]]]:
        for edit in edits:
            if isinstance(edit, ModuleEdit):
                for owner, leaf, tensor in edit.replacements():
                    own = _table(owner, leaf)[leaf]
                    value = tensor.detach().to(own.dtype).clone() if own is not None else tensor
                    is_param = isinstance(own, nn.Parameter)
                    yield owner, leaf, nn.Parameter(value, own.requires_grad) if is_param else value, []

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
        for key, (owner, _) in self._places.items():
            _table(owner, key[1])[key[1]] = self.originals[key]
        if self._tied is not None:
            self._tied.tie_word_embeddings = True
        self.forget()

    def forget(self) -> None:
        """Lets the originals go: what is merged stays for good."""
        for delta in self._refs:
            delta.ref.original = None
        self.originals, self._places, self._refs, self._tied = {}, {}, [], None

    @contextlib.contextmanager
    def base_in_place(self) -> Iterator[None]:
        """Runs the body with the base's own tensors, then puts the merged ones back."""
        for key, (owner, _) in self._places.items():
            _table(owner, key[1])[key[1]] = self.originals[key]
        try:
            yield
        finally:
            for key, (owner, tensor) in self._places.items():
                _table(owner, key[1])[key[1]] = tensor


def _table(owner: nn.Module, leaf: str) -> dict[str, Any]:
    return owner._parameters if leaf in owner._parameters else owner._buffers
