"""How much memory a training step will need, from shapes alone: nothing is loaded or computed.

The part that no formula gives, what a step works with, is counted: one forward and backward pass of the adapted
model runs on fake tensors, which have shapes and a device but no numbers, while a dispatch mode follows every
storage from its making to its end. (Not the meta device: it has no attention kernels, and masks are looked at.)
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: a part of an optimiser's name → bytes of its state per trainable parameter; the first hit counts
_STATE_BYTES = (
    ("adamw_torch_4bit", 1.0),
    ("8bit", 2.0),
    ("adamw_bnb", 2.0),
    ("ademamix", 12.0),
    ("sgd", 0.0),
    ("lion", 4.0),
    ("adagrad", 4.0),
    ("rmsprop", 4.0),
    ("adafactor", 4.0),
)
_ADAM = 8.0  # two fp32 moments
#: bytes per weight in NF4 or FP4 with double quantisation: a code, its share of an 8-bit scale, of that one's scale
FOUR_BITS = 4 / 8 + 1 / 64 + 4 / (64 * 256)
#: bytes per weight of a quantised linear layer, its scales included (8 bit: one of 32 bits per row, left out)
_QUANTISED = {"4bit": FOUR_BITS, "nf4": FOUR_BITS, "fp4": FOUR_BITS, "native": FOUR_BITS, "8bit": 1.0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, by what they are for.

    Attributes:
        base: frozen weights as stored.
        adapter: trainable weights.
        optimizer: the optimiser's state; 0 where it is paged out to the host.
        working: activations, gradients and everything else that comes and goes in a step; None if unknown.
        process: the program itself, where it shares the memory (on a CPU).
        rows, length: of the largest batch.
        note: what the numbers leave out, or why one is missing.
    """

    base: int
    adapter: int
    optimizer: int
    working: int | None
    process: int
    rows: int
    length: int
    note: str = ""

    @property
    def total(self) -> int:
        """Everything that is known, together."""
        return self.base + self.adapter + self.optimizer + (self.working or 0) + self.process


def estimate_memory(
    model: Any,
    *,
    optim: str,
    rows: int,
    length: int,
    trained: int,
    checkpointing: bool,
    autocast: torch.dtype | None,
    quantization: str | None = None,
) -> MemoryEstimate:
    """Estimate the peak of one training step.

    Args:
        model: an adapted model of fake tensors (made, and given here, under one FakeTensorMode), on the device
            and in the types it will train in.
        optim: optimiser name, as in the recipe.
        rows: examples in one forward pass.
        length: tokens of the longest row.
        trained: trained tokens in one batch at most; logits are computed for their positions only.
        checkpointing: activations are recomputed.
        autocast: type of the forward pass where it is not the weights' own.
        quantization: how the base's linear layers will be stored, the output layer excepted.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    on_cpu = weights[0].device.type == "cpu"
    if checkpointing:
        model.activation_checkpointing_enable()
    note = "without the layer that is unpacked from its quantised form at a time" if quantization else ""
    working: int | None = None
    try:
        working = working_bytes(model, rows, length, min(trained, length), autocast)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        note = f"activations not estimated: {str(error).splitlines()[0]}"
    return MemoryEstimate(
        base=_base_bytes(model, quantization),
        adapter=_bytes(weights),
        optimizer=0 if optim.startswith("paged") else int(sum(p.numel() for p in weights) * _state_bytes(optim)),
        working=working,
        process=_process_bytes() if on_cpu else 0,
        rows=rows,
        length=length,
        note=note,
    )


def working_bytes(model: Any, rows: int, length: int, trained: int, autocast: torch.dtype | None) -> int:
    """Most bytes alive at once in a forward and backward pass, the weights left out.

    Args:
        rows, length: of the batch.
        trained: positions whose logits are computed.
    """
    from deltatune.train.trainer import can_select

    device = next(model.parameters()).device
    tokens = torch.zeros((rows, length), dtype=torch.long, device=device)
    options = {"logits_to_keep": torch.arange(trained, device=device)} if can_select(model) else {}
    model.train()
    live = _LiveBytes([*model.parameters(), *model.buffers()])
    with live:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            logits = model(input_ids=tokens, use_cache=False, **options).logits.float().flatten(0, 1)
        targets = torch.zeros(logits.shape[0], dtype=torch.long, device=device)
        loss = nn.functional.cross_entropy(logits, targets)
        del logits
        torch.autograd.backward(loss)
    model.zero_grad()
    return live.peak


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that operations make; those of `known` tensors are not counted."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.seen:
            size = storage.nbytes()
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def _state_bytes(optim: str) -> float:
    return next((size for part, size in _STATE_BYTES if part in optim), _ADAM)


def _base_bytes(model: Any, quantization: str | None) -> int:
    """Bytes of the frozen weights, tied ones once."""
    whole = _bytes(p for p in model.parameters() if not p.requires_grad)
    if quantization is None:
        return whole
    head = model.get_base_model().get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    weights = [layer.weight for layer in layers if not layer.weight.requires_grad]
    stored = sum(weight.numel() * _QUANTISED[quantization] for weight in weights)
    return whole - _bytes(weights) + int(stored)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _process_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
