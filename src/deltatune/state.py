"""An adapter's tensors as checkpoints hold them: out of a model, into a model, from a file."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltatune.card import write_card
from deltatune.config import PeftConfig, TargetedConfig
from deltatune.core import fingerprint
from deltatune.core.adapters import AdapterSet, adapters_of
from deltatune.core.checkpoint import LoadReport, adapter_state, load_adapter_state, remap
from deltatune.core.files import SAFETENSORS_NAME, find_file, read_tensors, write_tensors
from deltatune.core.sites import standing
from deltatune.core.ties import TiedCopy
from deltatune.errors import DeltatuneError

#: names in `target_modules` that make peft write the base's matrix too, for a vocabulary that has grown
EMBEDDINGS = ("embed_tokens", "lm_head")


def find_adapters(model: Any) -> AdapterSet:
    model = getattr(model, "_orig_mod", model)
    found = adapters_of(model) or getattr(model, "adapters", None)
    if found is None:
        raise DeltatuneError(f"this {type(model).__name__} has no adapters; attach one with get_peft_model")
    return found


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors as checkpoints hold them: the adapter's name is not in the keys.

    Args:
        state_dict: take the numbers from here (a gathered state dict) and not from the model.
        save_embedding_layers: True adds the base's embeddings; `"auto"` where they are adapted by name.
    """
    adapters = find_adapters(model)
    prefix = getattr(getattr(model, "_orig_mod", model), "state_prefix", "")
    tensors = adapter_state(adapters, adapter_name, prefix=prefix, source=state_dict)
    for edit in adapters.edits[adapter_name]:
        if isinstance(edit, TiedCopy):  # peft's reader asks for the head too
            name = f"{prefix}{edit.source.host.path}.weight"
            tensors[f"{prefix}{edit.host.path}.weight"] = tensors[name].detach().clone()
    if save_embedding_layers:
        embeddings = _embeddings(adapters, adapter_name, always=save_embedding_layers is True)
        tensors |= {f"{prefix}{k}": t for k, t in embeddings.items()}
    return tensors


def _embeddings(adapters: AdapterSet, name: str, always: bool) -> dict[str, Tensor]:
    """The base's embedding matrices; unless `always`, those that are adapted under a name that peft looks for."""
    found: dict[str, Tensor] = {}
    wanted = getattr(adapters.configs[name], "target_modules", None) or ()
    named = any(known in wanted for known in EMBEDDINGS)
    targets = {id(d.ref.owner) for d in adapters.deltas(name) if not d.few_rows}
    for which in ("input", "output"):
        getter = getattr(adapters.root, f"get_{which}_embeddings", None)
        try:
            module = getter() if getter is not None else None
        except NotImplementedError:
            module = None
        if module is None or not (always or (named and id(module) in targets)):
            continue
        path = next(p for p, m in adapters.root.named_modules(remove_duplicate=False) if m is module)
        layer = ".base_layer" if id(module) in targets else ""
        found[f"{path}{layer}.weight"] = module._parameters["weight"].detach()
    return found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = True,
) -> LoadReport:
    """Fills an adapter; every key that does not fit is an error unless `strict=False`."""
    adapters = find_adapters(model)
    return load_adapter_state(
        adapters, adapter_name, peft_model_state_dict, strict=strict and not ignore_mismatched_sizes
    )


def write_adapter(
    adapters: AdapterSet,
    name: str,
    folder: Path,
    tensors: dict[str, Tensor],
    config: PeftConfig | None = None,
    base: dict[str, Any] | None = None,
) -> None:
    """An adapter's files in `folder`: configuration, tensors with the base's fingerprint, a card if there is none.

    Args:
        config: what the file says in place of the adapter's own configuration.
        base: the fingerprint of the base that the file is for, where the model's has changed since.
    """
    base = base or fingerprint.take(adapters.root, adapters.deltas(name))
    metadata = {fingerprint.METADATA_KEY: fingerprint.dumps(base)}
    write_tensors(folder / SAFETENSORS_NAME, tensors, metadata)
    config = copy.copy(config or adapters.configs[name])
    config.inference_mode = True
    if isinstance(config, TargetedConfig):
        with standing(adapters.root):
            fields = config.written(adapters.root)
        for field, value in fields.items():
            setattr(config, field, value)
    if config.task_type is None:
        model = type(adapters.root)
        config.auto_mapping = {"base_model_class": model.__name__, "parent_library": model.__module__}
    config.save_pretrained(folder)
    write_card(folder, adapters.root, adapters.configs[name])


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """The tensors of a saved adapter, in a directory or on the hub."""
    path = find_file(model_id, SAFETENSORS_NAME, **hf_hub_download_kwargs)
    return remap(read_tensors(path, device or "cpu")[0], key_mapping)
