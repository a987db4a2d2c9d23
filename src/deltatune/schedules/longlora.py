"""LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models (arXiv 2309.12307).

Training attention (S²-Attn), for S tokens in groups of G:

    half of the heads attend causally inside  [0, G), [G, 2G), …
    the others inside                          [0, G/2), [G/2, 3G/2), …, the last one whatever is left

so information crosses the borders of groups, at a cost of S G instead of S². The authors roll the second half's tokens
by G/2; the roll puts the sequence's start behind its end in one group, where start tokens would see the end, so the
segments of their flash variant are used here. S need not be a multiple of G. Outside training, and with a cache, the
attention is the plain one. Beside the pairs the embeddings and norms train, in place.

For a longer context the rotary positions are interpolated linearly by ceil(new length / original length). The adapter's
configuration keeps the new length (`context_length`), and wherever it is loaded the positions are interpolated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.adapters import AdapterSet
from deltatune.core.attention import PREFIX as EDITED
from deltatune.core.attention import _eager, goes_through
from deltatune.core.positions import factor_of, interpolate_positions
from deltatune.core.sites import base_parameters
from deltatune.errors import ConfigError
from deltatune.schedules._as_lora import lora_of, write_with_modules
from deltatune.schedules._base import changed, check_trainable, write_changed
from deltatune.schedules.base import Procedure, Run, Schedule, check_whole, procedure

PREFIX = "grouped_"
#: of an attention module: the options of its groups while a run goes on
_ATTRIBUTE = "_deltatune_groups"
#: what an attention may ask for that groups do not have
_OTHERS = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seqlens_q")


@procedure
@dataclass
class LongLora(Procedure):
    """Shifted sparse attention in training.

    Args:
        groups: how many groups a sequence is cut into, the paper's 4.
        group_size: tokens of a group; in place of `groups`.
        context: a new context length; positions are interpolated where the model's own is shorter.
        train: parts of names of the base's parameters that train in full.
    """

    groups: int = 4
    group_size: int | None = None
    context: int | None = None
    train: list[str] = field(default_factory=lambda: ["embed", "norm"])

    name: ClassVar[str] = "longlora"
    summary: ClassVar[str] = "attention in shifted groups in training; embeddings and norms train too"
    paper: ClassVar[str] = "arXiv 2309.12307"

    def __post_init__(self) -> None:
        check_whole("groups", self.groups, 1)
        if self.group_size is not None:
            check_whole("group_size", self.group_size, 2)
        if self.context is not None:
            check_whole("context", self.context, 1)

    def size(self, tokens: int) -> int:
        """G for a sequence."""
        return self.group_size or max(math.ceil(tokens / self.groups), 1)

    def chosen(self, root: nn.Module) -> dict[str, nn.Parameter]:
        """The base's parameters that train in full."""
        found = base_parameters(root)
        return {n: p for n, p in found if p.is_floating_point() and any(part in n for part in self.train)}

    def mark(self, root: nn.Module, adapters: AdapterSet | None, adapter: str) -> None:
        for p in self.chosen(root).values():
            p.requires_grad_(True)

    def start(self, run: Run) -> Schedule:
        if not attentions(run.root):
            raise ConfigError(
                f"LongLoRA groups causal attention that goes through transformers' attention function, and this "
                f"{type(run.root).__name__} has none; use a Llama-type model"
            )
        if str(getattr(run.root.config, "_attn_implementation", "")).startswith(EDITED):
            raise ConfigError("LongLoRA's groups have no place for prefixes in attention; delete the prompts' adapter")
        chosen = self.chosen(run.root)
        if self.train and not chosen:
            raise ConfigError(f"train={self.train} is part of no parameter's name in this model; use ['embed', 'norm']")
        check_trainable(run, "LongLoRA", chosen)
        if self.context is not None and run.adapter and lora_of(run) is None:
            raise ConfigError(
                f"context={self.context} is kept in a LoRA's configuration, and this adapter is none, so whoever loads "
                "it would have the old positions; use LoraConfig"
            )
        return LongLoraSchedule(run, self, chosen)

    @classmethod
    def example(cls) -> LongLora:
        return cls(groups=2)


def attentions(root: nn.Module) -> list[nn.Module]:
    """The causal self-attention modules whose function can be exchanged."""
    return [
        m
        for m in root.modules()
        if getattr(m, "is_causal", False) and hasattr(m, "num_key_value_groups") and goes_through(m)
    ]


