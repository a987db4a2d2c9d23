"""Merging from disk to disk, one tensor at a time: a model that does not fit the memory is merged all the same.

The base is built without numbers (memory that is never touched), the adapter is real. Every tensor of a shard is read,
changed if an adapter changes it, and written behind a header that was laid out beforehand, so that no more than a few
copies of the largest tensor are in memory. Shards are written under a temporary name and renamed; a merge that was
broken off goes on after the last whole shard.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core import fingerprint
from deltatune.core.rounding import Rounding
from deltatune.errors import BaseMismatchError
from deltatune.train.files import STAGING, write_json, write_text
from deltatune.train.loading import Target, hush, merge_aware, read_config, storage
from deltatune.train.merging import MARGIN, Merged, check_output, check_space, model_card, size_of
from deltatune.train.models import quantised_by, resolve_model

STATE = "deltatune_merge.json"
INDEX = "model.safetensors.index.json"
#: name of a type in safetensors -> torch's
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file of the base: its tensors in order, (name, type as it is written, shape)."""

    path: Path
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]

    @property
    def bytes(self) -> int:
        return sum(d.itemsize * math.prod(s) for _, d, s in self.tensors)

    @classmethod
    def of(cls, path: Path, wanted: torch.dtype | None) -> Shard:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            found = [(k, file.get_slice(k)) for k in file.keys()]  # noqa: SIM118
            tensors = []
            for name, piece in found:
                dtype = TYPES[piece.get_dtype()]
                written = wanted if wanted is not None and dtype.is_floating_point else dtype
                tensors.append((name, written, tuple(piece.get_shape())))
        return cls(path, tensors)


def merge_stream(
    target: Target,
    output: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    quantization: str | None = None,
) -> Merged:
    """Writes base + adapter as one model directory without ever loading the base.

    Args:
        dtype: of the written weights; "auto" keeps the files' own.
        quantization: the storage that the adapter was trained on; default: what its run's recipe says. The weights
            are rounded to it and unpacked before the adapter is added, as training saw them (NF4 only).

    Raises:
        ValueError: `output` is taken or is the source, the adapter cannot be merged tensor by tensor, or a tensor of
            it has no place in the files.
        OSError: not enough free disk.
    """
    if target.adapter is None:
        raise ValueError(f"{target.name} is no adapter, so there is nothing to merge into it")
    if target.task != "CAUSAL_LM":
        raise ValueError(f"{target.name} is for {target.task}, and only CAUSAL_LM is streamed; merge without --stream")
    hush()
    resolved = resolve_model(target.base, revision=target.revision)
    source = local_files(resolved)
    check_output(output, target.adapter, resolved, overwrite)
    method = quantised_by(resolved)
    if method is not None:
        raise ValueError(f"the files of {resolved.name} are quantised ({method}) already; merge without --stream")
    quantization = storage(target, quantization)
    if quantization not in (None, "4bit", "nf4", "native"):
        raise ValueError(f"a base in {quantization} cannot be rounded tensor by tensor; merge without --stream")
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    shards = [Shard.of(path, wanted) for path in sorted(source.glob("*.safetensors"))]
    staging = output.parent / f".{output.name}{STAGING}"
    aware = merge_aware(target) if quantization else None
    key = _key(target, shards, dtype, quantization, aware)
    done = _done(staging, key)
    todo = [s for s in shards if s.path.name not in done]
    check_space(output, sum(s.bytes for s in todo) + MARGIN)
    model, samples, changes = _hollow(source, target.adapter)
    folder = _Folder(model, quantization, samples, aware)
    folder.check(shards)
    _begin(staging, key)
    for shard in todo:
        write_shard(shard, staging / shard.path.name, folder)
    _finish(staging, output, source, shards, wanted, changes)
    name = "as stored" if wanted is None else dtype
    write_text(output / "README.md", model_card(target, resolved, None if wanted is None else dtype, None))
    return Merged(output, resolved.name, target.adapter, name, size_of(output), None)


def local_files(resolved: Any) -> Path:
    """The directory with the base's safetensors files.

    Raises:
        ValueError: there are none (a GGUF file, another format).
    """
    folder = Path(str(resolved.path))
    if not folder.is_dir():
        import huggingface_hub as hub

        wanted = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
        folder = Path(hub.snapshot_download(str(resolved.path), revision=resolved.revision, allow_patterns=wanted))
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no safetensors files to stream; merge without --stream")
    return folder


