"""What is in a saved adapter, read from its two files alone: no base model, no method code, no pickles."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from deltatune.config import CONFIG_NAME
from deltatune.core.files import PICKLE_NAME, SAFETENSORS_NAME, pickle_refused, read_json_metadata, read_tensors
from deltatune.core.fingerprint import METADATA_KEY
from deltatune.core.sites import pattern_value
from deltatune.errors import AdapterLoadError
from deltatune.train.loading import adapter_folder, read_config

PREFIX = "base_model.model."
# suffix -> which part of a low-rank pair it is; embeddings keep bare tensors, layers modules
FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module. Norms are Frobenius norms; `update_norm` is that of s·B·A for low-rank pairs."""

    name: str
    kind: str  # "low-rank" or the tensors' own names
    parameters: int
    norm: float  # of all tensors of the module
    rank: int | None = None
    shape: tuple[int, int] | None = None  # (out, in) of the weight
    scale: float | None = None
    a_norm: float | None = None
    b_norm: float | None = None
    update_norm: float | None = None


@dataclass(frozen=True)
class AdapterReport:
    """A saved adapter."""

    path: str
    method: str | None
    base: str | None
    task: str | None
    parameters: int
    bytes: int
    dtypes: list[str]
    tensors: int
    config: dict[str, Any]
    metadata: dict[str, str]
    fingerprint: dict[str, Any] | None
    modules: list[ModuleReport]
    layers: dict[str, float]  # layer -> norm of its update (or of its tensors, where no update is known)
    remarks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def report(path: Path) -> AdapterReport:
    """Read the adapter in `path`: a run, an adapter directory, or one safetensors file.

    Raises:
        AdapterLoadError: no adapter there, a damaged file, or a pickle.
    """
    file = adapter_file(path)
    tensors, metadata = read_tensors(file)
    config = read_config(file.parent) if (file.parent / CONFIG_NAME).is_file() else {}
    remarks = []
    if not config:
        remarks.append(f"no {CONFIG_NAME} beside the file: the scale is unknown and taken as 1")
    if config.get("use_dora"):
        remarks.append("DoRA also rescales each row; the update norms are those of the low-rank part")
    modules = _modules(tensors, config)
    return AdapterReport(
        path=str(file),
        method=config.get("peft_type"),
        base=config.get("base_model_name_or_path"),
        task=config.get("task_type"),
        parameters=sum(t.numel() for t in tensors.values()),
        bytes=file.stat().st_size,
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        tensors=len(tensors),
        config=config,
        metadata=metadata,
        fingerprint=read_json_metadata(metadata, METADATA_KEY),
        modules=modules,
        layers=_layers(modules),
        remarks=remarks,
    )


def adapter_file(path: Path) -> Path:
    """The safetensors file of the adapter that `path` names.

    Raises:
        AdapterLoadError: nothing there, or only a pickle.
    """
    if not path.exists():
        raise AdapterLoadError(f"{path} does not exist; name an adapter directory, a run or a safetensors file")
    if path.is_file():
        if path.suffix in PICKLES:
            raise pickle_refused(path)
        if path.suffix != ".safetensors":
            raise AdapterLoadError(f"{path} is no safetensors file; name that file or its directory")
        return path
    folder = adapter_folder(path) or path
    if (folder / SAFETENSORS_NAME).is_file():
        return folder / SAFETENSORS_NAME
    if (folder / PICKLE_NAME).is_file():
        raise pickle_refused(folder / PICKLE_NAME)
    raise AdapterLoadError(f"{folder} has no {SAFETENSORS_NAME}, so it holds no saved adapter{_below(path)}")


def _below(path: Path) -> str:
    found = sorted({str(p.parent) for p in path.glob("*/" + SAFETENSORS_NAME)})
    return f"; there is one in {' and in '.join(found[-3:])}" if found else ""


def _modules(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[ModuleReport]:
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, part = _split(key.removeprefix(PREFIX))
        grouped[module][part] = tensor
    return [_module(name, parts, config) for name, parts in sorted(grouped.items(), key=_natural)]


def _split(key: str) -> tuple[str, str]:
    """(module, part): part is A, B, … of a low-rank pair, else the tensor's own name."""
    for suffix, part in FACTORS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    module, _, leaf = key.rpartition(".")
    return module, leaf


def _natural(item: tuple[str, Any]) -> list[tuple[int, int | str]]:
    """Sort key with layer 2 before layer 10."""
    parts = re.split(r"(\d+)", item[0])
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def _module(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModuleReport:
    parameters = sum(t.numel() for t in parts.values())
    norm = math.sqrt(sum(_norm(t) ** 2 for t in parts.values()))
    if "A" not in parts or "B" not in parts:
        return ModuleReport(name, ", ".join(sorted(parts)), parameters, norm)
    a, b = parts["A"], parts["B"]
    rank = int(a.shape[-2] if a.dim() == 3 else a.shape[0])
    scale = lora_scale(name, rank, config)
    return ModuleReport(
        name,
        "low-rank",
        parameters,
        norm,
        rank=rank,
        shape=_weight_shape(a, b),
        scale=scale,
        a_norm=_norm(a),
        b_norm=_norm(b),
        update_norm=abs(scale) * product_norm(a, b),
    )


def _weight_shape(a: Tensor, b: Tensor) -> tuple[int, int]:
    if a.dim() == 3:  # one pair for each expert: (experts, r, in), (experts, out, r)
        return int(b.shape[-2]), int(a.shape[-1])
    return int(b.shape[0]), math.prod(a.shape[1:])


def lora_scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """s of s·B·A, by the config's alpha, its patterns, and rsLoRA; 1 without a config."""
    if "lora_alpha" not in config:
        return 1.0
    alpha = pattern_value(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def product_norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B·A from the r × r Gram matrices: tr(BᵀB · AAᵀ), without forming (out, in)."""
    if a.dim() != 3:
        a, b = a.flatten(1), b.flatten(1)
    a, b = a.double(), b.double()
    squared = float(((b.transpose(-1, -2) @ b) * (a @ a.transpose(-1, -2))).sum())
    return math.sqrt(max(squared, 0.0))


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def layer_of(name: str) -> str:
    """The layer a module belongs to: its path up to the first number, or "other"."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match[1] if match else "other"


def _layers(modules: list[ModuleReport]) -> dict[str, float]:
    """Norm of all updates of a layer together, in the modules' order."""
    squares: dict[str, float] = defaultdict(float)
    for module in modules:
        if module.name.endswith(".base_layer"):  # peft's unchanged copy of an embedding
            continue
        value = module.update_norm if module.update_norm is not None else module.norm
        squares[layer_of(module.name)] += value**2
    return {layer: math.sqrt(total) for layer, total in squares.items()}
