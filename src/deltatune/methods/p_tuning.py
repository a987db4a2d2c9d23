"""P-Tuning: GPT Understands, Too (arXiv 2103.10385).

    E' = encoder(E)        E: (P, d), encoder: a bidirectional LSTM and an MLP, or an MLP of three layers

The virtual tokens come from a small encoder, which is evaluated once when the adapter is saved and then discarded.
They stand before the input (as in peft), or, as the paper has it, at any places of a template between real words:
give `placeholder_token_id` and put that token where virtual tokens go (`Template` does).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.edits import Edit
from deltatune.core.prompts import Stack
from deltatune.core.sites import Site
from deltatune.errors import ConfigError, hint
from deltatune.methods._prompts import PromptLearningConfig, StackPrompt, Table


class PromptEncoderReparameterizationType(str, enum.Enum):
    """What computes the virtual tokens."""

    MLP = "MLP"
    LSTM = "LSTM"


class MLPEncoder(Table):
    """`embedding` → three linear layers with ReLU between."""

    computed = True

    def __init__(self, rows: int, d: int, hidden: int) -> None:
        super().__init__(rows, d)
        self.mlp_head = nn.Sequential(
            nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, d)
        )

    def table(self, tasks: Tensor | None = None) -> Tensor:
        result: Tensor = self.mlp_head(self.embedding.weight)
        return result


class LSTMEncoder(Table):
    """`embedding` → bidirectional LSTM over the virtual tokens in order → two linear layers."""

    computed = True

    def __init__(self, rows: int, d: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__(rows, d)
        dropout = dropout if layers > 1 else 0.0  # between layers only
        self.lstm_head = nn.LSTM(d, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, d))

    def table(self, tasks: Tensor | None = None) -> Tensor:
        h, _ = self.lstm_head(self.embedding.weight[None])
        result: Tensor = self.mlp_head(h)[0]
        return result


@register
@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-Tuning's configuration.

    Args:
        encoder_reparameterization_type: MLP or LSTM.
        encoder_hidden_size: the encoder's width; token_dim if None.
        encoder_num_layers, encoder_dropout: of the LSTM; an MLP has three layers and no dropout.
        placeholder_token_id: virtual tokens replace this token of the input, in order; None puts them in front.

    Raises:
        ConfigError: a value is out of range.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0
    placeholder_token_id: int | None = None

    method: ClassVar[str] = "P_TUNING"
    summary: ClassVar[str] = "virtual tokens from a small encoder, anywhere in the input"
    paper: ClassVar[str] = "arXiv 2103.10385"
    own_fields: ClassVar[tuple[str, ...]] = ("placeholder_token_id",)
    variants: ClassVar[dict[str, dict[str, Any]]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.encoder_reparameterization_type
        given, names = str(getattr(kind, "value", kind)), [t.value for t in PromptEncoderReparameterizationType]
        if given not in names:
            raise ConfigError(
                f"encoder_reparameterization_type {given!r} is not one of {', '.join(names)}{hint(given, names)}"
            )
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(given)
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            raise ConfigError(f"encoder_hidden_size must be 1 or more, not {self.encoder_hidden_size}")
        if self.encoder_num_layers < 1:
            raise ConfigError(f"encoder_num_layers must be 1 or more, not {self.encoder_num_layers}")
        if not 0 <= self.encoder_dropout < 1:
            raise ConfigError(f"encoder_dropout must be in [0, 1), not {self.encoder_dropout}")
        if given == "MLP" and self.encoder_dropout:
            raise ConfigError("encoder_dropout is the LSTM's; the MLP encoder has none, so set it to 0")
        if self.placeholder_token_id is not None and self.num_transformer_submodules == 2:
            raise ConfigError("a template's placeholders stand in one input; set num_transformer_submodules=1")

    def fit(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        if self.placeholder_token_id is not None:
            self.num_transformer_submodules = 1
        super().fit(model, stacks)
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = self.token_dim

    def encoder(self, model: nn.Module) -> Table:
        assert self.token_dim is not None
        assert self.encoder_hidden_size is not None
        if self.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            layers, dropout = self.encoder_num_layers, self.encoder_dropout
            return LSTMEncoder(self.rows, self.token_dim, self.encoder_hidden_size, layers, dropout)
        return MLPEncoder(self.rows, self.token_dim, self.encoder_hidden_size)

    def edits(self, model: nn.Module, stacks: Sequence[Stack]) -> list[tuple[Site, list[Edit]]]:
        made = super().edits(model, stacks)
        if self.placeholder_token_id is None:
            return made
        for _, edits in made:
            for edit in edits:
                if isinstance(edit, StackPrompt):  # nothing is put in front
                    edit.placeholder = self.placeholder_token_id if edit.length else None
                    edit.length = edit.encoder_length = 0
                    edit.reads_first = edit.keeps_width = False
        return made


class Template:
    """An input with virtual tokens between real words, `"<3> {text} Topic: <2>"`: `<k>` stands for k of them.

    Args:
        placeholder_token_id: as in the configuration; any number that the vocabulary does not use will do.

    Raises:
        ConfigError: the pattern has no `<k>`.
    """

    def __init__(self, pattern: str, placeholder_token_id: int) -> None:
        self.pattern, self.placeholder = pattern, placeholder_token_id
        self.parts = re.split(r"(<\d+>)", pattern)
        self.num_virtual_tokens = sum(int(p[1:-1]) for p in self.parts if re.fullmatch(r"<\d+>", p))
        if not self.num_virtual_tokens:
            raise ConfigError(f"the template {pattern!r} has no virtual tokens; write <3> where three of them go")

    def encode(self, tokenizer: Any, **fields: str) -> list[int]:
        """The input's token ids, placeholders included; begin and end tokens as the tokenizer adds them."""
        ids: list[int] = []
        for part in self.parts:
            if re.fullmatch(r"<\d+>", part):
                ids += [self.placeholder] * int(part[1:-1])
            elif part.strip():
                ids += tokenizer(part.format(**fields).strip(), add_special_tokens=False)["input_ids"]
        around = tokenizer("", add_special_tokens=True)["input_ids"]
        split = len(around) // 2 if getattr(tokenizer, "sep_token_id", None) is not None else len(around)
        return [*around[:split], *ids, *around[split:]]