# ---------------------------------------------------------------------- the model without numbers
def _hollow(source: Path, adapter: Path) -> tuple[Any, dict[str, list[float]], dict[str, Any]]:
    """(the base as shapes, with the real adapter on it; numbers of the base that the adapter was trained on; what the
    adapter changes in the base's configuration)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from deltatune import PeftModel
    from deltatune.core.checkpoint import slots_of
    from deltatune.core.files import SAFETENSORS_NAME, read_json_metadata, read_tensors
    from deltatune.errors import AdapterLoadError

    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")  # memory that nothing touches is not taken
    model.tie_weights()
    before = copy.deepcopy(config.to_dict())
    with warnings.catch_warnings():  # that the base's numbers are others; each is checked when it is read
        warnings.filterwarnings("ignore", message=".*made for another base.*")
        wrapped = PeftModel.from_pretrained(model, str(adapter), strict=False)
    report = wrapped.load_report
    if report is not None and not report.clean:
        raise AdapterLoadError(report.describe("default"))
    held, metadata = read_tensors(adapter / SAFETENSORS_NAME)
    keys = {k.removeprefix("base_model.model.") for k in held}
    lacks = [s.key for s in slots_of(wrapped.adapters, "default").values() if s.derived and s.key not in keys]
    if lacks:
        raise ValueError(f"{lacks[0]} is computed from the whole base, which is not loaded; merge without --stream")
    changes = {key: value for key, value in model.config.to_dict().items() if value != before.get(key)}
    if "num_hidden_layers" in changes:
        raise ValueError("layer_replication makes layers that the base's files lack; merge without --stream")
    return wrapped, (read_json_metadata(metadata, fingerprint.METADATA_KEY) or {}).get("samples", {}), changes


class _Folder:
    """Changes the tensors that an adapter changes, by their names in the files."""

    def __init__(
        self, model: Any, quantization: str | None, samples: dict[str, list[float]], aware: Rounding | None = None
    ) -> None:
        from deltatune.core.combine import refuse_merge
        from deltatune.core.edits import Delta, ModuleEdit

        self.root: nn.Module = model.get_base_model()
        self.quantization, self.samples, self.aware = quantization, samples, aware
        self.deltas: dict[tuple[int, str], list[Any]] = {}
        self.copies: dict[tuple[int, str], Tensor] = {}
        for edit in model.adapters.edits["default"]:
            if isinstance(edit, Delta):
                self.deltas.setdefault((id(edit.ref.owner), edit.ref.leaf), []).append(edit)
            elif isinstance(edit, ModuleEdit):
                for owner, leaf, tensor in edit.replacements():
                    self.copies[id(owner), leaf] = tensor
            elif not hasattr(edit, "place_on"):
                raise refuse_merge(edit, getattr(edit.host, "path", ""))
        self.head = getattr(self.root, "get_output_embeddings", lambda: None)()

    def place(self, name: str) -> tuple[nn.Module, str] | None:
        """(module, leaf) of a tensor in a file, which may leave out the base's prefix."""
        prefix = getattr(self.root, "base_model_prefix", "")
        for path in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            parent, _, leaf = path.rpartition(".")
            try:
                module = self.root.get_submodule(parent)
            except AttributeError:
                continue
            if leaf in module._parameters or leaf in module._buffers:
                return module, leaf
        return None

    def check(self, shards: list[Shard]) -> None:
        """Every change must have its place in the files.

        Raises:
            ValueError: one has none (tied weights have one name in the files and two in the model).
        """
        here = {(id(p[0]), p[1]) for s in shards for n, _, _ in s.tensors if (p := self.place(n)) is not None}
        by_tensor: dict[int, int] = {}
        for _, module in self.root.named_modules(remove_duplicate=False):
            for param in module._parameters.values():
                if param is not None:
                    by_tensor[id(param)] = by_tensor.get(id(param), 0) + 1
        for owner, leaf in [*self.deltas, *self.copies]:
            if (owner, leaf) not in here:
                raise ValueError(
                    f"an adapted {leaf} has no tensor of its own in the base's files; merge without --stream"
                )
        for deltas in self.deltas.values():
            ref = deltas[0].ref
            if by_tensor.get(id(ref.param), 0) > 1:
                raise ValueError(f"{ref.module.path!r} shares its weight with another module; merge without --stream")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        from deltatune.core.combine import fold
        from deltatune.core.merge import evaluating

        place = self.place(name)
        if place is None:
            return tensor
        module, leaf = place
        key = (id(module), leaf)
        if self.quantization and isinstance(module, nn.Linear) and leaf == "weight" and module is not self.head:
            from deltatune.stores.nf4 import quantize_nf4
            from deltatune.stores.nf4_layer import STORE, as_packed

            few = as_packed(quantize_nf4(tensor, double=True))
            tensor = STORE.load(few)
        else:
            few = None
        if key in self.copies:
            return self.copies[key].detach()
        deltas = self.deltas.get(key)
        if deltas is None:
            return tensor
        ref = deltas[0].ref
        ref.original = None
        hollow = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        try:
            self._check_base(deltas)
            with torch.no_grad(), evaluating(deltas):
                full = fold(deltas)
        finally:
            module._parameters[leaf] = hollow
        if not torch.isfinite(full).all():
            raise ValueError(f"merging {name!r} would give numbers that are not finite; the adapter is broken")
        if self.aware is not None and few is not None:
            return few.store.load(self.aware.put(few.store, few, full, ref.module.path, ref.name))
        return full

    def _check_base(self, deltas: list[Any]) -> None:
        """The numbers must be those that the adapter was trained on, as far as its file says."""
        name = f"{deltas[0].host.path}.{deltas[0].ref.name}"
        if self.quantization or name not in self.samples:
            return
        about = {"architecture": fingerprint.architecture(self.root), "samples": {name: self.samples[name]}}
        different = fingerprint.differences(self.root, deltas[:1], about)
        if different:
            raise BaseMismatchError(f"the adapter was made for another base: {different[0]}")


