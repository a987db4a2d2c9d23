"""The seam for `KVEdit`: one wrapper around transformers' attention function.

An edited model's attention implementation is named `deltatune_<name>`; it runs the edits of the calling module
around the implementation `<name>`. No cache is touched and no modelling code is copied. What an edit adds stands in
front of the keys and is seen by every query, whatever the causal or sliding window.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.composition import leaves
from deltatune.core.edits import KVEdit
from deltatune.core.hosts import Host
from deltatune.core.plan import State
from deltatune.errors import ConfigError

PREFIX = "deltatune_"
#: implementations in which no mask means none; in the others it means causal where the module is causal
MASKED = ("eager",)
#: (batch rows or None for all, the adapter's state, its edits)
Groups = list[tuple[tuple[int, ...] | None, State, list[KVEdit]]]


def enable(model: nn.Module) -> None:
    """Routes every attention of a transformers model through the seam; idempotent.

    Raises:
        ConfigError: the model has no attention implementation to wrap.
    """
    config: Any = getattr(model, "config", None)
    inner = getattr(config, "_attn_implementation", None)
    if inner is None:
        raise ConfigError(
            f"{type(model).__name__} is not a transformers model with an attention implementation, so its attention "
            "cannot be edited"
        )
    if not inner.startswith(PREFIX):
        _register(inner)
        _switch(model, PREFIX + inner)


def disable(model: nn.Module) -> None:
    """Gives the model its own attention implementation back."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None) or ""
    if name.startswith(PREFIX):
        _switch(model, name.removeprefix(PREFIX))


def _switch(model: nn.Module, name: str) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = name


