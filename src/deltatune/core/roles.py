"""Roles: which layer is the query, the value, the head, found from a model's structure.

The words below are how published code names these layers; a model that uses other words gets an error that
says which role is missing and how to name it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from deltatune.errors import TargetError

#: role -> words that a layer's own name is made of, where it plays that role
WORDS: dict[str, str] = {
    "q": r"q|query|queries",
    "k": r"k|key|keys",
    "v": r"v|value|values",
    "qkv": r"c_attn|qkv|query_key_value|w?qkv(_proj)?|in_proj|att_proj|attn_qkv",
}
#: what may stand around a role's word
AROUND = r"(?:w|in|to|self|attn|linear|fc|proj|projection|lin|layer|b|c)"
#: names of the layers that end a task model; a fresh one trains with the adapter
HEADS = ("classifier", "score", "qa_outputs", "lm_head", "classification_head", "head", "embed_out", "cls")


def role_of(name: str) -> str | None:
    """The role of a layer named `name` (its last path component): q, k, v, qkv or None."""
    low = name.lower()
    for role in ("qkv", "q", "k", "v"):
        if re.fullmatch(rf"(?:{AROUND}_)*(?:w?(?:{WORDS[role]}))(?:_{AROUND})*", low):
            return role
    return None


def default_targets(model: nn.Module, paths: Sequence[str]) -> dict[str, list[str]]:
    """Query and value of every attention block (LoRA's own choice), or the fused projection.

    Raises:
        TargetError: no attention is found.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        leaf = path.rpartition(".")[2]
        if role_of(leaf) in ("q", "v", "qkv") or isinstance(model.get_submodule(path), nn.MultiheadAttention):
            found.setdefault(leaf, []).append(path)
    if not found:
        raise TargetError(
            "no query, value or fused attention projection is found in this model; name the layers to adapt "
            'in target_modules (a list of name endings, a regular expression, or "all-linear")'
        )
    return found


def todays_names(names: Iterable[str], paths: Sequence[str]) -> list[str]:
    """`names`, with those of older releases of a model put as the model names the same role today.

    `["query", "value"]` on a model that now says `q_proj`, `v_proj` becomes the latter, with a notice; a name
    that matches, or that has no role, stays as it is.
    """
    result: list[str] = []
    for name in names:
        hit = any(p == name or p.endswith(f".{name}") for p in paths)
        role = None if hit else role_of(name.rpartition(".")[2])
        leaves = {p.rpartition(".")[2] for p in paths} if role is not None else set()
        today = sorted(leaf for leaf in leaves if role_of(leaf) == role)
        if len(today) != 1:
            result.append(name)
            continue
        warnings.warn(f"target_modules {name!r} is called {today[0]!r} in this model; using {today[0]!r}", stacklevel=2)
        result.append(today[0])
    return result


def head_modules(model: nn.Module) -> list[str]:
    """Paths of the task heads at the top of the model, by name and place: direct children only."""
    return [name for name, child in model.named_children() if name in HEADS and child is not None]
