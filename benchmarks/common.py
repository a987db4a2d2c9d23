"""Shared by the benchmarks: the real model and data, deterministic counts, and files that a killed run keeps."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn


def machine() -> dict[str, Any]:
    """Where a number was measured."""
    import transformers

    import deltatune

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deltatune": deltatune.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@contextmanager
def saved_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd keeps for backward, each storage once, parameters and buffers not at all."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(kept.values())


def load_smollm2(dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct."""
    from deltatune.train.models import load_model, load_tokenizer, resolve_model

    resolved = resolve_model("smollm2-135m-instruct")
    return load_model(resolved, dtype=dtype), load_tokenizer(resolved)


def read_json(path: Path) -> dict[str, Any]:
    """What an earlier run left; empty if nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    from deltatune.core.files import write_atomically

    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda p: p.write_text(text))
