"""Checkpoints of the library `adapters` (AdapterHub), version 1: read into adapters of ours.

    model = load_adapter(base, "folder")           # what `save_adapter` wrote
    model = load_adapter_setup(base, "folder")     # what `save_adapter_setup` wrote

Bottleneck adapters (with invertible ones and Compacter), LoRA, IA3, prefix tuning, and unions of them (MAM,
UniPELT) are read from safetensors files. That library also writes pickles, which are refused with the way to convert
them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig
from deltatune.core.adapters import AdapterSet
from deltatune.core.checkpoint import load_adapter_state
from deltatune.core.composition import Average, BatchSplit, Composition, Fuse, Node, Parallel, Split, Stack
from deltatune.core.edits import Edit
from deltatune.core.files import read_tensors
from deltatune.core.sites import base_modules
from deltatune.errors import AdapterLoadError, ConfigError
from deltatune.mapping import get_peft_model
from deltatune.methods._bottleneck import Bottleneck
from deltatune.methods._invertible import Invertible
from deltatune.methods._prompts import Prompt
from deltatune.methods.bottleneck import BottleneckConfig
from deltatune.methods.compacter import CompacterConfig
from deltatune.methods.fusion import Fusion, FusionConfig
from deltatune.methods.ia3 import IA3Config
from deltatune.methods.lora import LoraConfig
from deltatune.methods.prefix_tuning import PrefixTuningConfig
from deltatune.methods.union import UnionConfig
from deltatune.methods.unipelt import GatedLora, GatedLoraConfig, GatedPairs, GatedPrefixConfig
from deltatune.peft_model import PeftModel

CONVERT = (
    'tensors = torch.load("pytorch_adapter.bin", weights_only=True); '
    'safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, "adapter.safetensors")'
)
#: options of a bottleneck that both libraries have under one name
SAME = [
    "mh_adapter",
    "output_adapter",
    "cross_adapter",
    "non_linearity",
    "scaling",
    "original_ln_before",
    "is_parallel",
    "ln_before",
    "ln_after",
    "use_gating",
    "dropout",
    "stochastic_depth",
    "init_weights",
    "leave_out",
    "inv_adapter",
    "reduction_factor",
]
#: options of a bottleneck that are read only with this value
ONLY = {
    "original_ln_after": True,
    "factorized_phm_rule": False,
    "phm_bias": True,
    "shared_W_phm": False,
    "learn_phm": True,
}


# ---------------------------------------------------------------------- configurations
def configuration(model: nn.Module, values: Mapping[str, Any], keys: Iterable[str]) -> TargetedConfig:
    """Our configuration for one of that library's; `keys` of the file say where a LoRA is.

    Raises:
        ConfigError: a method, or an option, that is not read.
    """
    kind = values.get("architecture")
    if kind == "union":
        parts = [configuration(model, part, keys) for part in values["configs"]]
        return UnionConfig(configs=parts)
    if kind == "prefix_tuning":
        return _prefix(values)
    if kind == "lora":
        return _lora(model, values, keys)
    if kind is None:
        return _bottleneck(values)
    raise ConfigError(f"files of the library adapters with the architecture {kind!r} are not read")


def _bottleneck(values: Mapping[str, Any]) -> BottleneckConfig:
    for name, wanted in ONLY.items():
        if values.get(name, wanted) != wanted:
            raise ConfigError(f"a bottleneck adapter with {name}={values[name]!r} is not read, only with {wanted!r}")
    options = {name: values[name] for name in SAME if name in values}
    if options.get("inv_adapter"):
        options["inv_adapter_reduction_factor"] = values["inv_adapter_reduction_factor"]
    if options.get("is_parallel"):
        options["parallel_reads"] = "residual"
    # there these are ignored where they mean nothing
    if options.get("original_ln_before"):
        options["residual_before_ln"] = values.get("residual_before_ln", True)
    if options.get("ln_after") and not options.get("is_parallel"):
        options["adapter_residual_before_ln"] = values.get("adapter_residual_before_ln", False)
    if not values.get("phm_layer"):
        return BottleneckConfig(**options)
    names = ("phm_dim", "phm_rank", "shared_phm_rule", "factorized_phm_W", "phm_init_range")
    return CompacterConfig(**options, train_layer_norms=False, **{n: values[n] for n in names if n in values})


def _prefix(values: Mapping[str, Any]) -> PrefixTuningConfig:
    options: dict[str, Any] = {"num_virtual_tokens": values["prefix_length"], "shift_positions": False}
    if values.get("use_gating"):
        if not values.get("shared_gating", True):
            raise ConfigError("a prefix with gates of its own for keys and values is not read")
        return GatedPrefixConfig(**options, gate="row")
    return PrefixTuningConfig(**options)


def _lora(model: nn.Module, values: Mapping[str, Any], keys: Iterable[str]) -> TargetedConfig:
    if values.get("use_dora") or values.get("vera_d") is not None:
        raise ConfigError("DoRA and VeRA of the library adapters are not read")
    found = (re.match(r"(.+)\.loras\.[^.]+\.", key) for key in keys)
    paths = sorted({_path(model, match[1]) for match in found if match})
    options: dict[str, Any] = {"target_modules": paths}
    if values["composition_mode"] == "scale":
        return IA3Config(**options, feedforward_modules=[])
    rank: dict[str, Any] = {"r": values["r"], "lora_alpha": values["alpha"]}
    if values.get("use_gating"):  # there the gate takes the place of alpha / r
        return GatedLoraConfig(**options, r=values["r"], lora_alpha=values["r"], gate="row")
    return LoraConfig(**options, **rank, lora_dropout=values.get("dropout", 0.0))


def _path(model: nn.Module, path: str) -> str:
    """The module that a file calls `path`; files name the base's own model in front, or not."""
    paths = [p for p, _ in base_modules(model) if p]
    hits = [p for p in paths if p == path or path.endswith(f".{p}") or p.endswith(f".{path}")]
    if not hits:
        raise AdapterLoadError(f"the file adapts {path!r}, which this {type(model).__name__} does not have")
    return max(hits, key=len)


