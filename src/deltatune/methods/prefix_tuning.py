"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (arXiv 2101.00190).

    attention of layer l:  softmax(Q [P_k; K]^T / √d) [P_v; V]        P_k, P_v: (P, heads, d) of this layer, trained

The table `(P, 2 · layers · heads · d)` trains as it is, or (`prefix_projection=True`) comes from a small network,
E: (P, d) → Linear → tanh → Linear, that is evaluated once when the adapter is saved and then discarded.

**Positions.** Text counts its positions from P on, as behind P real tokens; the prefix's keys carry no rotation.
This is the paper's code's convention, and peft's, so files move both ways. Every query sees the whole prefix, also
where a sliding window has passed on.

An encoder-decoder model has the prefix in its decoder's self-attention; `prefix_attention` gives the encoder and the
cross-attention their own. `num_transformer_submodules=2` is for files that peft reads: it deals the table's pairs to
self- and cross-attention in turn and drops the latter's, so that half of the layers share their prefix with others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.edits import Edit
from deltatune.core.prompts import CACHE_NAMES, Stack, only, takes
from deltatune.core.sites import Site
from deltatune.errors import ConfigError, hint
from deltatune.methods._prompts import (
    Attention,
    PrefixPairs,
    Prompt,
    PromptLearningConfig,
    Table,
    attentions,
    shifts,
)

KINDS = ("encoder", "decoder", "cross")


class Projection(Table):
    """The table from a smaller one: `embedding` (P, d) → `transform`, an MLP → (P, width)."""

    computed = True

    def __init__(self, rows: int, d: int, hidden: int, width: int) -> None:
        super().__init__(rows, d)
        self.transform = nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def table(self, tasks: Tensor | None = None) -> Tensor:
        result: Tensor = self.transform(self.embedding.weight)
        return result

    def columns(self, start: int, stop: int) -> Tensor:
        first, activation, last = self.transform.children()
        h = activation(first(self.embedding.weight))
        return F.linear(h, last.weight[start:stop], last.bias[start:stop])  # type: ignore[index]


