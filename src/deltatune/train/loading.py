"""From what a user names (a run, an adapter, a model) to a loaded model and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltatune.errors import hint

if TYPE_CHECKING:
    from deltatune.core.rounding import Rounding
    from deltatune.train.models import ResolvedModel

CONFIG = "adapter_config.json"
Variant = Literal["base", "adapter", "merged"]


@dataclass(frozen=True)
class Target:
    """What a command works on: a base model, an adapter for it if any, the recipe of its run if known."""

    name: str  # as the user gave it
    base: str
    revision: str | None = None
    adapter: Path | None = None
    task: str = "CAUSAL_LM"
    recipe: Path | None = None


@dataclass(frozen=True)
class Loaded:
    """A target in memory. `model` is a PeftModel when `target.adapter` is set."""

    target: Target
    resolved: ResolvedModel
    model: Any
    tokenizer: Any


def find_target(name: str, model: str | None = None) -> Target:
    """What `name` is: a run or adapter directory, a model directory or file, a hub id, a packaged model.

    Args:
        name: as typed by the user.
        model: base to use instead of the one the adapter names.

    Raises:
        ValueError: nothing there is an adapter or a model, or `model` is given for a plain model.
        OSError: `name` is a directory that cannot be read.
    """
    path = Path(name).expanduser()
    if not path.exists() and not _looks_local(name):
        return _remote(name, model)
    folder = adapter_folder(path)
    if folder is not None:
        return _adapter_target(name, folder, model)
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        _no_base(name, model)
        return Target(name, base=str(path))
    raise ValueError(_nothing_there(path))


def _looks_local(name: str) -> bool:
    """Hub ids have at most one slash; anything else that is written like a path is meant as one."""
    return name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1


def adapter_folder(path: Path) -> Path | None:
    """The directory with the adapter: the one given, that of the file given, or `adapter/` of a run."""
    if path.is_file() and path.suffix == ".safetensors":
        path = path.parent
    found = [folder for folder in (path, path / "adapter") if (folder / CONFIG).is_file()]
    return found[0] if found else None


def _adapter_target(name: str, folder: Path, model: str | None) -> Target:
    config = read_config(folder)
    recipe = _recipe_of(folder)
    base, revision = (model, None) if model else _base_of(config, recipe)
    if not base:
        raise ValueError(f"{folder / CONFIG} names no base model; say which one with --model")
    task = str(config.get("task_type") or "CAUSAL_LM")
    return Target(name, base, revision, folder, task, recipe)


def _base_of(config: dict[str, Any], recipe: Path | None) -> tuple[str | None, str | None]:
    """(model, revision) that an adapter was trained on.

    The recipe of its run has the name the user gave (`smollm2-135m`); the adapter's config has where that led
    to, which may be a cache directory of another machine.
    """
    named = read_recipe(recipe) if recipe is not None else {}
    model = named.get("model")
    if model and (Path(model).expanduser().exists() or not _looks_local(model)):
        return str(model), named.get("revision")
    base = config.get("base_model_name_or_path")
    return (_packaged_name(str(base)), config.get("revision")) if base else (None, None)


def _packaged_name(base: str) -> str:
    """The name of a packaged model for its cache directory, on this machine or another; else `base` itself."""
    from deltatune.train.packaged import PACKAGED

    return next((entry.name for entry in PACKAGED if Path(entry.place).name == Path(base).name), base)


def read_recipe(path: Path) -> dict[str, Any]:
    """A run's recipe as plain values.

    Raises:
        ValueError: it is not a mapping in YAML.
    """
    from deltatune.train.recipe import parse_yaml

    recipe = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no recipe")
    return recipe


def _recipe_of(folder: Path) -> Path | None:
    """The recipe of the run an adapter belongs to: beside it, or one level up for checkpoints."""
    places = (folder / "recipe.yaml", folder.parent / "recipe.yaml")
    return next((path for path in places if path.is_file()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as a dict.

    Raises:
        ValueError: it is not valid JSON, or not an object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from where the adapter came from") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not the fields of an adapter config")
    return config


def _remote(name: str, model: str | None) -> Target:
    """A packaged model, or a hub id: of an adapter if the repository holds an adapter config."""
    from deltatune.train.models import resolve_model

    if "/" in name:
        folder = _download_adapter(name)
        if folder is not None:
            return _adapter_target(name, folder, model)
    _no_base(name, model)
    resolve_model(name)  # an unknown name ends here, with the nearest ones
    return Target(name, base=name)


def _download_adapter(repo: str) -> Path | None:
    """The files of a hub adapter, or None when `repo` is no adapter or the hub is out of reach."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    unreachable = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        hub.hf_hub_download(repo, CONFIG, etag_timeout=5)
        wanted = ["adapter_*", "*.json", "tokenizer*", "*.jinja", "README.md", "recipe.yaml"]
        return Path(hub.snapshot_download(repo, allow_patterns=wanted))
    except unreachable:
        return None


def _no_base(name: str, model: str | None) -> None:
    if model is not None:
        raise ValueError(f"{name} is a whole model, not an adapter, so --model {model} has no meaning here")


def _nothing_there(path: Path) -> str:
    if not path.exists():
        parent = path.parent if path.parent.is_dir() else Path()
        near = hint(path.name, [p.name for p in parent.iterdir() if p.is_dir()])
        return f"{path} does not exist{near}"
    below = sorted(path.glob("*/" + CONFIG), key=lambda p: p.stat().st_mtime, reverse=True)
    if below:
        newest = " or ".join(str(p.parent) for p in below[:3])
        return f"{path} holds no adapter itself; did you mean {newest}?"
    return f"{path} holds neither {CONFIG} (an adapter) nor config.json (a model)"


