"""Adapter checkpoints: what is written, and a loading that accounts for every key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltatune.core.adapters import AdapterSet
from deltatune.core.bank import Bank
from deltatune.core.edits import Slot
from deltatune.core.ops import VectorOp
from deltatune.errors import AdapterLoadError, nearest

#: what peft writes before the base's own names
PREFIX = "base_model.model."
#: and before those of modules that train beside a soft prompt, which peft keeps in no tuner
PROMPT_PREFIX = "base_model."


@dataclass
class LoadReport:
    """What became of an adapter file's keys; all lists are empty after a clean load.

    Attributes:
        missing_keys: tensors of the adapter that the file lacks (they keep their initial values).
        unexpected_keys: tensors of the file that the adapter has no place for.
        mismatched: (key, shape in the file, shape here).
        notes: what else is worth knowing, a sentence each.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (self.missing_keys or self.unexpected_keys or self.mismatched)

    def describe(self, name: str) -> str:
        """The one error text of a load that does not fit."""
        parts = [f"the file does not fit adapter {name!r}"]
        if self.missing_keys:
            parts.append(f"{len(self.missing_keys)} keys are missing: {_list(self.missing_keys)}")
            parts += self.notes
        if self.unexpected_keys:
            parts.append(
                f"{len(self.unexpected_keys)} keys are unexpected: {_list(self.unexpected_keys)}" + self._candidates()
            )
        for key, there, here in self.mismatched[:8]:
            parts.append(f"{key} has shape {there} in the file and {here} here")
        if len(self.mismatched) > 8:
            parts.append(f"and {len(self.mismatched) - 8} more shapes differ")
        return "; ".join(parts) + " (in Python, strict=False loads what fits and returns this report)"

    def _candidates(self) -> str:
        if not self.missing_keys:
            return ""
        close = nearest(self.unexpected_keys[0], self.missing_keys, n=1)
        return f" (nearest to the first: {close[0]})" if close else ""


def _list(keys: list[str], n: int = 8) -> str:
    more = f", and {len(keys) - n} more" if len(keys) > n else ""
    return ", ".join(keys[:n]) + more


#: what writers put between the base's own names
_WRAPPERS = re.compile("_orig_mod|base_layer|modules_to_save|original_module")


def canonical(key: str) -> str:
    """A key without what differs between writers: wrappers' names and the model prefix."""
    key = key.removeprefix(PREFIX)
    if not _WRAPPERS.search(key):
        return key
    key = key.replace("._orig_mod.", ".").removeprefix("_orig_mod.")
    parts = [p for p in key.split(".") if p not in ("base_layer", "modules_to_save", "original_module")]
    return ".".join(parts)


def _as_tuners(key: str) -> str:
    """A key of a soft prompt's file with the prefix that the other methods' files have."""
    return PREFIX + key.removeprefix(PROMPT_PREFIX) if key.startswith(PROMPT_PREFIX) else key


def slots_of(adapters: AdapterSet, name: str) -> dict[str, Slot]:
    """canonical key -> slot, for every saved tensor of an adapter."""
    adapters.check(name)
    pairs = [(canonical(key), key, slot) for edit in adapters.edits[name] for key, slot in edit.state()]
    shorts = Counter(short for short, _, _ in pairs)
    # nested `base_layer`s tell apart the parameters of fused experts: keep them where they do
    return {short if shorts[short] == 1 else key: slot for short, key, slot in pairs}


