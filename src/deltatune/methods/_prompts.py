"""What soft prompts share: the configuration's base, the tensors' home, and the edits of stacks and attentions.

A prompt is a table `(rows, width)`: embeddings to put before the input, or keys and values of every layer side by
side. An encoder may make it in training (an MLP, an LSTM); files hold the table alone, as peft's do, and an adapter
that is loaded has the table in the encoder's place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, TaskType
from deltatune.core import attention
from deltatune.core.bank import Bank
from deltatune.core.edits import Edit, KVEdit, Kwargs, PromptEdit, Slot, container_at
from deltatune.core.prompts import Stack, find_stacks, only, takes
from deltatune.core.roles import role_of
from deltatune.core.sites import Site, base_modules
from deltatune.errors import ConfigError
from deltatune.inits import is_loading

FILE_NAME = "prompt_embeddings"
#: what a table of positions calls the length of the cache: since transformers 5.24, and before
LENGTH_NAMES = ("cache_length", "past_key_values_length")
#: task -> what the class of a model for it is called
TASK_CLASSES = {
    TaskType.CAUSAL_LM: ("CausalLM", "LMHead", "ConditionalGeneration"),
    TaskType.SEQ_2_SEQ_LM: ("ConditionalGeneration", "Seq2Seq"),
    TaskType.SEQ_CLS: ("SequenceClassification",),
    TaskType.TOKEN_CLS: ("TokenClassification",),
    TaskType.QUESTION_ANS: ("QuestionAnswering",),
}


# ---------------------------------------------------------------------- tensors
class Table(nn.Module):
    """A prompt that trains as it is: `embedding.weight` `(rows, width)`."""

    #: the table is computed, and files hold the result
    computed = False

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)

    def table(self, tasks: Tensor | None = None) -> Tensor:
        """`(rows, width)`, or `(B, rows, width)` where it depends on each row's task."""
        return self.embedding.weight

    def columns(self, start: int, stop: int) -> Tensor:
        """`(rows, stop - start)` of the table, without computing the others where possible."""
        return self.table()[:, start:stop]

    def file_names(self) -> dict[str, str]:
        """Parameter -> its name in files; parameters without one are not saved."""
        return {} if self.computed else {"embedding.weight": FILE_NAME}