def _recipe(target: Target) -> dict[str, Any]:
    return read_recipe(target.recipe) if target.recipe is not None else {}


def trained_on(target: Target) -> str | None:
    """The quantisation of the base in the recipe of an adapter's run, if any."""
    recipe = _recipe(target)
    if recipe.get("load_in_4bit") or recipe.get("load_in_8bit"):
        return "4bit" if recipe.get("load_in_4bit") else "8bit"
    return recipe.get("quantization")


def storage(target: Target, asked: str | None) -> str | None:
    """The quantisation to load a base in: what is asked for, else what an adapter was trained on; `"none"` is none."""
    found = asked or (trained_on(target) if target.adapter is not None else None)
    return None if found == "none" else found


def merge_aware(target: Target) -> Rounding | None:
    """How the run of an adapter rounded its merged weights, if it was trained merge-aware."""
    from deltatune.core.rounding import Rounding

    aware = (_recipe(target).get("train") or {}).get("merge_aware")
    if not aware:
        return None
    options = aware if isinstance(aware, dict) else {}
    return Rounding(options.get("rounding", "dithered"), options.get("seed", 0))


def load(
    target: Target,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
    device: str | None = None,
) -> Loaded:
    """Load base, tokenizer and adapter, ready for inference.

    Args:
        quantization: storage of the base; default: for an adapter, what its run's recipe says. `"none"` is the
            files' own.

    Raises:
        ValueError: the adapter does not fit the base, or its tokenizer has tokens the base cannot embed.
    """
    from deltatune.train.models import resolve_model

    hush()
    resolved = resolve_model(target.base, revision=target.revision)
    quantization = storage(target, quantization)
    base = _load_base(target, resolved, dtype, quantization, device)
    tokenizer = _load_tokenizer(target, resolved)
    if target.adapter is None:
        return Loaded(target, resolved, base.eval(), tokenizer)
    from deltatune import PeftModel

    _fit_vocabulary(base, tokenizer, target.adapter)
    model = PeftModel.from_pretrained(base, str(target.adapter))
    aware = merge_aware(target)
    if aware is not None and quantization is not None:
        model.set_merge_aware(rounding=aware.kind, seed=aware.seed)
    return Loaded(target, resolved, model.eval(), tokenizer)


def _load_base(
    target: Target, resolved: ResolvedModel, dtype: str, quantization: str | None, device: str | None
) -> Any:
    from deltatune.train.models import load_model

    labels = _labels(target, resolved)
    where = device or default_device()
    if quantization is not None:
        return load_model(
            resolved,
            task=target.task,
            dtype=dtype,
            num_labels=labels,
            quantization=quantization,
            device_map={"": where},
        )
    return load_model(resolved, task=target.task, dtype=dtype, num_labels=labels).to(where)


def _load_tokenizer(target: Target, resolved: ResolvedModel) -> Any:
    """The adapter's own tokenizer if one was saved with it (it may have new tokens), else the base's."""
    from deltatune.train.models import load_tokenizer

    if target.adapter is not None and (target.adapter / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(target.adapter)
    return load_tokenizer(resolved)


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of a saved adapter, read from the header alone."""
    from safetensors import safe_open

    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _labels(target: Target, resolved: ResolvedModel) -> int | None:
    """Classes of a classifier: those of the adapter's head, else those that the model itself names."""
    from transformers import AutoConfig

    from deltatune.train.models import LABELLED

    if target.task not in LABELLED:
        return None
    if target.adapter is not None:
        return _label_count(target.adapter)
    return int(AutoConfig.from_pretrained(resolved.path, revision=resolved.revision).num_labels)


def _label_count(folder: Path) -> int | None:
    """Classes of a saved classification head: the rows of its last bias or weight."""
    heads = ("score.weight", "classifier.weight", "out_proj.weight", "classifier.bias")
    shapes = adapter_shapes(folder)
    return next((shape[0] for key, shape in shapes.items() if key.endswith(heads)), None)


def _fit_vocabulary(base: Any, tokenizer: Any, folder: Path) -> None:
    """Give the base rows for tokens added in training, if the adapter brings their values."""
    embedding = base.get_input_embeddings()
    rows = int(embedding.weight.shape[0]) if embedding is not None else len(tokenizer)
    if len(tokenizer) <= rows:
        return
    if not any(len(tokenizer) == shape[0] for shape in adapter_shapes(folder).values() if shape):
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, but the base embeds {rows} and the "
            "adapter brings no values for the new ones; train with the embedding in modules_to_save"
        )
    base.resize_token_embeddings(len(tokenizer))


def default_device() -> str:
    """`cuda` or another accelerator if this machine has one, else `cpu`."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


@contextmanager
def variant(model: Any, which: Variant) -> Iterator[None]:
    """Run `model` (a PeftModel) as its bare base, with the live adapter, or with the adapter folded in.

    Raises:
        ValueError: "merged" for a method that has no equivalent weight.
    """
    if which == "base":
        with model.disable_adapter():
            yield
    elif which == "merged":
        model.merge_adapter()
        try:
            yield
        finally:
            model.unmerge_adapter()
    else:
        yield


def hush() -> None:
    """Keep transformers' own bars and remarks off the terminal; errors still show."""
    import logging

    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # transformers imports torchao, which says what it has no kernel for
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
