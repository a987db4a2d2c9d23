"""Fold an adapter into its base and write a whole model, checked against the live adapter before it counts."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltatune.train.files import staged_directory, write_text
from deltatune.train.generation import device_of
from deltatune.train.loading import Loaded, Target, hush, load, read_config, storage
from deltatune.train.models import quantised_by, resolve_model

if TYPE_CHECKING:
    from deltatune.train.models import ResolvedModel

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small village at the edge of the forest, and in it",
    "def fibonacci(n):\n    ",
    "Message: You have won a prize! Reply now.\nLabel:",
)
MARGIN = 64 * 2**20  # tokenizer, configs and a file system's own needs, in bytes
LOST = 0.5  # share of the adapter's effect that rounding may eat before the merge counts as failed


@dataclass(frozen=True)
class Difference:
    """Logits of the merged model against those of the live adapter, over all positions of all prompts."""

    max: float
    mean: float
    adapter_effect: float  # mean |adapter - base|: the size of what the merge must keep
    same_next_token: float  # share of positions with the same likeliest token
    prompts: int

    @property
    def lost(self) -> float:
        """Share of the adapter's effect that the merged model does not have."""
        return self.mean / self.adapter_effect if self.adapter_effect > 0 else 0.0


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    output: Path
    base: str
    adapter: Path
    dtype: str
    bytes: int
    difference: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self) | {"output": str(self.output), "adapter": str(self.adapter)}
        if self.difference is not None:
            plain["difference"]["lost"] = self.difference.lost
        return plain


def merge(
    target: Target,
    output: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    prompts: Sequence[str] | None = PROMPTS,
    max_shard_size: str = "5GB",
    device: str | None = None,
    quantization: str | None = None,
    into: str = "dense",
    rounding: str | None = None,
) -> Merged:
    """Write base + adapter as one model directory, whole or not at all.

    The update is added in fp32 and rounded once, to `dtype` ("auto": that of the base's own file). The
    written files are loaded again and compared with the live adapter before they take the name `output`.

    Args:
        prompts: texts to compare on; None skips the comparison.
        quantization: the base's storage that the adapter was trained on; default: what its run's recipe says.
        into: `"dense"` writes ordinary weights, those of a quantised base unpacked; `"same"` writes the base's
            quantised storage, with the error that this costs.
        rounding: of `into="same"`, `"dithered"` or `"nearest"`; default: as the run was trained, else dithered.

    Raises:
        ValueError: the target is no adapter, `output` is taken or is the source, the method cannot be merged, the
            base is not quantised and `into` is "same", or the merged model lost the adapter's effect.
        OSError: not enough free disk.
    """
    if target.adapter is None:
        raise ValueError(f"{target.name} is no adapter, so there is nothing to merge into it")
    hush()
    resolved = resolve_model(target.base, revision=target.revision)
    check_output(output, target.adapter, resolved, overwrite)
    stored = stored_dtype(resolved)
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    quantization = storage(target, quantization)
    few = quantization or quantised_by(resolved)
    _check_into(into, few, target)
    # Rounded once: in the stored type if it stays, else by way of fp32.
    loaded_in = wanted if into == "same" else stored if wanted == stored else torch.float32
    model, tokenizer, before = _fold(target, loaded_in, prompts, device, quantization, into, rounding)
    model = model if into == "same" else model.to(wanted)
    _check_finite(model, _name(wanted))
    check_space(output, weight_bytes(model) + MARGIN)
    with staged_directory(output) as staging:
        write_model(model, staging, max_shard_size)
        tokenizer.save_pretrained(staging)
        del model  # before the written copy is read: two of a large model may not fit
        gc.collect()
        difference = _compare(before, staging, target, _name(wanted), device) if before else None
        if into == "dense":  # rounding to few bits may cost the adapter; that is reported, not refused
            _check_kept(difference, _name(wanted), target)
        kept = _name(wanted) if into == "dense" else str(few)
        write_text(staging / "README.md", model_card(target, resolved, kept, difference, few=into == "same"))
    return Merged(output, resolved.name, target.adapter, kept, size_of(output), difference)


def _check_into(into: str, quantization: str | None, target: Target) -> None:
    if into not in ("dense", "same"):
        raise ValueError(f'into must be "dense" or "same", not {into!r}')
    if into == "same" and quantization is None:
        raise ValueError(
            f"{target.name} was not trained on a quantised base as far as its recipe and the options tell, so there is "
            "no few-bit storage to merge into: name one with --quantization, or leave --into out"
        )