def _register(inner: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(PREFIX + inner, edited(inner))
    AttentionMaskInterface.register(PREFIX + inner, ALL_MASK_ATTENTION_FUNCTIONS[inner])


def edited(inner: str) -> Callable[..., Any]:
    """The attention function `inner` with the calling module's active edits around it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        run = ALL_ATTENTION_FUNCTIONS[inner] if inner != "eager" else _eager(module)
        groups = active(module, q.shape[0])
        if groups:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            k, v, mask, bias = extend(groups, q, k, v, mask, kwargs.get("position_bias"), causal, inner)
            if bias is not None:
                kwargs["position_bias"] = bias
        out, weights = run(module, q, k, v, mask, **kwargs)  # out: (B, T, heads, d)
        return (add_after(module, groups, q, out, kwargs.get("scaling")) if groups else out), weights

    return attention


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The eager function of the module's own modelling file."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise ConfigError(f"{type(module).__name__} has no eager attention function to edit; load the model with sdpa")


def goes_through(module: nn.Module) -> bool:
    """Whether a module's call looks up the attention function, so that edits are seen there."""
    kind = getattr(module, "_plain", type(module))
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def active(module: nn.Module, batch: int) -> Groups:
    """The attention edits that run in this call, in one group or by rows."""
    if not isinstance(module, Host):
        return []
    state = module.plan.state
    if state.rows is None:
        found: Groups = [(None, state, _edits(module, state.names))]
    else:
        if batch != state.rows.batch:
            state.rows.index((), batch, torch.device("cpu"), f"{type(module).__name__} {module.path!r}")
        found = [(rows, State(leaves(name)), _edits(module, leaves(name))) for name, rows in state.rows.groups]
    return [group for group in found if group[2]]


def _edits(module: Host, names: tuple[str, ...]) -> list[KVEdit]:
    return [e for e in module.edits_of(names) if isinstance(e, KVEdit)]


# ---------------------------------------------------------------------- keys and values in front
def extend(
    groups: Groups, q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Tensor | None, causal: bool, inner: str
) -> tuple[Tensor, Tensor, Any, Tensor | None]:
    """Keys, values, mask and position bias with the edits' pairs in front."""
    pairs = []
    for rows, _, edits in groups:
        own = [found for found in [e.pairs() for e in edits] if found is not None]
        if own:
            pairs.append((rows, edits, own))
    if not pairs:
        return k, v, mask, bias
    keys, values, visible = _front(pairs, k)
    p = keys.shape[2]
    if mask is None and inner not in MASKED and causal and q.shape[2] > 1:
        mask = causal_mask(q, k)
    mask = widen_mask(mask, visible, p, q, k)
    if bias is not None:
        source = next((e.bias_source for _, edits, _ in pairs for e in edits if e.bias_source is not None), None)
        bias = torch.cat([front_bias(source, bias, p, causal), bias], -1)
    return torch.cat([keys, k], 2), torch.cat([values, v], 2), mask, bias


def _front(pairs: Sequence[Any], k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(B, heads, P, d)` keys and values, and `(B, P)` which of them are real; None if all are.

    Shorter fronts stand at the right end, next to the tokens.
    """
    joined = [
        (rows, _joined([a for a, _ in own], rows).to(k.dtype), _joined([b for _, b in own], rows).to(k.dtype))
        for rows, _, own in pairs
    ]
    batch = k.shape[0]
    if len(joined) == 1 and joined[0][0] is None:
        _, keys, values = joined[0]
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), None
    p = max(a.shape[-2] for _, a, _ in joined)
    keys, values = (k.new_zeros(batch, k.shape[1], p, side.shape[-1]) for side in joined[0][1:])
    visible = torch.zeros(batch, p, dtype=torch.bool, device=k.device)
    for rows, a, b in joined:
        index = torch.tensor(rows, device=k.device)
        gap = p - a.shape[-2]
        keys = keys.index_copy(0, index, F.pad(a, (0, 0, gap, 0)).expand(len(rows), -1, -1, -1))
        values = values.index_copy(0, index, F.pad(b, (0, 0, gap, 0)).expand(len(rows), -1, -1, -1))
        visible[index, gap:] = True
    return keys, values, visible


def _joined(sides: Sequence[Tensor], rows: tuple[int, ...] | None) -> Tensor:
    """Keys or values of several edits in one: `(heads, P, d)`, or `(B, heads, P, d)` where a row has its own."""
    if all(side.ndim == 3 for side in sides):
        return torch.cat(list(sides), 1)
    batch = next(side.shape[0] for side in sides if side.ndim == 4)
    whole = torch.cat([side.expand(batch, *side.shape[-3:]) for side in sides], -2)
    return whole if rows is None else whole[list(rows)]


def widen_mask(mask: Any, visible: Tensor | None, p: int, q: Tensor, k: Tensor) -> Any:
    """A mask of any of the implementations' kinds with P columns in front."""
    if mask is None:
        if visible is None:
            return None
        mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if not isinstance(mask, Tensor):
        return _widen_blocks(mask, visible, p)
    batch = q.shape[0]
    real = torch.ones(1, p, dtype=torch.bool, device=q.device) if visible is None else visible
    if mask.ndim == 2:  # a padding mask, of flash attention
        return torch.cat([real.to(mask.dtype).expand(batch, p), mask], 1)
    # fixed-size caches give masks that are wider than the keys' part in use
    front = real[:, None, None, :].expand(batch, mask.shape[1], mask.shape[2], p)
    if mask.dtype != torch.bool:
        low = torch.finfo(mask.dtype).min
        front = torch.zeros(front.shape, dtype=mask.dtype, device=mask.device).masked_fill(~front, low)
    return torch.cat([front, mask.expand(batch, -1, -1, -1)], -1)


def _widen_blocks(mask: Any, visible: Tensor | None, p: int) -> Any:
    """A flex attention `BlockMask` with P columns in front; made once per mask, not once per layer."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept = mask.__dict__.setdefault("_deltatune", {})
    key = (p, None if visible is None else tuple(visible.flatten().tolist()))
    if key not in kept:
        own = mask.mask_mod

        def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            front = j < p
            seen = front if visible is None else front & visible[b, j.clamp(max=p - 1)]
            rest: Tensor = own(b, h, i, (j - p).clamp(min=0))
            return seen | (~front & rest)

        (b, h), (t, s) = mask.kv_num_blocks.shape[:2], mask.seq_lengths
        kept[key] = create_block_mask(mod, b, h, t, s + p, device=mask.kv_num_blocks.device)
    return kept[key]


def front_bias(source: nn.Module | None, bias: Tensor, p: int, causal: bool) -> Tensor:
    """Relative position biases of P positions just before the keys; zero where the attention has none."""
    t, s = bias.shape[-2:]
    if source is None or not causal:
        return bias.new_zeros(*bias.shape[:-1], p)
    table: Any = source
    # queries are the last t of the s keys, unless a fixed-size cache holds more keys than are in use
    wide = table.compute_bias(t, p + s, device=bias.device, past_seen_tokens=p + s - t)
    front: Tensor = wide[..., :p].to(bias.dtype)
    return front.expand(*bias.shape[:-1], p)


def add_after(module: nn.Module, groups: Groups, q: Tensor, out: Tensor, scaling: float | None) -> Tensor:
    """The attention's output with what the edits add to it."""
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    assert isinstance(module, Host)
    for rows, state, edits in groups:
        index = None if rows is None else torch.tensor(rows, device=q.device)
        for edit in edits:
            with module.plan.call(state):
                change = edit.after_rows(q, index, scale)
            if change is not None:
                change = change.to(out.dtype)
                out = out + change if index is None else out.index_add(0, index, change)
    return out


def causal_mask(q: Tensor, k: Tensor) -> Tensor:
    """What SDPA's `is_causal` means with a cache: query i sees the keys up to its own position, `(1, 1, T, S)`."""
    t, s = q.shape[2], k.shape[2]
    return torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)[None, None]
