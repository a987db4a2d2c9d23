"""Writes what a run has made as a LoRA that peft reads, where it is one: a pair beside modules, or a chain of pairs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.core.checkpoint import PREFIX
from deltatune.core.sharded import whole
from deltatune.core.sites import saved_modules, shortest_names, tied_heads
from deltatune.methods.lora import LoraConfig, LoraDelta
from deltatune.schedules._base import modules_of, prefixed
from deltatune.schedules.base import Run
from deltatune.state import get_peft_model_state_dict, write_adapter


def lora_of(run: Run) -> LoraConfig | None:
    """The configuration of the adapter that trains, if it is a LoRA."""
    config = run.adapters.configs.get(run.adapter) if run.adapters is not None else None
    return config if isinstance(config, LoraConfig) else None


def write_with_modules(run: Run, names: Iterable[str], folder: Path) -> bool:
    """Writes the LoRA with the modules of the base that hold these parameters in `modules_to_save`.

    False where that cannot say it: there is no LoRA, or it adapts one of the modules, or one contains others.

    Args:
        names: of the base's parameters.
    """
    config, adapters = lora_of(run), run.adapters
    modules = {path: run.root.get_submodule(path) for path in dict.fromkeys(n.rpartition(".")[0] for n in names)}
    adapted = {id(m) for edit in run.edits() for m in modules_of(edit)}
    if config is None or adapters is None or any(id(m) in adapted or _contains(m) for m in modules.values()):
        return False
    copied = saved_modules(run.root, config)
    new = shortest_names(run.root, [path for path in modules if path not in copied], str.endswith)
    config = copy.copy(config)
    config.modules_to_save = [*(config.modules_to_save or []), *new]
    config.ensure_weight_tying = config.ensure_weight_tying or any(tied_heads(run.root, path) for path in modules)
    state = _trained(run)
    for path, module in modules.items():
        for name, value in module.state_dict().items():
            state[f"{PREFIX}{path}.{name}"] = whole(value.detach()).clone()
        for head in tied_heads(run.root, path):  # peft's reader asks for it too
            state[f"{PREFIX}{head}.weight"] = whole(module.get_parameter("weight").detach()).clone()
    write_adapter(adapters, run.adapter, folder, state, config)
    return True


def _contains(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def write_pairs(
    run: Run,
    pairs: Sequence[tuple[LoraDelta, Tensor, Tensor]],
    r: int,
    pattern: dict[str, int],
    folder: Path,
    base: Any,
) -> None:
    """Writes the LoRA with other factors in place of its own, with a scale of 1.

    Args:
        pairs: delta, A `(*batch, r, in)`, B `(*batch, out, r)`. r, pattern: their ranks, as `r` and `rank_pattern`.
        base: the fingerprint of the base that the file is for.
    """
    config, adapters = lora_of(run), run.adapters
    assert config is not None
    assert adapters is not None
    config = copy.copy(config)
    config.r = config.lora_alpha = r
    config.rank_pattern, config.alpha_pattern, config.use_rslora = pattern, dict(pattern), False
    state = _trained(run)
    for delta, a, b in pairs:
        packed = delta.ref.op.pack(delta.ref.module, a, b)
        wanted = {id(slot): value for slot, value in zip((delta.lora_A, delta.lora_B), packed, strict=True)}
        for key, slot in delta.state():
            state[prefixed(key)] = wanted[id(slot)].contiguous()
    write_adapter(adapters, run.adapter, folder, state, config, base)


def _trained(run: Run) -> dict[str, Tensor]:
    """The adapter's tensors by their names in files."""
    state = get_peft_model_state_dict(run.root, adapter_name=run.adapter)
    return {prefixed(key): tensor for key, tensor in state.items()}
