"""The seam for `PromptEdit`: one mechanism for every architecture, task, batch and generation step.

The edit sits on the *stack*, the module that embeds tokens (`LlamaModel`, `BertModel`, T5's encoder and decoder), and
not on the model as a whole. The stack is called with wider embeddings, mask and positions, and gives back hidden
states of the caller's own width. So heads, labels, losses and poolings never see a prompt, whatever the task.

A row reads `[left padding] [prompt] [tokens] [right padding]`: what a tokenizer would have given, had the prompt been
text. That makes a left-padded batch equal to its rows alone, and gives prompts of different length a place in one
batch: the gap of a shorter one stands before it in a causal stack, whose cache goes on at the row's end, and at the
row's end elsewhere, where poolings and tables of positions count from the row's start. In generation the prompt goes
into the cache at the first step; later steps widen only mask and positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.composition import leaves
from deltatune.core.edits import Args, Kwargs, PromptEdit
from deltatune.core.plan import State
from deltatune.errors import ConfigError, PackingError

#: (batch rows or None for all, the prompts that run there)
Groups = list[tuple[tuple[int, ...] | None, list[PromptEdit]]]
IGNORED_PADDING = ("token_type_ids",)
#: what a call's (and an output's) keys and values are called: since transformers 5.24, and before
CACHE_NAMES = ("cache", "past_key_values")


def groups_of(host: Any, state: State) -> Groups:
    """The prompts that run at `host`, in one group, or by rows in a mixed batch."""
    if state.rows is None:
        found: Groups = [(None, [e for e in host.edits_of(state.names) if isinstance(e, PromptEdit)])]
    else:
        found = [
            (rows, [e for e in host.edits_of(leaves(name)) if isinstance(e, PromptEdit)])
            for name, rows in state.rows.groups
        ]
    return [(rows, edits) for rows, edits in found if edits]


# ---------------------------------------------------------------------- layout
@dataclass(frozen=True)
class Layout:
    """How many embeddings (or positions without any) each row has in front.

    Attributes:
        tail: the gaps of shorter rows stand at the rows' ends, and not before their prompts.
    """

    lengths: tuple[int, ...]
    tail: bool = False

    @classmethod
    def of(cls, groups: Groups, batch: int, attribute: str, tail: bool = False) -> Layout:
        lengths = [0] * batch
        for rows, edits in groups:
            total = sum(getattr(e, attribute) for e in edits)
            for i in range(batch) if rows is None else rows:
                lengths[i] = total
        return cls(tuple(lengths), tail)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        return len(set(self.lengths)) <= 1

    def column(self, like: Tensor) -> Tensor:
        """`(B, 1)`, or `(1, 1)` where all are equal."""
        values = self.lengths[:1] if self.even else self.lengths
        return torch.tensor(values, device=like.device, dtype=torch.long)[:, None]

    def order(self, left: Tensor, tokens: int) -> Tensor:
        """`(B, longest + tokens)`: where each column of a wide row comes from in `[block | tokens]`.

        Args:
            left: `(B,)`, the columns of padding before the first token.
        """
        p = self.longest
        j = torch.arange(p + tokens, device=left.device)[None]
        left = left[:, None]
        if self.even or not self.tail:
            return torch.where(j < left, p + j, torch.where(j < left + p, j - left, j))
        own = self.column(left)
        rest = torch.where(j < own + tokens, p - own + j, j - own - tokens)
        return torch.where(j < left, p + j, torch.where(j < left + own, p - own + j - left, rest))

    def block_mask(self, batch: int, like: Tensor) -> Tensor:
        """`(B, longest)`: the block's own mask; shorter prompts stand at its right end."""
        p = self.longest
        real = torch.arange(p, device=like.device)[None] >= p - self.column(like)
        return real.to(like.dtype).expand(batch, p)

    def widen(self, block: Tensor, tokens: Tensor, left: Tensor) -> Tensor:
        """`(B, longest, …)` and `(B, n, …)` as one `(B, longest + n, …)` in the order of a row."""
        both = torch.cat([block.expand(tokens.shape[0], *block.shape[1:]), tokens], 1)
        index = self.order(left, tokens.shape[1])
        while index.ndim < both.ndim:
            index = index.unsqueeze(-1)
        return both.gather(1, index.expand(-1, -1, *both.shape[2:]))

    def widen_mask(self, mask: Tensor) -> Tensor:
        """A padding mask `(B, n)` with the prompts in it."""
        return self.widen(self.block_mask(mask.shape[0], mask), mask, left_padding(mask))

    def narrow(self, wide: Tensor, dim: int) -> Tensor:
        """A wide row's columns (dimension `dim`) that are the caller's own."""
        p, tokens = self.longest, wide.shape[dim] - self.longest
        if self.even or not self.tail:
            return wide.narrow(dim, p, tokens)
        index = self.column(wide) + torch.arange(tokens, device=wide.device)[None]  # (B, n)
        index = index.view(len(index), *[tokens if i == dim else 1 for i in range(1, wide.ndim)])
        return wide.gather(dim, index.expand(*[tokens if i == dim else n for i, n in enumerate(wide.shape)]))


