"""What one adapter changes, tensor by tensor and by the tensors' full names, whatever its method."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig
from deltatune.core.adapters import AdapterSet
from deltatune.core.bank import Bank
from deltatune.core.changes import Change, change_of, precise
from deltatune.core.combine import refuse_merge
from deltatune.core.edits import Delta, Edit, ModuleEdit
from deltatune.core.ops import find_op
from deltatune.core.sites import base_modules, bias_sites, is_multihead, saved_modules
from deltatune.core.weights import WeightRef
from deltatune.methods.lora_bias import AddedBias, BiasDelta


class Whole(Delta):
    """A parameter of a module that an adapter trained whole, as a change of the base's."""

    def __init__(self, ref: WeightRef, tensor: Tensor) -> None:
        super().__init__(ref)
        self.value = tensor

    def merged(self, w: Tensor) -> Tensor:
        return self.ref.op.matrix(self.value).to(w.dtype)


class Parts:
    """The changes of one adapter.

    Attributes:
        deltas: parameter -> the deltas of it. refs: parameter -> its weight.
        betas: weight -> the bias on its B. copied: modules that can only be kept as whole copies.

    Raises:
        CannotMergeError: something that is no change of a tensor.
    """

    def __init__(self, adapters: AdapterSet, name: str) -> None:
        self.root = adapters.root
        self.paths = {id(module): path for path, module in base_modules(self.root)}
        self.biases = {join(s.path, s.parameter or "") for s in bias_sites(self.root)}
        config = adapters.configs[name]
        assert isinstance(config, TargetedConfig)
        self.saved = saved_modules(self.root, config)
        self.deltas: dict[str, list[Delta]] = {}
        self.betas: dict[str, AddedBias | BiasDelta] = {}
        self.copied: list[str] = []
        self._values: dict[str, tuple[Tensor, Tensor]] = {}
        for edit in adapters.edits[name]:
            self._take(edit)
        self.refs = {place: deltas[0].ref for place, deltas in self.deltas.items()}

    def _take(self, edit: Edit) -> None:
        if isinstance(edit, (AddedBias, BiasDelta)):
            self.betas[weight_of(edit)] = edit
        elif isinstance(edit, Delta):
            self.deltas.setdefault(place_of(edit), []).append(edit)
        elif isinstance(edit, ModuleEdit):
            self._take_whole(edit)
        elif not isinstance(edit, Bank):
            raise refuse_merge(edit, str(getattr(edit.host, "path", "")))

    def _take_whole(self, edit: ModuleEdit) -> None:
        """`modules_to_save` stay whole; of modules that a method trains whole, weights and biases are changes."""
        path = self.paths[id(edit.host)]
        stays = path in self.saved or edit.follows
        for owner, leaf, tensor in edit.replacements():
            base, place = getattr(owner, leaf), join(self.paths[id(owner)], leaf)
            if not tensor.is_floating_point():
                continue
            ref = None if stays else self._ref(owner, leaf)
            if ref is not None:
                self.deltas[place] = [Whole(ref, tensor)]
            elif stays or not torch.equal(tensor, base):
                self._values[place] = (base, tensor)
                self.copied.append(path if stays else self.paths[id(owner)])

    def _ref(self, owner: nn.Module, leaf: str) -> WeightRef | None:
        """The weight or bias that LoRA has a place for; None for others."""
        path = self.paths[id(owner)]
        parent, _, last = path.rpartition(".")
        if path and is_multihead(self.root.get_submodule(parent)):
            return WeightRef(self.root.get_submodule(parent), f"{last}.{leaf}")
        matrix = (leaf == "weight" and find_op(owner) is not None) or (leaf == "in_proj_weight" and is_multihead(owner))
        return WeightRef(owner, leaf) if matrix or join(path, leaf) in self.biases else None

    def change(self, place: str) -> Change | None:
        """The change of a parameter as a matrix; None if it is left alone. Tensors of copies are `(n, 1)`."""
        if place in self._values:
            base, tensor = self._values[place]
            return Change(dense=(precise(tensor) - precise(base)).reshape(-1, 1))
        return change_of(self.deltas[place]) if place in self.deltas else None

    def raw(self, place: str) -> Change | None:
        """The same in the layout of the parameter, flattened to `(n, 1)`."""
        change = self.change(place)
        if change is None or place in self._values:
            return change
        return Change(dense=self.refs[place].stored(change.matrix()).reshape(-1, 1))

    def beta(self, place: str) -> Change | None:
        """The change of the bias on B of a weight, `(out, 1)`."""
        edit = self.betas.get(place)
        if edit is None:
            return None
        beta = edit.scale * precise(edit.beta.weight)[:, None]
        return Change(dense=edit.ref.put(beta.new_zeros(edit.ref.full_shape[-2], 1), beta))


def place_of(edit: Delta) -> str:
    """The full name of the parameter that an edit changes."""
    return join(str(edit.host.path), edit.ref.name)


def weight_of(edit: AddedBias | BiasDelta) -> str:
    """The full name of the weight that a bias on B belongs to."""
    return join(str(edit.host.path), edit.ref.name.replace("bias", "weight"))


def join(path: str, name: str) -> str:
    """A parameter's full name."""
    return f"{path}.{name}" if path else name


def ordered(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in the order they come."""
    return list(dict.fromkeys(name for names in groups for name in names))