# ---------------------------------------------------------------------- tensors
def native(adapters: AdapterSet, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """That library's tensors under the keys of our adapter; what finds no place keeps its own key."""
    ours: dict[str, Tensor] = {}
    edits = adapters.edits[name]
    prefixes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = re.search(r"prefix_tunings\.[^.]+\.(\w+_prefix)\.(.+)$", key)
        if prefix:
            prefixes.setdefault(prefix[1], {})[prefix[2]] = tensor
            continue
        edit, leaf = _place(adapters, edits, key)
        slot = None if edit is None else _slot(edit, leaf)
        ours[key if slot is None else slot] = tensor
    for kind, parts in prefixes.items():
        prompt = next((e for e in edits if isinstance(e, Prompt)), None)
        if prompt is None or kind != "self_prefix":
            raise ConfigError(f"the {kind} of a model with an encoder and a decoder is not read")
        width = prompt.encoder.embedding.weight.shape[1]
        ours[prompt.slots[0].key] = _table(parts, width)
    return ours


def _table(parts: Mapping[str, Tensor], width: int) -> Tensor:
    """`(P, width)` keys and values of all layers, from a table or from the network that gives it."""
    if "control_trans" in parts:
        return parts["control_trans"].view(-1, width)
    h = torch.tanh(
        nn.functional.linear(parts["wte.weight"], parts["control_trans.0.weight"], parts["control_trans.0.bias"])
    )
    return nn.functional.linear(h, parts["control_trans.2.weight"], parts["control_trans.2.bias"])


def _place(adapters: AdapterSet, edits: list[Edit], key: str) -> tuple[Edit | None, str]:
    """(the edit that a tensor belongs to, the tensor's name in it)."""
    for pattern, find in (
        (r"(.+)\.adapter_fusion_layer\.[^.]+\.(.+)$", _fused_at),
        (r"(.+?)\.adapters\.[^.]+\.(.+)$", _bottleneck_at),
        (r"(.+)\.loras\.[^.]+\.(.+)$", _weight_at),
        (r"(.+)\.prefix_tuning\.prefix_gates\.[^.]+\.(.+)$", _attention_at),
    ):
        match = re.match(pattern, key)
        if match:
            return find(adapters, edits, match[1]), match[2]
    inverse = re.search(r"invertible_adapters\.[^.]+\.(.+)$", key)
    if inverse:
        return next((e for e in edits if isinstance(e, Invertible)), None), inverse[1]
    if key.endswith(".phm_rule"):
        return next((e for e in edits if any(s.name == "phm_rule" for s in e.slots)), None), "phm_rule"
    return None, key


def _at_block(edits: Iterable[Edit], path: str) -> Edit | None:
    """The edit of the sub-layer that `path` (`<block>.…attention…`, `<block>.output…`) speaks of."""
    kind = "cross" if "cross" in path else "attention" if "attention" in path else "feedforward"
    for edit in edits:
        sub = getattr(edit, "sublayer", None)
        if sub is not None and sub.kind == kind and f".{sub.block.path}." in f".{path}.":
            return edit
    return None


def _bottleneck_at(adapters: AdapterSet, edits: list[Edit], path: str) -> Edit | None:
    return _at_block((e for e in edits if isinstance(e, Bottleneck)), path)


def _fused_at(adapters: AdapterSet, edits: list[Edit], path: str) -> Edit | None:
    """A fusion stands where the adapters that it fuses do."""
    hosts = {id(e.host): e for e in edits if isinstance(e, Fusion)}
    others = [e for found in adapters.edits.values() for e in found if isinstance(e, Bottleneck)]
    there = _at_block((e for e in others if id(e.host) in hosts), path)
    return None if there is None else hosts[id(there.host)]


def _weight_at(adapters: AdapterSet, edits: list[Edit], path: str) -> Edit | None:
    here = _path(adapters.root, path)
    return next((e for e in edits if getattr(getattr(e, "host", None), "path", "") == here and e.slots), None)


def _attention_at(adapters: AdapterSet, edits: list[Edit], path: str) -> Edit | None:
    here = _path(adapters.root, path)
    return next((e for e in edits if isinstance(e, GatedPairs) and getattr(e.host, "path", "") == here), None)


#: that library's names -> ours
NAMES = {
    "adapter_down.0": "bottleneck_down",
    "adapter_down.1": "bottleneck_down",
    "adapter_down": "bottleneck_down",
    "adapter_up": "bottleneck_up",
    "adapter_norm_before": "bottleneck_norm_before",
    "adapter_norm_after": "bottleneck_norm_after",
    "query": "fusion_query",
    "key": "fusion_key",
    "value": "fusion_value",
    "F.0": "invertible_F_in",
    "F.2": "invertible_F_out",
    "G.0": "invertible_G_in",
    "G.2": "invertible_G_out",
}


def _slot(edit: Edit, leaf: str) -> str | None:
    """The key of our tensor for that library's `leaf`."""
    base, _, last = leaf.rpartition(".")
    name, attr = NAMES.get(base, base), last
    if isinstance(edit, Bottleneck) and edit.before is not None and base == "adapter_down.0":
        name = "bottleneck_norm_before"  # a second name of it; D comes behind
    if leaf in ("scaling", "phm_rule"):
        name, attr = ("bottleneck_scaling" if leaf == "scaling" else leaf), ""
    elif base == "gate":
        name = "lora_gate" if isinstance(edit, GatedLora) else "bottleneck_gate"
    elif isinstance(edit, GatedPairs):
        name = "prefix_gate"
    elif last in ("W_left", "W_right", "W"):
        name, attr = name + {"W_left": "_left", "W_right": "_right", "W": "_whole"}[last], ""
    elif last == "b":
        attr = "bias"
    elif leaf in ("lora_A", "lora_B"):
        gain = next((s for s in edit.slots if s.name.startswith("ia3")), None)
        if gain is not None:
            return gain.key
        name, attr = leaf, "weight"
    for slot in edit.slots:
        if slot.name == name and (not attr or slot.leaf in (None, attr)):
            return slot.key
    return None


# ---------------------------------------------------------------------- loading
def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None, *, is_trainable: bool = False
) -> PeftModel:
    """Puts an adapter of that library on a model, or beside the adapters of a `PeftModel`.

    Args:
        adapter_name: its name here; the one in the file if None.

    Raises:
        AdapterLoadError: files that are missing, pickled or do not fit; lists every key.
        ConfigError: a method or option that is not read.
    """
    values = _read_json(Path(folder), "adapter_config.json")
    tensors = _read(Path(folder), "adapter")
    name = adapter_name or str(values["name"])
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = configuration(base, values["config"], tensors)
    return _attach(model, config, name, tensors, is_trainable)


