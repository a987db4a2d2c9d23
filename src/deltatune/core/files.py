"""Files: found locally or on the hub, written whole or not at all, never unpickled."""

from __future__ import annotations

import json
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltatune.errors import AdapterLoadError

SAFETENSORS_NAME = "adapter_model.safetensors"
#: safetensors' names of what adapters are made of
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: pages that belong to this process alone; what is another process's to write cannot be a parameter
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
#: where products like a tensor to begin, in bytes
ALIGNMENT = 64
PICKLE_NAME = "adapter_model.bin"
#: keywords of `from_pretrained` that go to huggingface_hub; others are the configuration's
HUB_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token", "subfolder", "repo_type")


def split_hub_options(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options for the hub, the rest); `use_auth_token` is the old name of `token`."""
    hub = {k: v for k, v in kwargs.items() if k in HUB_OPTIONS and v is not None}
    rest = {k: v for k, v in kwargs.items() if k not in HUB_OPTIONS}
    if "use_auth_token" in rest:
        hub.setdefault("token", rest.pop("use_auth_token"))
    return hub, rest


def find_file(where: str | os.PathLike[str], name: str, *, subfolder: str | None = None, **hub: Any) -> Path:
    """The local path of file `name` of an adapter in a directory, or on the hub.

    Raises:
        AdapterLoadError: it is in neither place; says what was looked for.
    """
    folder = Path(where) / (subfolder or "")
    if (folder / name).is_file():
        return folder / name
    if Path(where).exists():
        if (folder / PICKLE_NAME).is_file() and name == SAFETENSORS_NAME:
            raise pickle_refused(folder / PICKLE_NAME)
        raise AdapterLoadError(f"{folder} has no {name}, so it is not a saved adapter")
    return _from_hub(os.fspath(where), name, subfolder, hub)


def _from_hub(repo: str, name: str, subfolder: str | None, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    hub.pop("subfolder", None)
    try:
        return Path(hf_hub_download(repo, name, subfolder=subfolder, **hub))
    except HFValidationError as error:
        raise AdapterLoadError(f"{repo!r} is neither a directory here nor a valid hub id") from error
    except LocalEntryNotFoundError as error:
        raise AdapterLoadError(
            f"{repo!r} is not a directory here, and the hub could not give {name}: it cannot be reached (no network, "
            "or HF_HUB_OFFLINE is set) and the file is not in the local cache"
        ) from error
    except EntryNotFoundError as error:
        raise AdapterLoadError(f"the hub repository {repo!r} has no {name}: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise AdapterLoadError(
            f"{repo!r} is not a directory here, and the hub could not give {name}: {reason}"
        ) from error


def pickle_refused(path: Path) -> AdapterLoadError:
    return AdapterLoadError(
        f"{path} is a pickle file, which can run any code when it is read, so it is refused; convert it where you "
        f'trust it: save_file(torch.load("{path.name}", weights_only=True), "{SAFETENSORS_NAME}") with '
        "safetensors.torch"
    )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Runs `write` on a temporary name beside `path` and renames: readers see the old file or the new.

    Raises:
        OSError: nothing is left behind and the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, atomically; every tensor gets its own copy of its numbers."""
    content = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    seen: set[int] = set()
    for key, tensor in content.items():
        if tensor.data_ptr() in seen and tensor.numel():
            content[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    write_atomically(path, lambda p: save_file(content, p, metadata={"format": "pt", **metadata}))


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file; each has memory of its own.

    Raises:
        AdapterLoadError: not a whole safetensors file.
    """
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise pickle_refused(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = _read_floats(path) if device == "cpu" else None
            if tensors is None:
                tensors = {k: file.get_tensor(k).clone() for k in list(file.keys())}
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise AdapterLoadError(
            f"{path} ({path.stat().st_size} bytes) is damaged or cut off: {error}; copy or download it again"
        ) from error


def _read_floats(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file that safetensors has found whole, each a storage of its own; None if there are others than
    floats, or this machine has another order of bytes.

    They are read at once into fresh pages that all of them hold. Page by page, which is what copying them from the
    mapped file and filling one after the other come to, takes two to four times as long.
    """
    if sys.byteorder != "little":
        return None
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        if any(about["dtype"] not in FLOATS for about in header.values()):
            return None
        pages = mmap.mmap(-1, max(1, path.stat().st_size - start), **PRIVATE)
        file.readinto(pages)
    tensors = {k: _part(pages, FLOATS[about["dtype"]], *about["data_offsets"]) for k, about in header.items()}
    return {k: t.view(header[k]["shape"]) for k, t in tensors.items()}


def _part(pages: mmap.mmap, dtype: torch.dtype, start: int, end: int) -> Tensor:
    if start == end:
        return torch.empty(0, dtype=dtype, device="cpu")
    if start % ALIGNMENT:
        return torch.frombuffer(bytearray(pages[start:end]), dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start)


def read_json_metadata(metadata: Mapping[str, str], key: str) -> Any:
    """A JSON value kept in a safetensors header; None if absent."""
    return json.loads(metadata[key]) if key in metadata else None