def adapter_state(
    adapters: AdapterSet, name: str, *, prefix: str = "", source: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """file key -> tensor.

    Args:
        prefix: what stands before the base's own names; a bank's names belong to no module and go without.
        source: take the numbers from this state dict of the whole model (gathered, unsharded) instead.

    Raises:
        AdapterLoadError: a tensor has no numbers (sharded away or on the meta device).
    """
    adapters.check(name)
    given = _by_slot(adapters, source) if source is not None else {}
    weights = [delta for delta in adapters.deltas(name) if not isinstance(delta.ref.op, VectorOp)]
    adapted = {slot.key.removesuffix(f".{slot.file_name}") for delta in weights for slot in delta.slots}
    if prefix == PREFIX and adapters.configs[name].is_prompt_learning:
        prefix = PROMPT_PREFIX
    state: dict[str, Tensor] = {}
    for edit in adapters.edits[name]:
        for key, slot in edit.state():
            tensor = given.get(id(slot), slot.weight)
            tensor = _whole(tensor)
            if tensor.is_meta or tensor.shape == (0,):  # a shard's placeholder; a rank of 0 is (0, in)
                raise AdapterLoadError(f"{key} has no numbers to save (it is empty or on the meta device)")
            state[key if isinstance(edit, Bank) else prefix + _file_key(key, slot, adapted)] = tensor
    return state


def _by_slot(adapters: AdapterSet, source: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """id of a slot -> its tensor in a state dict of the whole model, which may be wrapped."""
    paths = {id(module): path for path, module in adapters.root.named_modules() if path}
    numbers = {k.removeprefix(PREFIX).replace("_orig_mod.", ""): t for k, t in source.items()}
    found = {}
    for edits in adapters.edits.values():
        for edit in edits:
            for slot in edit.slots:
                key = f"{paths.get(id(slot.holder), '')}.{slot.attr}"
                if key in numbers:
                    found[id(slot)] = numbers[key]
    return found


def _file_key(key: str, slot: Slot, adapted: set[str]) -> str:
    """peft names what belongs to an adapted layer itself (its bias) under `base_layer`."""
    parent, _, leaf = key.rpartition(".")
    if slot.leaf is None and slot.file_name == leaf == "bias" and parent in adapted:
        return f"{parent}.base_layer.{leaf}"
    return key


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered; others as they are."""
    full = getattr(tensor, "full_tensor", None)
    return full() if callable(full) else tensor


def remap(state: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Renames keys by regular expressions, the first that matches each key."""
    if not key_mapping:
        return dict(state)
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in key_mapping.items():
            new, hits = re.subn(pattern, replacement, key)
            if hits:
                key = new
                break
        renamed[key] = tensor
    return renamed


@torch.no_grad()
def load_adapter_state(
    adapters: AdapterSet, name: str, state: Mapping[str, Tensor], *, strict: bool = True, keep: bool = False
) -> LoadReport:
    """Fills an adapter from `state`; keys may carry peft's prefixes.

    Args:
        keep: nobody else holds these tensors, so their memory may become the adapter's.

    Raises:
        AdapterLoadError: strict, and a key is missing, unexpected or mis-shaped. Nothing has been changed then.
    """
    if adapters.configs[name].is_prompt_learning:
        state = {_as_tuners(key): tensor for key, tensor in state.items()}
    slots = slots_of(adapters, name)
    exact = {slot.key: key for key, slot in slots.items()}
    # peft also writes the frozen original of a saved module if bias="all"; the trained copy, later here, wins
    items = sorted(state.items(), key=lambda item: ".original_module." not in item[0])
    found = {exact.get(k.removeprefix(PREFIX)) or canonical(k): (k, t) for k, t in items}
    report = LoadReport(missing_keys=[s.key for k, s in slots.items() if k not in found and not s.derived])
    advice = {s.advice for k, s in slots.items() if s.advice and s.key in report.missing_keys}
    report.notes += sorted(advice)
    pairs: list[tuple[Slot, Tensor]] = []
    bases: list[tuple[Tensor, Tensor]] = []
    followers = tuple(f"{e.host.path}." for e in adapters.edits[name] if e.follows)
    for key, (original, tensor) in found.items():
        if key not in slots and followers and key.startswith(followers):
            continue  # what a tied head repeats
        if key not in slots:
            bases += _leftover(adapters, key, original, tensor, report)
        elif slots[key].weight.shape != tensor.shape:
            shapes = (tuple(tensor.shape), tuple(slots[key].weight.shape))
            report.mismatched.append((original, *shapes))
        else:
            pairs.append((slots[key], tensor))
    if strict and not report.clean:
        raise AdapterLoadError(report.describe(name))
    for slot, tensor in pairs:
        slot.fill(tensor, keep=keep)
        slot.later = None
    for slot in slots.values():
        if slot.later is not None:
            slot.fill(slot.later())
            slot.later = None
    for base, tensor in bases:
        base.data.copy_(tensor)
    return report


def _leftover(
    adapters: AdapterSet, key: str, original: str, tensor: Tensor, report: LoadReport
) -> list[tuple[Tensor, Tensor]]:
    """A key that is not the adapter's: one of the base's own tensors (peft saves embeddings), or unexpected."""
    module, _, leaf = key.rpartition(".")
    try:
        base = adapters.root.get_submodule(module)._parameters.get(leaf)
    except AttributeError:
        base = None
    if base is None:
        report.unexpected_keys.append(original)
    elif base.shape != tensor.shape:
        report.mismatched.append((original, tuple(tensor.shape), tuple(base.shape)))
    elif not base.is_meta and not torch.equal(base.detach().cpu(), tensor.to(base.dtype).cpu()):
        report.notes.append(f"{original} replaced the base's own numbers")
        return [(base, tensor)]
    return []