def left_padding(mask: Tensor) -> Tensor:
    """`(B,)`: how many columns come before each row's first token."""
    return (mask.cumsum(1) == 0).sum(1)


# ---------------------------------------------------------------------- the call
def bind(host: Any, args: Args, kwargs: Kwargs) -> Kwargs:
    """The call's arguments by name; None is left out."""
    names = list(inspect.signature(host._plain.forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {k: v for k, v in given.items() if v is not None}


def cache_of(call: Any) -> Any:
    """The keys and values that a call, or an output, carries; None without any."""
    return next((call[name] for name in CACHE_NAMES if call.get(name) is not None), None)


def cached(call: Kwargs) -> int:
    """How many positions the cache holds already."""
    cache = cache_of(call)
    length = cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0
    return int(length)


def run(host: Any, base: Callable[..., Any], groups: Groups, args: Args, kwargs: Kwargs) -> Any:
    """A stack's call under prompts.

    Raises:
        ConfigError: the call cannot carry a prompt.
    """
    call = bind(host, args, kwargs)
    if "input_ids" in call and "inputs_embeds" in call:
        raise ConfigError("input_ids and inputs_embeds are both given; pass one of them")
    tokens: Tensor | None = call["input_ids"] if "input_ids" in call else call.get("inputs_embeds")
    if tokens is None:
        return base(**call)
    if any(e.at_table for _, edits in groups for e in edits):
        return look_up(base, groups, call, tokens.shape[0])
    call = widen_cross(call, Layout.of(groups, tokens.shape[0], "encoder_length", tail=True), tokens.shape[0])
    causal = any(e.causal for _, edits in groups for e in edits)
    layout = Layout.of(groups, tokens.shape[0], "length", tail=not causal)
    if causal and not layout.even:
        check_places(host, groups)
    past, n = cached(call), tokens.shape[1]
    check_positions(groups, past + n + (layout.longest if not past else 0))
    if past == 0:
        check_packing(groups, layout, call)
        call = put_prompts(host, groups, layout, call)
    wide = widen_inputs(host, groups, layout, call, past, n)
    width = n + (layout.longest if past == 0 else 0)
    with host.plan.call(wider_state(host.plan.state, width)):
        out = base(**wide)
    if past or not layout.longest or any(e.keeps_width for _, edits in groups for e in edits):
        return out
    first = any(e.reads_first for _, edits in groups for e in edits)
    return strip(out, width, layout, first)


def look_up(base: Callable[..., Any], groups: Groups, call: Kwargs, batch: int) -> Any:
    """A table of positions, each row's moved on by its prefix."""
    edit = next(e for _, edits in groups for e in edits)
    lengths = Layout.of(groups, batch, "shift").lengths
    found = {by: base(**edit.moved(call, by)) for by in set(lengths)}
    if len(found) == 1:
        return found[lengths[0]]
    rows = {by: out.expand(batch, -1, -1) for by, out in found.items()}
    return torch.stack([rows[by][i] for i, by in enumerate(lengths)])


def wider_state(state: State, width: int) -> State:
    """The state inside the stack: a mixed batch has more positions there."""
    rows = state.rows
    return state if rows is None else replace(state, rows=replace(rows, tokens=rows.batch * width))


def check_positions(groups: Groups, tokens: int) -> None:
    """Refuses what a table of positions is too small for."""
    for _, edits in groups:
        limit = next((e.positions for e in edits if e.positions is not None), None)
        needed = tokens + sum(e.shift for e in edits)
        if limit is not None and needed > limit:
            own = sum(e.shift + e.length for e in edits)
            raise ConfigError(
                f"the input takes {needed} positions with the prompt's {own}, and the model has {limit}; truncate "
                f"inputs to {limit - own} tokens (max_length) or lower num_virtual_tokens"
            )


def check_places(host: Any, groups: Groups) -> None:
    """Refuses gaps before the prompts where a stack counts all columns of its table of positions."""
    counted = any(e.positions is not None for _, edits in groups for e in edits)
    if counted and not takes(host, "position_ids"):
        raise ConfigError(
            f"{type(host).__name__} takes no position_ids, so one batch cannot hold prompts of different length in it; "
            "give its adapters the same num_virtual_tokens, or run them in batches of their own"
        )


def check_packing(groups: Groups, layout: Layout, call: Kwargs) -> None:
    """Refuses rows of several sequences, of which only the first would have the prompt.

    Positions that start again mean that where no mask is given, as transformers reads them; padding's do not count.
    """
    given = call.get("position_ids")
    if not layout.longest or given is None or given.ndim != 2 or call.get("attention_mask") is not None:
        return
    if torch.compiler.is_compiling() or not any(e.causal for _, edits in groups for e in edits):
        return  # a compiled call cannot look at numbers
    if bool((given[:, 1:] < given[:, :-1]).any()):
        raise PackingError(
            "position_ids start again inside a row (packed sequences), and a prompt would stand before the first "
            "sequence only; turn packing off, or use a prefix, which every sequence sees"
        )


def embed(host: Any, groups: Groups, call: Kwargs) -> Tensor:
    """The input's embeddings `(B, n, d)`, placeholders filled."""
    if "inputs_embeds" in call:
        embeds: Tensor = call["inputs_embeds"]
        return embeds
    ids = call["input_ids"]
    table = host.get_input_embeddings()
    marked = [(rows, e) for rows, edits in groups for e in edits if e.placeholder is not None]
    if not marked:
        result: Tensor = table(ids)
        return result
    safe = ids
    for _, e in marked:
        safe = safe.masked_fill(ids == e.placeholder, 0)  # a placeholder may lie outside the vocabulary
    embeds = table(safe)
    for rows, e in marked:
        embeds = fill_places(host, e, rows, ids, embeds)
    return embeds


def fill_places(host: Any, edit: PromptEdit, rows: tuple[int, ...] | None, ids: Tensor, embeds: Tensor) -> Tensor:
    """Puts an edit's embeddings where its placeholder stands, in order."""
    places = torch.eq(ids, edit.placeholder)  # type: ignore[arg-type]
    if rows is not None:
        mine = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        mine[list(rows)] = True
        places = places & mine
    count = len(ids) if rows is None else len(rows)
    prompt = edit.prompt(tasks_of(host, rows, len(ids)))
    size = prompt.shape[-2]
    per_row = places.sum(1).tolist()
    wrong = [i for i in (range(len(ids)) if rows is None else rows) if per_row[i] != size]
    if wrong:
        raise ConfigError(
            f"row {wrong[0]} holds the placeholder {edit.placeholder} {per_row[wrong[0]]} times and the prompt has "
            f"{size} virtual tokens; put {size} placeholders into every input (see deltatune.methods.p_tuning.Template)"
        )
    values = prompt.expand(count, size, prompt.shape[-1]).reshape(-1, prompt.shape[-1])
    return embeds.masked_scatter(places.unsqueeze(-1), values.to(embeds.dtype))


def tasks_of(host: Any, rows: tuple[int, ...] | None, batch: int) -> Tensor | None:
    """This call's `task_ids` for the rows; repeated where generation repeats rows (beams)."""
    tasks: Tensor | None = host.plan.own.tasks
    if tasks is None:
        return None
    if len(tasks) != batch:
        if not len(tasks) or batch % len(tasks):
            raise ConfigError(f"task_ids has {len(tasks)} entries for a batch of {batch} rows")
        tasks = tasks.repeat_interleave(batch // len(tasks), 0)
    return tasks if rows is None else tasks[list(rows)]


def put_prompts(host: Any, groups: Groups, layout: Layout, call: Kwargs) -> Kwargs:
    """The first call of a sequence: embeddings with the prompts before the first token."""
    marked = [e for _, edits in groups for e in edits if e.placeholder is not None]
    if not layout.longest and not marked:
        return call
    embeds = embed(host, groups, call)
    call = {k: v for k, v in call.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    if not layout.longest:
        return call
    batch, _, d = embeds.shape
    block = embeds.new_zeros(batch, layout.longest, d)
    for rows, edits in groups:
        parts = [e.prompt(tasks_of(host, rows, batch)) for e in edits if e.length]
        if not parts:
            continue
        count = batch if rows is None else len(rows)
        own = torch.cat([p.to(embeds.dtype).expand(count, *p.shape[-2:]) for p in parts], 1)  # (rows, P, d)
        own = nn.functional.pad(own, (0, 0, layout.longest - own.shape[1], 0))
        block = own if rows is None else block.index_copy(0, torch.tensor(rows, device=block.device), own)
    left = left_of(call, batch, embeds)
    return {**call, "inputs_embeds": layout.widen(block, embeds, left)}


def left_of(call: Kwargs, batch: int, like: Tensor) -> Tensor:
    """`(B,)`: the padding before each row's first token."""
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return left_padding(mask)
    return torch.zeros(batch, dtype=torch.long, device=like.device)


def widen_inputs(host: Any, groups: Groups, layout: Layout, call: Kwargs, past: int, n: int) -> Kwargs:
    """What goes beside the embeddings: mask, token types, positions."""
    call = dict(call)
    batch = len(layout.lengths)
    tokens = call["inputs_embeds"] if "inputs_embeds" in call else call["input_ids"]
    left = left_of(call, batch, tokens)
    mask = call.get("attention_mask")
    here = layout
    if layout.longest:
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise ConfigError(
                "this call brings a ready-made attention mask (a fixed-size cache, or a mask of its own), in which a "
                "prompt has no place; use the default cache and a mask of shape (batch, tokens)"
            )
        if mask is None and not layout.even:
            mask = torch.ones(batch, past + n - (layout.longest if past else 0), dtype=torch.long, device=tokens.device)
        if mask is not None and past and mask.shape[1] == past + n:
            here = Layout((0,) * batch)  # this cache was filled without the prompt
        elif mask is not None:
            call["attention_mask"] = mask = layout.widen_mask(mask)
        if past == 0:
            for name in IGNORED_PADDING:
                if name in call:
                    types = call[name]
                    block = types[:, :1].expand(-1, layout.longest) * 0
                    call[name] = layout.widen(block, types, left)
    positions = place(host, groups, here, call, past, n, left)
    if positions is not None:
        call["position_ids"] = positions
    return call


# ---------------------------------------------------------------------- positions
def place(host: Any, groups: Groups, layout: Layout, call: Kwargs, past: int, n: int, left: Tensor) -> Tensor | None:
    """The positions of a call's embeddings; None leaves them to the model."""
    if "position_ids" not in inspect.signature(host._plain.forward).parameters:
        return None
    batch = len(layout.lengths)
    shift = Layout.of(groups, batch, "shift")
    given = call.get("position_ids")
    causal = any(e.causal for _, edits in groups for e in edits)
    if given is not None:
        return shift_given(given, layout, shift, past, left)
    mask = call.get("attention_mask")
    width = n if past else n + layout.longest
    reaches = shift.longest or layout.longest
    if isinstance(mask, Tensor) and mask.ndim == 2 and (causal or (reaches and offset_of(groups))):
        positions = ((mask.long().cumsum(1) - 1).clamp(min=0))[:, -width:]
    elif shift.longest:
        positions = torch.arange(past, past + width, device=left.device)[None]
    else:
        return None
    positions = positions.expand(batch, -1) + shift.column(positions)
    return positions if causal else positions + offset_of(groups)


def offset_of(groups: Groups) -> int:
    """Where a model's table of positions starts (RoBERTa keeps its first rows for padding)."""
    return max(e.offset for _, edits in groups for e in edits)


def shift_given(given: Tensor, layout: Layout, shift: Layout, past: int, left: Tensor) -> Tensor:
    """The caller's positions, moved behind the prompt; `(B, n)`, or `(k, B, n)` for positions of several axes."""
    if given.ndim == 3:
        return torch.stack([shift_given(part, layout, shift, past, left) for part in given])
    batch = len(layout.lengths)
    given = given.expand(batch, -1)
    moved = given + layout.column(given) + shift.column(given)
    if past or not layout.longest:
        return moved
    p = layout.longest
    start = given.gather(1, left.clamp(max=given.shape[1] - 1)[:, None]) + shift.column(given)  # of the first token
    block = start + torch.arange(p, device=given.device)[None] - (p - layout.column(given))
    return layout.widen(block.clamp(min=0), moved, left)


def widen_cross(call: Kwargs, layout: Layout, batch: int) -> Kwargs:
    """A decoder's mask over its encoder's states, which hold the encoder's prompts."""
    states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
    if states is None or not layout.longest:
        return call
    n = states.shape[1] - layout.longest
    if mask is None and not layout.even:
        mask = torch.ones(batch, n, dtype=torch.long, device=states.device)
    if mask is None or mask.ndim != 2 or mask.shape[1] != n:
        return call
    return {**call, "encoder_attention_mask": layout.widen_mask(mask)}


# ---------------------------------------------------------------------- the output
def strip(out: Any, width: int, layout: Layout, first: bool) -> Any:
    """A stack's output without the prompt's positions; caches keep them."""
    if isinstance(out, tuple):
        return tuple(_strip_value(v, width, layout, first and i == 0, False) for i, v in enumerate(out))
    for name, value in list(out.items()):
        if name not in CACHE_NAMES:
            reads = first and name == "last_hidden_state"
            out[name] = _strip_value(value, width, layout, reads, name == "cross_attentions")
    return out


def _strip_value(value: Any, width: int, layout: Layout, first: bool, cross: bool) -> Any:
    if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
        return tuple(_strip_value(v, width, layout, False, cross) for v in value)
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 3 and value.shape[1] == width:  # hidden states
        own = layout.narrow(value, 1)
        return torch.cat([value[:, :1], own[:, 1:]], 1) if first else own
    if value.ndim == 4 and value.shape[2] == width:  # attention weights
        own = layout.narrow(value, 2)
        return own if cross else layout.narrow(own, 3)
    return value


# ---------------------------------------------------------------------- finding the stacks
@dataclass(frozen=True)
class Stack:
    """A module that embeds tokens.

    Attributes:
        path: where it is. role: `"encoder"` and `"decoder"` of an encoder-decoder model, otherwise `"only"`.
        causal: whether its positions count from the first token that is not padding.
        positions: the size of its table of learned positions, if it has one. offset: the first row that is used.
    """

    path: str
    module: nn.Module
    role: str
    causal: bool
    positions: int | None
    offset: int


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's call has an argument of this name."""
    kind = getattr(module, "_plain", type(module))
    return name in inspect.signature(kind.forward).parameters


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a transformers model, the encoder before the decoder.

    Raises:
        ConfigError: nothing in the model embeds tokens.
    """
    from deltatune.core.sites import base_modules

    getter = getattr(model, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except NotImplementedError:
        table = None
    weight = getattr(table, "weight", None)
    if weight is None or not isinstance(table, nn.Embedding):
        raise ConfigError(
            f"{type(model).__name__} embeds no tokens, and this method has its place where a transformers language "
            "model does"
        )
    modules = dict(base_modules(model))
    holders = [p for p, m in modules.items() if isinstance(m, nn.Embedding) and m._parameters.get("weight") is weight]
    whole = [p for p, m in modules.items() if hasattr(m, "get_input_embeddings") and takes(m, "inputs_embeds")]
    inside = [p for p in whole if any(h.startswith(f"{p}." if p else "") for h in holders)]
    deepest = [p for p in inside if not any(q != p and q.startswith(f"{p}." if p else "") for q in inside)]
    if not deepest:
        raise ConfigError(f"{type(model).__name__} takes no inputs_embeds, so a soft prompt cannot be given to it")
    return [_describe(p, modules[p], model) for p in deepest]


def _describe(path: str, module: nn.Module, model: nn.Module) -> Stack:
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    crosses = takes(module, "encoder_hidden_states")
    own = getattr(module, "is_decoder", None)  # T5's encoder has the argument too
    decoder = crosses and own is not False
    role = "only" if not both else "decoder" if decoder else "encoder"
    causal = role == "decoder" or any(getattr(m, "is_causal", None) is True for m in module.modules())
    tables = [
        m
        for n, m in module.named_modules()
        if isinstance(m, nn.Embedding) and n.rpartition(".")[2] in ("position_embeddings", "embed_positions", "wpe")
    ]
    if not tables:
        return Stack(path, module, role, causal, None, 0)
    padding = tables[0].padding_idx
    offset = 0 if padding is None else padding + 1
    used = offset or int(getattr(tables[0], "offset", 0))
    return Stack(path, module, role, causal, tables[0].num_embeddings - used, offset)


def only(stacks: Sequence[Stack], *roles: str) -> list[Stack]:
    return [s for s in stacks if s.role in roles]