# ---------------------------------------------------------------------- files
def write_shard(shard: Shard, path: Path, change: Any) -> None:
    """Writes one shard, tensor by tensor, under a temporary name until it is whole."""
    from safetensors import safe_open

    temporary = path.with_name(f".{path.name}.tmp")
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in shard.tensors:
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}  # type: ignore[dict-item]
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in shard.tensors:
            with safe_open(str(shard.path), framework="pt") as file:  # opened anew: what was read is let go
                value = change(name, file.get_tensor(name)).to(dtype).contiguous()
            assert tuple(value.shape) == shape, name
            out.write(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
            del value
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def _key(target: Target, shards: list[Shard], dtype: str, quantization: str | None, aware: Rounding | None) -> str:
    """Changes with anything that the merged files depend on."""
    assert target.adapter is not None
    files = [*sorted(target.adapter.glob("adapter_*")), *(s.path for s in shards)]
    parts = [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    return hashlib.sha256("\n".join([*parts, dtype, str(quantization), str(aware)]).encode()).hexdigest()


def _done(staging: Path, key: str) -> set[str]:
    """Names of the shards that an earlier, broken-off merge of the same files has written already."""
    state = staging / STATE
    if state.is_file() and json.loads(state.read_text(encoding="utf-8")).get("key") == key:
        return {p.name for p in staging.glob("*.safetensors")}
    return set()


def _begin(staging: Path, key: str) -> None:
    """Makes the place for the files, unless it is that of the same merge."""
    state = staging / STATE
    if not state.is_file() or json.loads(state.read_text(encoding="utf-8")).get("key") != key:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write_json(state, {"key": key})


def _others(source: Path) -> Iterator[Path]:
    """What belongs to a model beside its weights."""
    for file in sorted(source.iterdir()):
        kept = file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != INDEX
        if file.is_file() and kept and not file.name.startswith("deltatune_"):
            yield file


def _finish(
    staging: Path,
    output: Path,
    source: Path,
    shards: list[Shard],
    wanted: torch.dtype | None,
    changes: dict[str, Any],
) -> None:
    for file in _others(source):
        shutil.copyfile(file, staging / file.name)
    config = {**json.loads((source / "config.json").read_text(encoding="utf-8")), **changes}
    if "rope_parameters" in changes:
        config.pop("rope_scaling", None)  # the older name of the same
    if wanted is not None:
        config["dtype"] = str(wanted).removeprefix("torch.")
        config.pop("torch_dtype", None)
    write_json(staging / "config.json", config)
    if len(shards) > 1:
        places = {name: s.path.name for s in shards for name, _, _ in s.tensors}
        write_json(staging / INDEX, {"metadata": {"total_size": sum(s.bytes for s in shards)}, "weight_map": places})
    (staging / STATE).unlink()
    shutil.rmtree(output, ignore_errors=True)
    os.replace(staging, output)


def too_large(target: Target) -> bool:
    """Whether the base's files are more than half of the memory that is free."""
    import psutil

    if target.adapter is None or read_config(target.adapter).get("task_type") not in (None, "CAUSAL_LM"):
        return False
    try:
        resolved = resolve_model(target.base, revision=target.revision)
        folder = Path(str(resolved.path))
    except (OSError, ValueError):
        return False
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return size > psutil.virtual_memory().available / 2 and quantised_by(resolved) is None
