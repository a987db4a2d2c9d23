"""The fingerprint of a base: enough to tell, before the first token, that an adapter is for another model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltatune.core.edits import Delta

METADATA_KEY = "deltatune_base"
#: numbers sampled per tensor, and tensors sampled per model
SAMPLES, TENSORS = 16, 4


def architecture(model: nn.Module) -> str:
    """The name of the model's class, the one it had before it was hosted."""
    return type(model).__name__


def take(model: nn.Module, deltas: Sequence[Delta]) -> dict[str, Any]:
    """Architecture, shapes of the adapted weights, and a few numbers of a few of them.

    Numbers are kept rather than a digest of them, since a base loaded in another precision is the same base.
    """
    shapes = hashlib.sha256()
    weights = []
    for delta in deltas:
        parent = f"{delta.host.path}." if delta.host.path else ""
        name = f"{parent}{delta.ref.name}"
        shapes.update(f"{name}{tuple(delta.ref.full_shape)}".encode())
        weights.append((name, delta))
    step = max(1, len(weights) // TENSORS)
    samples = {name: _sample(delta) for name, delta in weights[::step][:TENSORS]}
    return {
        "architecture": architecture(model),
        "shapes": shapes.hexdigest()[:16],
        "samples": {k: v for k, v in samples.items() if v is not None},
    }


def _sample(delta: Delta) -> list[float] | None:
    """Evenly spaced numbers of a dense weight; None where they cannot be read as they are."""
    param = delta.ref.param
    if not delta.ref.store.exact or param.is_meta or hasattr(param, "device_mesh"):
        return None
    flat = param.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long().to(flat.device)
    return [float(f"{v:.6g}") for v in flat[index].double().tolist()]


def differences(model: nn.Module, deltas: Sequence[Delta], saved: dict[str, Any]) -> list[str]:
    """How this base differs from the one the adapter was trained on, in words; empty if it does not."""
    found = []
    if saved.get("architecture") != architecture(model):
        found.append(f"it was trained on a {saved.get('architecture')} and this is a {architecture(model)}")
    by_name = {f"{d.host.path}.{d.ref.name}" if d.host.path else d.ref.name: d for d in deltas}
    other = []
    for name, numbers in saved.get("samples", {}).items():
        delta = by_name.get(name)
        here = _sample(delta) if delta is not None else None
        if here is not None and not _close(numbers, here, delta.ref.dtype if delta else torch.float32):
            other.append(name)
    if other:
        found.append(f"the numbers of {', '.join(other)} are not those of the base it was trained on")
    return found


def _close(a: Sequence[float], b: Sequence[float], dtype: torch.dtype) -> bool:
    # a base may be loaded in bfloat16 (8 bits of precision) or float16 and remains the same base
    x, y = (torch.tensor(t, dtype=torch.float64, device="cpu") for t in (a, b))
    scale = float(x.abs().max())
    return bool(torch.allclose(x, y, rtol=2**-6, atol=max(scale, 1e-12) * 2**-10))


def dumps(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True)