def _check_finite(model: Any, dtype: str) -> None:
    """For ordinary weights; those in few bits were looked at before they were rounded."""
    from deltatune.stores import find_store

    for name, param in model.named_parameters():
        if find_store(param).exact and param.is_floating_point() and not torch.isfinite(param).all():
            raise ValueError(
                f"{name} of the merged model would have numbers that are not finite in {dtype}; nothing was written: "
                "the adapter is broken, or its changes need a wider --dtype"
            )


def write_model(model: Any, folder: Path, max_shard_size: str) -> None:
    """Saves a model so that transformers loads it, one that `quantize_model` has made as bitsandbytes' NF4."""
    from deltatune.stores.nf4_layer import Nf4Linear, bitsandbytes_config

    if any(isinstance(m, Nf4Linear) for m in model.modules()):
        model.config.quantization_config = bitsandbytes_config(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


@dataclass(frozen=True)
class _Before:
    """Logits, (tokens, vocabulary) for each prompt, while the adapter is still apart."""

    ids: list[list[int]]
    live: list[torch.Tensor]
    base: list[torch.Tensor]


def _fold(
    target: Target,
    dtype: torch.dtype,
    prompts: Sequence[str] | None,
    device: str | None,
    quantization: str | None,
    into: str,
    rounding: str | None,
) -> tuple[Any, Any, _Before | None]:
    loaded = load(target, dtype=_name(dtype), device=device, quantization=quantization or "none")
    before = _look(loaded, prompts) if prompts else None
    return loaded.model.merge_and_unload(into=into, rounding=rounding), loaded.tokenizer, before


def _look(loaded: Loaded, prompts: Sequence[str]) -> _Before:
    ids = [list(loaded.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    if not all(ids):
        raise ValueError("a prompt to compare on is empty")
    live = _logits(loaded.model, ids, loaded.target.task)
    with loaded.model.disable_adapter():
        return _Before(ids, live, _logits(loaded.model, ids, loaded.target.task))


@torch.inference_mode()
def _logits(model: Any, rows: Sequence[Sequence[int]], task: str) -> list[torch.Tensor]:
    """What the model says about each prompt, on the CPU in fp32: (tokens, features)."""
    results = []
    for row in rows:
        ids = torch.tensor([list(row)], device=device_of(model))
        extra = {"decoder_input_ids": ids} if task == "SEQ_2_SEQ_LM" else {}
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
        logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
        results.append(logits[0].float().cpu().reshape(-1, logits.shape[-1]))
    return results


def _compare(before: _Before, folder: Path, target: Target, dtype: str, device: str | None) -> Difference:
    """The written model, loaded as anyone would load it, against the live adapter."""
    written = load(replace(target, base=str(folder), revision=None, adapter=None), dtype=dtype, device=device)
    merged = _logits(written.model, before.ids, target.task)
    gap = torch.cat([(m - a).abs().flatten() for m, a in zip(merged, before.live, strict=True)])
    effect = torch.cat([(b - a).abs().flatten() for b, a in zip(before.base, before.live, strict=True)])
    same = torch.cat([m.argmax(-1) == a.argmax(-1) for m, a in zip(merged, before.live, strict=True)])
    return Difference(
        max=float(gap.max()),
        mean=float(gap.mean()),
        adapter_effect=float(effect.mean()),
        same_next_token=float(same.float().mean()),
        prompts=len(merged),
    )


def _check_kept(difference: Difference | None, dtype: str, target: Target) -> None:
    if difference is None or difference.lost <= LOST or difference.max < 1e-5:
        return
    remedy = "use --dtype float32" if dtype != "float32" else "the adapter may not fit this base"
    raise ValueError(
        f"the merged model would lose {difference.lost:.0%} of what {target.name} does (logits differ by "
        f"{difference.mean:.3g} on average, the adapter changes them by {difference.adapter_effect:.3g}); "
        f"nothing was written: {remedy}, or skip this check with --no-verify"
    )


def check_output(output: Path, adapter: Path, resolved: ResolvedModel, overwrite: bool) -> None:
    """Never the source, never over files by surprise, and never over something that is no model."""
    sources = {"adapter": adapter, "base model": Path(str(resolved.path))}
    for what, source in sources.items():
        if source.exists() and (_inside(source, output) or _inside(output, source)):
            raise ValueError(f"{output} and the {what} in {source} overlap; choose another output directory")
    if output.is_file():
        raise ValueError(f"{output} is a file; name a directory for the merged model")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{output} is not empty; choose another directory, or replace it with --overwrite")
    if not (output / "config.json").is_file():
        raise ValueError(f"{output} holds something that is no model, so --overwrite does not replace it")


def _inside(path: Path, directory: Path) -> bool:
    return path.resolve() == directory.resolve() or directory.resolve() in path.resolve().parents


def stored_dtype(resolved: ResolvedModel) -> torch.dtype:
    """The type the base's own files are in, by its config; fp32 if it does not say."""
    from transformers import AutoConfig

    dtype = getattr(AutoConfig.from_pretrained(resolved.path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights on disk, tied ones once."""
    tensors = {t.data_ptr() or id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check_space(output: Path, need: int) -> None:
    """Refuse before the first byte is written.

    Raises:
        OSError: the disk that `output` is on has less than `need` bytes free.
    """
    place = output.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
        raise OSError(
            f"the merged model needs {need / 1e9:.2f} GB, but the disk of {place} has {free / 1e9:.2f} GB free; "
            "choose another disk or a smaller --dtype"
        )


def model_card(
    target: Target, resolved: ResolvedModel, dtype: str | None, difference: Difference | None, *, few: bool = False
) -> str:
    """README.md of a merged model: what it was made of and how near it is to the live adapter.

    Args:
        dtype: of the weights, or the storage that they are quantised in if `few`; None for those of the base's files.
    """
    assert target.adapter is not None
    config = read_config(target.adapter)
    front = ["---", "library_name: transformers", "tags:", "- deltatune", "- merged"]
    hub_id = _hub_id(resolved)
    if hub_id:
        front.insert(1, f"base_model: {hub_id}")
    if resolved.licence:
        front.insert(1, f"license: {resolved.licence.lower()}")
    method = config.get("peft_type", "adapter")
    rank = f" of rank {config['r']}" if "r" in config else ""
    weights = "of the types that the base's files have" if dtype is None else f"plain {dtype}"
    weights = f"quantised ({dtype})" if few else weights
    body = [
        f"# {Path(target.name).name}, merged",
        "",
        f"A {method} adapter{rank} (`{target.name}`) folded into `{resolved.name}` by `deltatune merge`.",
        f"The weights are {weights}; no adapter library is needed to load them.",
        "",
        "## Merge",
        "",
        f"- Base: {resolved.source}",
        f"- Method: {method}{rank}, target modules: {_targets(config)}",
        f"- Stored as {'in the files of the base' if dtype is None else dtype}, added in float32 and rounded once",
        *_difference_lines(difference),
    ]
    if resolved.citation:
        body += ["", "## Citation of the base model", "", resolved.citation]
    return "\n".join([*front, "---", "", *body, *_adapter_card(target.adapter)]) + "\n"


def _hub_id(resolved: ResolvedModel) -> str | None:
    """What the hub calls the base, or None if it may not be there."""
    from deltatune.train.packaged import find_packaged

    entry = find_packaged(resolved.name)
    if entry is not None:
        return entry.hub_id
    return resolved.name if resolved.kind == "hub" else None


def _targets(config: dict[str, Any]) -> str:
    targets = config.get("target_modules")
    return ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)


def _difference_lines(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["- Not compared with the live adapter"]
    return [
        f"- Compared with the live adapter on {difference.prompts} prompts: logits differ by at most "
        f"{difference.max:.3g}, {difference.mean:.3g} on average (the adapter changes them by "
        f"{difference.adapter_effect:.3g}); the likeliest next token is the same at "
        f"{difference.same_next_token:.1%} of the positions"
    ]


def _adapter_card(adapter: Path) -> list[str]:
    """The adapter's own card, without its front matter, one heading level down."""
    card = next((p for p in (adapter / "README.md", adapter.parent / "README.md") if p.is_file()), None)
    if card is None:
        return []
    text = card.read_text(encoding="utf-8")
    if "[More Information Needed]" in text:  # an unfilled template
        return []
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[-1]
    lines = [f"#{line}" if line.startswith("#") else line for line in text.strip().splitlines()]
    return ["", "## The adapter's card", "", *lines]


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
