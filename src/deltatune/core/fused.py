"""Fused projections: which output rows of one weight are the query's, the key's and the value's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltatune.core.weights import Rows, WeightRef
from deltatune.errors import ConfigError

NAMES = ("q", "k", "v")


def _heads(attention: Any) -> tuple[int, int]:
    """(query heads, key-value heads) of an attention module, from its configuration."""
    config = getattr(attention, "config", attention)
    heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or config.n_head)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _contiguous(attention: Any, rows: int, n: int) -> list[Rows]:
    """All of q, then all of k, then all of v; key-value heads may be fewer."""
    sizes = [rows // n] * n
    config = getattr(attention, "config", None)
    if n == 3 and config is not None and getattr(config, "num_key_value_heads", None):
        heads, kv = _heads(attention)
        d = rows // (heads + 2 * kv)
        sizes = [heads * d, kv * d, kv * d]
    if sum(sizes) != rows:
        raise ConfigError(f"a fused weight of {rows} rows does not divide into {n} parts")
    starts = [sum(sizes[:i]) for i in range(n)]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _per_group(rows: int, groups: int, counts: tuple[int, ...]) -> list[Rows]:
    """Per group of heads: `counts` head blocks of each part, one after the other."""
    d = rows // (groups * sum(counts))
    blocks = torch.arange(rows).view(groups, sum(counts), d)
    parts: list[Rows] = []
    for i, count in enumerate(counts):
        start = sum(counts[:i])
        parts.append(blocks[:, start : start + count].flatten())
    return parts


def _per_head(attention: Any, rows: int, n: int) -> list[Rows]:
    return _per_group(rows, _heads(attention)[0], (1,) * n)


def _falcon(attention: Any, rows: int, n: int) -> list[Rows]:
    heads, _ = _heads(attention)
    if attention.config.new_decoder_architecture:
        kv = attention.config.num_kv_heads
        return _per_group(rows, kv, (heads // kv, 1, 1))
    if attention.config.multi_query:
        d = rows // (heads + 2)
        return [slice(0, heads * d), slice(heads * d, heads * d + d), slice(heads * d + d, rows)]
    return _per_head(attention, rows, n)


#: attention class -> its packing, where that is not q, k, v one after the other
LAYOUTS: dict[str, Callable[[Any, int, int], list[Rows]]] = {
    "GPTNeoXAttention": _per_head,
    "BloomAttention": _per_head,
    "FalconAttention": _falcon,
}


def parts(model: nn.Module, path: str, n: int) -> list[Rows]:
    """The rows of each of the `n` parts fused in the weight at `path`.

    Raises:
        ConfigError: the weight does not divide so.
    """
    rows = int(WeightRef(model.get_submodule(path)).full_shape[-2])
    attention = model.get_submodule(path.rpartition(".")[0])
    layout = LAYOUTS.get(type(attention).__name__, _contiguous)
    return layout(attention, rows, n)