# ---------------------------------------------------------------------- attention in groups
def grouped_attention(
    q: Tensor, k: Tensor, v: Tensor, size: int, mask: Tensor | None, scaling: float | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention in groups of `size`, shifted by half a group for the second half of the heads.

    Args:
        q, k, v: `(B, heads, S, d)`. mask: `(B, 1, S, S)`, True where a key is seen, or added; None is causal.
    """
    half = q.shape[1] // 2
    parts = []
    for heads, offset in ((slice(0, half), 0), (slice(half, None), size // 2)):
        if q[:, heads].shape[1]:
            runs = segments(q.shape[2], size, offset)
            outs = [_segment(q[:, heads], k[:, heads], v[:, heads], run, mask, scaling, dropout) for run in runs]
            parts.append(torch.cat(outs, 2))
    return torch.cat(parts, 1)


def segments(tokens: int, size: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """Runs of equally long segments that cover a sequence: (start, how many, length)."""
    at = min(offset, tokens) if offset else 0
    if at:
        yield 0, 1, at
    count = (tokens - at) // size
    if count:
        yield at, count, size
    at += count * size
    if at < tokens:
        yield at, 1, tokens - at


def _segment(
    q: Tensor, k: Tensor, v: Tensor, run: tuple[int, int, int], mask: Tensor | None, scaling: float | None, drop: float
) -> Tensor:
    """Attention inside each segment of a run of them, `(B, heads, tokens of the run, d)`."""
    at, count, size = run
    batch, heads = q.shape[:2]

    def cut(x: Tensor) -> Tensor:  # (B · segments, heads, size, d)
        x = x[:, :, at : at + count * size].reshape(batch, heads, count, size, -1)
        return x.transpose(1, 2).flatten(0, 1)

    own = None
    if mask is not None:
        bounds = [slice(at + i * size, at + (i + 1) * size) for i in range(count)]
        own = torch.stack([mask[:, :, b, b] for b in bounds], 1).expand(batch, -1, -1, -1, -1).flatten(0, 1)
        own = _seeing_themselves(own)
    out = F.scaled_dot_product_attention(
        cut(q), cut(k), cut(v), attn_mask=own, dropout_p=drop, is_causal=own is None, scale=scaling
    )
    return out.reshape(batch, count, heads, size, -1).transpose(1, 2).reshape(batch, heads, count * size, -1)


def _seeing_themselves(mask: Tensor) -> Tensor:
    """A mask in which every query sees itself: padding in a group of its own would have nothing to see."""
    eye = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask | eye if mask.dtype == torch.bool else mask.masked_fill(eye, 0.0)


def grouped(inner: str) -> Callable[..., Any]:
    """The attention function `inner`, in groups where a module trains without a cache."""

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        options: LongLora | None = getattr(module, _ATTRIBUTE, None)
        if options is None or not module.training or q.shape[2] != k.shape[2]:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            run = ALL_ATTENTION_FUNCTIONS[inner] if inner != "eager" else _eager(module)
            return run(module, q, k, v, mask, **kwargs)
        _check_call(module, mask, kwargs)
        size = options.size(q.shape[2])
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        if mask is not None and mask.ndim == 2:  # a padding mask, of flash attention
            causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = causal & mask[:, None, None, :].bool()
        out = grouped_attention(q, k, v, size, mask, kwargs.get("scaling"), kwargs.get("dropout") or 0.0)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _check_call(module: nn.Module, mask: Any, kwargs: Mapping[str, Any]) -> None:
    others = [name for name in _OTHERS if kwargs.get(name) is not None]
    if others or (mask is not None and not isinstance(mask, Tensor)):
        what = others[0] if others else type(mask).__name__
        raise ConfigError(
            f"LongLoRA's groups do not have what {type(module).__name__} asks for ({what}); load the model with "
            "attn_implementation='sdpa' and without packing, or use another model"
        )
    if kwargs.get("sliding_window") is not None:
        raise ConfigError(
            f"{type(module).__name__} has a sliding window, which is sparse already; use plain LoRA on it"
        )


def enable(root: nn.Module, options: LongLora) -> None:
    """Routes a model's attention through the groups."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config: Any = root.config
    inner = config._attn_implementation
    if not inner.startswith(PREFIX):
        AttentionInterface.register(PREFIX + inner, grouped(inner))
        AttentionMaskInterface.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])
        _switch(root, PREFIX + inner)
    for module in attentions(root):
        setattr(module, _ATTRIBUTE, options)


def disable(root: nn.Module) -> None:
    """Gives a model its own attention back."""
    name = getattr(getattr(root, "config", None), "_attn_implementation", None) or ""
    if name.startswith(PREFIX):
        _switch(root, name.removeprefix(PREFIX))
    for module in root.modules():
        module.__dict__.pop(_ATTRIBUTE, None)


def _switch(root: nn.Module, name: str) -> None:
    for module in root.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


class LongLoraSchedule(Schedule):
    def __init__(self, run: Run, options: LongLora, chosen: dict[str, nn.Parameter]) -> None:
        super().__init__(run)
        self.options, self.chosen = options, chosen

    def begin(self) -> None:
        if self.options.context is not None:
            stretched = interpolate_positions(self.run.root, self.options.context) > 1
            config = lora_of(self.run)
            if config is not None:
                config.context_length = self.options.context
            if stretched:
                changed(self.run, "LongLoRA")
        enable(self.run.root, self.options)
        if self.chosen:
            changed(self.run, "LongLoRA")

    def base_tensors(self) -> Mapping[str, Tensor]:
        return self.chosen

    def finish(self) -> None:
        disable(self.run.root)

    def report(self) -> dict[str, Any]:
        """`factor`: by which positions are interpolated; `base_parameters`: how many of the base's numbers train."""
        return {"factor": factor_of(self.run.root), "base_parameters": sum(p.numel() for p in self.chosen.values())}

    def save(self, folder: Path) -> bool:
        if not self.chosen:
            return False
        if not write_with_modules(self.run, self.chosen, folder):
            write_changed(self.run.root, self.chosen.values(), folder, self.run.adapter)
        return True
