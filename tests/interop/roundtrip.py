"""An adapter goes from Hugging Face peft to us and back, and from us to peft: outputs and files must agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltatune
from tiny import ids, shake


def run(model: nn.Module, x: Any = None) -> Tensor:
    """The model's logits on fixed token ids, or its output for `x`."""
    with torch.no_grad():
        return model(input_ids=ids()).logits if x is None else model(*x)


def same_files(ours: Path, theirs: Path) -> None:
    """Equal configurations key by key (sets and their order apart), equal tensors' names and shapes."""
    a, b = (json.loads((p / "adapter_config.json").read_text()) for p in (ours, theirs))
    for values in (a, b):
        values.pop("peft_version")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(values.get(name), list):
                values[name] = sorted(set(values[name]))  # peft writes a task's head twice when it loads and saves
    assert a == b
    x, y = (load_file(p / "adapter_model.safetensors") for p in (ours, theirs))
    assert {k: (v.shape, v.dtype) for k, v in x.items()} == {k: (v.shape, v.dtype) for k, v in y.items()}


def both_ways(make: Callable[[], nn.Module], method: str, folder: Path, x: Any = None, **fields: Any) -> None:
    """Trains nothing, moves every parameter by chance, and carries the adapter across in both directions."""
    config = f"{method}Config"
    theirs = peft.get_peft_model(make(), getattr(peft, config)(**fields)).eval()
    shake(theirs, scale=0.5)
    theirs.save_pretrained(folder / "peft")
    ours = deltatune.PeftModel.from_pretrained(make(), folder / "peft")
    assert ours.load_report.clean
    wanted = run(theirs, x)
    assert torch.allclose(run(ours, x), wanted, atol=1e-5)
    assert not torch.allclose(run(make(), x), wanted, atol=1e-3)
    ours.save_pretrained(folder / "again")
    same_files(folder / "again", folder / "peft")

    fresh = deltatune.get_peft_model(make(), getattr(deltatune, config)(**fields)).eval()
    shake(fresh, scale=0.5, seed=2)
    fresh.save_pretrained(folder / "ours")
    back = peft.PeftModel.from_pretrained(make(), folder / "ours").eval()
    assert torch.allclose(run(back, x), run(fresh, x), atol=1e-5)
    back.save_pretrained(folder / "back")
    same_files(folder / "ours", folder / "back")