def load_fusion(model: PeftModel, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> PeftModel:
    """Puts an AdapterFusion of that library over adapters that are on the model already."""
    values = _read_json(Path(folder), "adapter_fusion_config.json")
    options = values["config"]
    for name in ("query", "key", "value", "value_before_softmax"):
        if not options.get(name, True):
            raise ConfigError(f"a fusion with {name}=False is not read")
    for name in ("query_before_ln", "residual_before", "temperature"):
        if options.get(name):
            raise ConfigError(f"a fusion with {name}={options[name]!r} is not read")
    config = FusionConfig(adapters=list(values["adapter_names"]), dropout=options.get("dropout_prob") or 0.0)
    tensors = _read(Path(folder), "model_adapter_fusion")
    return _attach(model, config, ",".join(config.adapters), tensors, is_trainable)


def load_adapter_setup(model: nn.Module, folder: str | os.PathLike[str], *, is_trainable: bool = False) -> PeftModel:
    """Puts a composition of that library on a model, with all its adapters and fusions, and makes it run."""
    place = Path(folder)
    values = _read_json(place, "adapter_setup.json")
    for config in sorted(place.glob("*/adapter_config.json")):
        model = load_adapter(model, config.parent, is_trainable=is_trainable)
    if not isinstance(model, PeftModel):
        raise AdapterLoadError(f"{os.fspath(folder)!r} holds a setup and no adapter")
    for config in sorted(place.glob("*/adapter_fusion_config.json")):
        load_fusion(model, config.parent, is_trainable=is_trainable)
    tree = composition(values["adapter_setup"])
    model.set_adapter(tree if isinstance(tree, Composition) else [tree])
    return model


def composition(values: Mapping[str, Any]) -> Node:
    """That library's description of a composition as ours."""
    if values["type"] == "single":
        return str(values["children"][0])
    children = [composition(child) for child in values["children"]]
    kind = values["type"]
    if kind == "Average":
        return Average(*children, weights=values.get("weights"), normalize=False)
    if kind == "Split":
        return Split(*children, splits=values["splits"])
    if kind == "BatchSplit":
        return BatchSplit(*children, batch_sizes=values["batch_sizes"])
    kinds: dict[str, type[Composition]] = {"Stack": Stack, "Fuse": Fuse, "Parallel": Parallel}
    if kind not in kinds:
        raise ConfigError(f"the composition {kind!r} of the library adapters is not read")
    return kinds[kind](*children)


def _attach(
    model: nn.Module, config: TargetedConfig, name: str, tensors: Mapping[str, Tensor], is_trainable: bool
) -> PeftModel:
    config.inference_mode = not is_trainable
    new = not isinstance(model, PeftModel)
    wrapped = get_peft_model(model, config, adapter_name=name) if new else model
    assert isinstance(wrapped, PeftModel)
    if not new:
        wrapped.add_adapter(name, config)
    try:
        wrapped.load_report = load_adapter_state(wrapped.adapters, name, native(wrapped.adapters, name, tensors))
    except BaseException:
        wrapped.adapters.delete(name)
        if new:
            wrapped.adapters.remove_all()
        raise
    return wrapped.eval()


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterLoadError(f"{os.fspath(folder)!r} has no {name}, which the library adapters writes") from error
    except json.JSONDecodeError as error:
        raise AdapterLoadError(f"{folder / name} is not valid JSON: {error}") from error
    return values


def _read(folder: Path, stem: str) -> dict[str, Tensor]:
    path = folder / f"{stem}.safetensors"
    if not path.exists():
        pickles = sorted(folder.glob("pytorch_*.bin"))
        if pickles:
            raise AdapterLoadError(f"{pickles[0]} is a pickle, which is not read; convert it once: {CONVERT}")
        raise AdapterLoadError(f"{os.fspath(folder)!r} has no {path.name}")
    return read_tensors(path, "cpu")[0]