class EncoderSlot(Slot):
    """A parameter of a prompt's encoder; it stays where the encoder put it."""

    def __init__(self, encoder: nn.Module, name: str, file_name: str | None, trainable: bool) -> None:
        path, _, attr = name.rpartition(".")
        holder = encoder.get_submodule(path)
        value = getattr(holder, attr).detach()
        super().__init__(attr, value, file_name=file_name, saved=file_name is not None, trainable=trainable)
        self.holder, self.attr = holder, attr

    def place(self, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        assert self.value is not None
        self._register(self.value)
        self.value = None
        self.key = self.file_name

    def _register(self, value: Tensor) -> None:
        # not register_parameter: nn.LSTM keeps a second list of its weights in step by setattr
        setattr(self.holder, self.attr, nn.Parameter(value, requires_grad=self.trainable))


class ComputedSlot(Slot):
    """The table that an encoder gives, as files hold it; filling it puts the table in the encoder's place."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(FILE_NAME, torch.empty(0), file_name=FILE_NAME, trainable=False)
        self.value, self.prompt = None, prompt

    @property
    def weight(self) -> Tensor:
        return self.prompt.result()

    def place(self, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        self.key = self.file_name

    def fill(self, tensor: Tensor, *, keep: bool = False) -> None:
        self.prompt.keep_only(tensor)


class Prompt(Bank):
    """The tensors of one prompt, at `<model>.prompt_encoder.<adapter>`.

    Args:
        encoder: gives the table. frozen: its parameters that do not train.
    """

    def __init__(self, encoder: Table, frozen: Sequence[str] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        names = encoder.file_names()
        for name, _ in encoder.named_parameters():
            self.slots.append(EncoderSlot(encoder, name, names.get(name), name not in frozen))
        if encoder.computed:
            self.slots.append(ComputedSlot(self))

    def place_on(self, root: nn.Module, adapter: str) -> None:
        self.place(root, root, "", adapter)
        self.encoder.train(root.training)
        container_at(root, "prompt_encoder").add_module(adapter, self.encoder)

    def table(self, tasks: Tensor | None = None) -> Tensor:
        return self.encoder.table(tasks)

    @torch.no_grad()
    def result(self) -> Tensor:
        """The table as it is without dropout."""
        training = self.encoder.training
        self.encoder.eval()
        try:
            return self.encoder.table().detach().clone()
        finally:
            self.encoder.train(training)

    def keep_only(self, table: Tensor) -> None:
        """Replaces the encoder by the table it gave."""
        old = self.encoder.embedding.weight
        device = next((s.device for s in self.slots if s.device is not None), old.device)
        device = device if old.is_meta else old.device
        new = table.detach().to(device, old.dtype).clone()
        for name in [n for n, _ in self.encoder.named_children() if n != "embedding"]:
            delattr(self.encoder, name)
        trains = old.requires_grad
        self.encoder.__class__ = Table
        self.encoder.embedding = nn.Embedding(len(new), new.shape[1], _weight=new)
        slot = EncoderSlot(self.encoder, "embedding.weight", FILE_NAME, True)
        slot.place(nn.Module(), "", "")
        slot.weight.requires_grad_(trains)
        self.slots[:] = [slot]


# ---------------------------------------------------------------------- edits
class StackPrompt(PromptEdit):
    """Rows `start:stop` of a prompt, before the input of one stack."""

    def __init__(self, prompt: Prompt, stack: Stack, start: int, stop: int) -> None:
        super().__init__()
        self.source, self.start, self.stop = prompt, start, stop
        self.length = stop - start
        self.keeps_width = stack.role == "encoder"
        self.causal, self.positions, self.offset = stack.causal, stack.positions, stack.offset

    def prompt(self, tasks: Tensor | None) -> Tensor:
        return self.source.table(tasks)[..., self.start : self.stop, :]


class Shift(PromptEdit):
    """Tokens count their positions from P on, behind a prefix that is in the attention and not in the input."""

    def __init__(self, stack: Stack, length: int) -> None:
        super().__init__()
        self.shift = length
        self.causal, self.positions, self.offset = stack.causal, stack.positions, stack.offset


class PositionShift(PromptEdit):
    """As `Shift`, at the table of positions of a stack that takes no `position_ids` (BART's)."""

    at_table = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self.shift = length

    def moved(self, call: Kwargs, by: int) -> Kwargs:
        if "position_ids" in call:
            return {**call, "position_ids": call["position_ids"] + by}
        name = next(n for n in LENGTH_NAMES if takes(self.host, n))
        return {**call, name: call.get(name, 0) + by}


class PrefixPairs(KVEdit):
    """Keys and values of one layer: columns of a prompt's table, from `start` on `(P, 2 · heads · d)`."""

    def __init__(self, prompt: Prompt, start: int, heads: int, d: int, bias_source: nn.Module | None) -> None:
        super().__init__()
        self.source, self.start, self.heads, self.d = prompt, start, heads, d
        self.bias_source = bias_source

    def pairs(self) -> tuple[Tensor, Tensor] | None:
        width = self.heads * self.d
        flat = self.source.encoder.columns(self.start, self.start + 2 * width)  # (P, 2 · heads · d)
        keys, values = flat.view(len(flat), 2, self.heads, self.d).permute(1, 2, 0, 3)
        return keys, values


def shifts(stack: Stack, length: int) -> list[tuple[Site, list[Edit]]]:
    """What moves a stack's tokens behind a prefix; nothing where positions are relative (T5, rotation apart)."""
    made: list[tuple[Site, list[Edit]]] = [(Site(stack.path, None), [Shift(stack, length)])]
    if takes(stack.module, "position_ids"):
        return made
    for name, module in base_modules(stack.module):
        if name.rpartition(".")[2] == "embed_positions" and any(takes(module, n) for n in LENGTH_NAMES):
            made.append((Site(f"{stack.path}.{name}" if stack.path else name, None), [PositionShift(length)]))
    return made


# ---------------------------------------------------------------------- attention of a model
@dataclass(frozen=True)
class Attention:
    """An attention module.

    Attributes:
        kind: `"decoder"` (or the only stack's own), `"encoder"` or `"cross"`. heads: of keys and values. d: of one.
    """

    path: str
    module: nn.Module
    kind: str
    heads: int
    d: int


def attentions(model: nn.Module, stacks: Sequence[Stack]) -> list[Attention]:
    """The attention modules of the stacks, in the model's order.

    Raises:
        ConfigError: the model's attention cannot be edited.
    """
    found = []
    for stack in stacks:
        for name, module in base_modules(stack.module):
            if attention.goes_through(module):
                path = f"{stack.path}.{name}" if stack.path and name else stack.path or name
                heads, d = head_sizes(module, model)
                found.append(Attention(path, module, _kind(stack, name, module), heads, d))
    if not found:
        raise ConfigError(
            f"the attention of {type(model).__name__} does not go through transformers' attention function, so keys "
            "and values cannot be put in front of it; prompt tuning and P-tuning work with this model"
        )
    return found


def _kind(stack: Stack, name: str, module: nn.Module) -> str:
    cross = getattr(module, "is_cross_attention", None)
    if cross is None:
        cross = re.search(r"cross_?attention|encdecattention|encoder_attn", name, re.IGNORECASE) is not None
    return "cross" if cross else "encoder" if stack.role == "encoder" else "decoder"


def head_sizes(module: nn.Module, model: nn.Module) -> tuple[int, int]:
    """(heads of keys and values, numbers in one)."""
    config: Any = getattr(module, "config", None) or getattr(model, "config", None)
    queries = int(config.num_attention_heads)
    d = next(
        (getattr(module, n) for n in ("head_dim", "attention_head_size", "key_value_proj_dim") if hasattr(module, n)),
        config.hidden_size // queries,
    )
    keys = [c for n, c in module.named_children() if role_of(n) == "k" and hasattr(c, "out_features")]
    if keys:
        return int(getattr(keys[0], "out_features", 0)) // int(d), int(d)
    return int(getattr(config, "num_key_value_heads", None) or queries), int(d)


# ---------------------------------------------------------------------- configuration
@dataclass
class PromptLearningConfig(TargetedConfig):
    """A prompt's configuration.

    Args:
        num_virtual_tokens: P, the length of the prompt.
        token_dim: width of one virtual token; found from the model.
        num_transformer_submodules: 2 gives an encoder-decoder model a prompt in its decoder too; 1 if None.
        num_attention_heads, num_layers: found from the model.
        decoder_prompt: whether the second half of a table for two submodules is used. peft trains and saves it for
            every encoder-decoder model and then leaves it out, so False is what its files mean.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    decoder_prompt: bool | None = None
    target_modules: list[str] | set[str] | str | None = field(default=None, init=False, repr=False)
    exclude_modules: list[str] | set[str] | str | None = field(default=None, init=False, repr=False)
    layers_to_transform: list[int] | int | None = field(default=None, init=False, repr=False)
    layers_pattern: list[str] | str | None = field(default=None, init=False, repr=False)

    is_prompt_learning: ClassVar[bool] = True
    starts_as_base: ClassVar[bool] = False
    #: fields that peft does not have; files leave them out where they are at their default
    own_fields: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def completed(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"decoder_prompt": False, **values} if values.get("num_transformer_submodules") == 2 else values

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_prompt is None and self.num_transformer_submodules == 2:
            self.decoder_prompt = True
        if self.decoder_prompt and self.num_transformer_submodules != 2:
            raise ConfigError("decoder_prompt=True needs num_transformer_submodules=2, a prompt for each")
        tokens = self.num_virtual_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise ConfigError(f"num_virtual_tokens must be 1 or more, not {tokens!r}")
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ConfigError(
                f"num_transformer_submodules must be 1 (encoder) or 2 (and decoder), not "
                f"{self.num_transformer_submodules!r}"
            )

    @classmethod
    def example(cls, **fields: Any) -> TargetedConfig:
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        return cls(**{"num_virtual_tokens": 3, **{k: v for k, v in fields.items() if k in names}})

    def to_json(self) -> dict[str, Any]:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        values = super().to_json()
        if not self.decoder_prompt:
            del values["decoder_prompt"]
        return {k: v for k, v in values.items() if k not in self.own_fields or getattr(self, k) != defaults[k]}

    @property
    def tokens(self) -> int:
        if self.num_virtual_tokens is None:
            raise ConfigError(f"{type(self).__name__} needs num_virtual_tokens, the length of the prompt (say 20)")
        return self.num_virtual_tokens

    # ------------------------------------------------------------------ fitting to a model
    def sites(self, model: nn.Module) -> list[Site]:
        return []  # `extras` gives the edits, which share one prompt

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        stacks = find_stacks(model)
        self.fit(model, stacks)
        limit = min((s.positions for s in stacks if s.positions is not None), default=None)
        if limit is not None and self.tokens >= limit:
            raise ConfigError(
                f"num_virtual_tokens={self.tokens} leaves no room for input in the model's {limit} positions; lower it"
            )
        return self.edits(model, stacks)

    def fit(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        """Fills in what the model decides, and checks what was given against it."""
        check_task(model, self.task_type, stacks)
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        both = len(only(stacks, "encoder", "decoder")) == 2
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 1
        if self.num_transformer_submodules == 2 and not both:
            raise ConfigError(f"num_transformer_submodules=2 needs an encoder and a decoder in {type(model).__name__}")
        heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
        self.set_from_model("num_attention_heads", heads)
        self.set_from_model("num_layers", layers)
        self.set_from_model("token_dim", int(embedding_of(stacks[0].module).embedding_dim))

    def set_from_model(self, name: str, value: int) -> None:
        given = getattr(self, name)
        if given is not None and given != value:
            raise ConfigError(f"{name}={given} was given and this model's is {value}; leave it out to have it found")
        setattr(self, name, value)

    @property
    def rows(self) -> int:
        """Rows of the table: P for every stack that has a prompt."""
        return self.tokens * (self.num_transformer_submodules or 1)

    # ------------------------------------------------------------------ what a method says
    def encoder(self, model: nn.Module) -> Table:
        """What gives the table `(rows, token_dim)`."""
        raise NotImplementedError

    def frozen(self) -> tuple[str, ...]:
        """Parameters of the encoder that do not train."""
        return ()

    def edits(self, model: nn.Module, stacks: Sequence[Stack]) -> list[tuple[Site, list[Edit]]]:
        """A prompt before the input of the encoder and, with two submodules, of the decoder."""
        prompt = Prompt(self.encoder(model), self.frozen())
        p = self.tokens
        chosen = only(stacks, "encoder", "only") or list(stacks)
        both = bool(self.decoder_prompt)
        if both:
            chosen = [*only(stacks, "encoder"), *only(stacks, "decoder")]
        made: list[tuple[Site, list[Edit]]] = [(Site("", None), [prompt])]
        for i, stack in enumerate(chosen):
            edit = StackPrompt(prompt, stack, i * p, (i + 1) * p)
            edit.reads_first = self.task_type == TaskType.SEQ_CLS and not stack.causal
            if stack.role == "decoder" and both:
                edit.encoder_length = p
            made.append((Site(stack.path, None), [edit]))
        if not both and only(stacks, "decoder") and only(stacks, "encoder"):
            decoder = only(stacks, "decoder")[0]
            watcher = StackPrompt(prompt, decoder, 0, 0)
            watcher.encoder_length = p
            made.append((Site(decoder.path, None), [watcher]))
        return made


def embedding_of(module: Any) -> nn.Embedding:
    """The token embedding of a transformers model or of a stack."""
    table = module.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def check_task(model: nn.Module, task: TaskType | str | None, stacks: Sequence[Stack]) -> None:
    """Refuses a task that the model's class is not for.

    Raises:
        ConfigError: says the class and the task.
    """
    name = type(model).__name__
    wanted = TASK_CLASSES.get(TaskType(task)) if task is not None else None
    others = {w for words in TASK_CLASSES.values() for w in words}
    if wanted and not any(w in name for w in wanted) and any(w in name for w in others):
        right = next(t for t, words in TASK_CLASSES.items() if any(w in name for w in words))
        raise ConfigError(f"task_type {task} is not what {name} does; it is a model for {right}")
    if task == TaskType.SEQ_2_SEQ_LM and not only(stacks, "decoder"):
        raise ConfigError(f"task_type {task} needs an encoder-decoder model, and {name} has no decoder of its own")


# ---------------------------------------------------------------------- initial values
@torch.no_grad()
def embed_ids(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's embeddings of tokens, `(n, d)`, in float32."""
    table = embedding_of(model)
    result: Tensor = table(ids.to(table.weight.device))
    return result.detach().float()


def text_ids(text: str | None, tokenizer_name: str | None, options: dict[str, Any] | None, rows: int) -> Tensor:
    """The text's tokens, cut or repeated to `rows`.

    Raises:
        ConfigError: there is no text, or no tokenizer of that name.
    """
    if not text or not text.strip():
        raise ConfigError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text, and it is empty")
    if not tokenizer_name:
        raise ConfigError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, to split the text into tokens")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, **(options or {}))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer_name_or_path {tokenizer_name!r} has no tokenizer that can be loaded "
            f"({str(error).splitlines()[0]}); give a directory or a hub id that has one"
        ) from error
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(f"prompt_tuning_init_text {text!r} has no tokens in {tokenizer_name!r}; give a longer text")
    return torch.tensor((ids * (rows // len(ids) + 1))[:rows])


def waits_for_file() -> bool:
    """Whether initial values would be overwritten by a file."""
    return is_loading()