@register
@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix-Tuning's configuration.

    Args:
        init_weights: None draws N(0, 1); `"zero"` starts at zero.
        encoder_hidden_size: width of the projection's middle; token_dim if None.
        prefix_projection: compute the prefix by a network in training.
        prefix_attention: which attentions of an encoder-decoder model have a prefix: some of `"encoder"`,
            `"decoder"`, `"cross"`; the decoder's own if None.
        shift_positions: tokens count their positions from P on, as in peft; False leaves positions alone.

    Raises:
        ConfigError: a value is out of range.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    prefix_attention: list[str] | None = None
    shift_positions: bool = True

    method: ClassVar[str] = "PREFIX_TUNING"
    summary: ClassVar[str] = "trained keys and values before every layer's attention"
    paper: ClassVar[str] = "arXiv 2101.00190"
    own_fields: ClassVar[tuple[str, ...]] = ("prefix_attention", "shift_positions")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.decoder_prompt = None
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f"init_weights {self.init_weights!r} is not one of None, 'zero'")
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ConfigError(f"encoder_hidden_size must be 1 or more, not {self.encoder_hidden_size}")
        for kind in self.prefix_attention or ():
            if kind not in KINDS:
                raise ConfigError(f"prefix_attention {kind!r} is not one of {', '.join(KINDS)}{hint(kind, KINDS)}")

    def fit(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        places = self.places(model, stacks)
        given = (self.token_dim, self.num_attention_heads)
        self.token_dim = self.num_attention_heads = None
        super().fit(model, stacks)
        # what counts here are the keys' heads, of which there may be fewer
        self.num_attention_heads, self.token_dim = places[0].heads, places[0].heads * places[0].d
        for name, value in zip(("token_dim", "num_attention_heads"), given, strict=True):
            if value is not None and value != getattr(self, name):
                raise ConfigError(f"{name}={value} was given and this model's keys have {getattr(self, name)}")
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = self.token_dim

    def places(self, model: nn.Module, stacks: Sequence[Stack]) -> list[Attention]:
        """The attentions that get a prefix, in the table's order."""
        found = attentions(model, stacks)
        both = len(only(stacks, "encoder", "decoder")) > 1
        wanted = self.prefix_attention if self.prefix_attention is not None else ["decoder"]
        chosen = [a for kind in wanted for a in found if a.kind == kind]
        if not chosen or (self.prefix_attention is not None and not both):
            kinds = sorted({a.kind for a in found})
            raise ConfigError(
                f"prefix_attention {wanted} has no place in {type(model).__name__}, whose attentions are {kinds}; "
                "leave it out"
            )
        return chosen

    def encoder(self, model: nn.Module) -> Table:
        from deltatune.core.prompts import find_stacks

        width = sum(2 * a.heads * a.d for a in self.places(model, find_stacks(model)))
        return self.table_of(width)

    def table_of(self, width: int) -> Table:
        """The table of all layers' keys and values."""
        assert self.token_dim is not None
        assert self.encoder_hidden_size is not None
        if self.prefix_projection:
            return Projection(self.tokens, self.token_dim, self.encoder_hidden_size, width)
        table = Table(self.tokens, width)
        if self.init_weights == "zero":
            nn.init.zeros_(table.embedding.weight)
        return table

    def edits(self, model: nn.Module, stacks: Sequence[Stack]) -> list[tuple[Site, list[Edit]]]:
        prompt = Prompt(self.encoder(model), self.frozen())
        made: list[tuple[Site, list[Edit]]] = [(Site("", None), [prompt])]
        places = self.places(model, stacks)
        sizes = [2 * a.heads * a.d for a in places]
        for i, place in enumerate(places):
            # a file of peft for two submodules deals the layers' pairs to self- and cross-attention in turn, round
            # and round, and then drops the cross-attention's
            own = 2 * i % len(places) if self.num_transformer_submodules == 2 else i
            edit = PrefixPairs(prompt, sum(sizes[:own]), place.heads, place.d, bias_source(stacks, place))
            made.append((Site(place.path, None), [edit]))
        kinds = {a.kind for a in places}
        for stack in stacks:
            if self.shift_positions and (stack.role in kinds or stack.role == "only"):
                made += shifts(stack, self.tokens)
        return made


def bias_source(stacks: Sequence[Stack], place: Attention) -> nn.Module | None:
    """The module of the place's stack that computes relative position biases for all layers (T5's first)."""
    if place.kind == "cross":
        return None
    for stack in stacks:
        if place.path.startswith(f"{stack.path}." if stack.path else ""):
            for module in stack.module.modules():
                if hasattr(module, "compute_bias") and getattr(module, "has_relative_attention_bias", False):
                    return module
    return None


# ---------------------------------------------------------------------- starting from text
def _prompt_of(model: Any, adapter_name: str | None) -> tuple[Prompt, PrefixTuningConfig]:
    name = adapter_name or model.active_adapter
    model.adapters.check(name)
    config = model.peft_config[name]
    if not isinstance(config, PrefixTuningConfig):
        raise ConfigError(f"adapter {name!r} is {config.method}, which has no prefix of keys and values")
    prompt = next(e for e in model.adapters.edits[name] if isinstance(e, Prompt))
    if prompt.encoder.computed:
        raise ConfigError("a prefix that a network computes cannot be set; use prefix_projection=False")
    if config.prefix_attention not in (None, ["decoder"]):
        raise ConfigError("only a decoder's own prefix can be taken from a cache; leave prefix_attention out")
    return prompt, config


def check_beginning(layer: Any, p: int) -> None:
    """Refuses a cache's layer that does not hold the first P positions of one row.

    Raises:
        ConfigError: says what it holds.
    """
    rows, _, held, _ = layer.keys.shape  # (1, heads, n, d)
    if rows != 1 or held < p:
        raise ConfigError(
            f"the cache holds {rows} rows of {held} positions; a prefix of {p} needs one row of at least {p}"
        )
    seen = int(layer.get_seq_length())
    if seen > held:
        raise ConfigError(
            f"the cache keeps only the last {held} of {seen} positions, in a layer with a sliding window, and a prefix "
            "starts at the first; fill a plain DynamicCache(), or use initialize_kv_prefix_from_text"
        )


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Starts a prefix at the first P positions of a cache that the base filled; returns the table.

    Raises:
        ConfigError: the cache is shorter than the prefix or has lost its beginning (a sliding window), has several
            rows, or is of another model.
    """
    prompt, config = _prompt_of(model, adapter_name)
    p = config.tokens
    if num_virtual_tokens not in (None, p):
        raise ConfigError(f"num_virtual_tokens={num_virtual_tokens}, but this adapter's prefix has {p}")
    own = getattr(past_key_values, "self_attention_cache", past_key_values)  # an encoder-decoder's holds two caches
    parts = []
    for layer in own.layers:
        check_beginning(layer, p)
        parts += [side[0, :, :p].transpose(0, 1).reshape(p, -1) for side in (layer.keys, layer.values)]
    table = torch.cat(parts, 1)
    weight = prompt.encoder.embedding.weight
    if table.shape != weight.shape:
        raise ConfigError(f"the cache gives a prefix of shape {tuple(table.shape)}, and it is {tuple(weight.shape)}")
    weight.copy_(table)
    return weight.detach()


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Starts a prefix at the keys and values that the base has for a text, the paper's best start with little data.

    Args:
        use_chat_template: the text is a user's message, where the tokenizer has a template.

    Raises:
        ConfigError: the text has fewer tokens than the prefix, or the model is an encoder-decoder.
    """
    from transformers import DynamicCache

    _, config = _prompt_of(model, adapter_name)
    if not text.strip():
        raise ConfigError("the text that a prefix starts from is empty")
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]
    if ids.shape[1] < config.tokens:
        raise ConfigError(
            f"the text has {ids.shape[1]} tokens and the prefix {config.tokens}; give a longer text or lower "
            "num_virtual_tokens"
        )
    base = model.get_base_model()
    if base.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(base).__name__} is an encoder-decoder model, whose encoder needs an input beside the text; fill a "
            "cache with both and use initialize_kv_prefix_from_past_key_values"
        )
    cache = DynamicCache()  # without a configuration it keeps all positions, whatever a layer's window
    key = next(n for n in CACHE_NAMES if takes(base, n))
    with model.disable_adapter():
        base(input_ids=ids[:, : config.tokens].to(base.device), use_cache=True, **{key: cache})
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )
