"""Prompt Tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (arXiv 2104.08691).

    input = [E; x]        E: (P, d) trained, x: (n, d) the embeddings of the text

Starts: RANDOM draws N(0, 1); SAMPLE_VOCAB takes the embeddings of random tokens; TEXT those of a sentence, cut or
repeated to P. An encoder-decoder model gets one prompt in its encoder and, with `num_transformer_submodules=2`,
another in its decoder.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from deltatune.config import register
from deltatune.errors import ConfigError, hint
from deltatune.methods._prompts import PromptLearningConfig, Table, embed_ids, embedding_of, text_ids, waits_for_file


class PromptTuningInit(str, enum.Enum):
    """Where the virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@torch.no_grad()
def start(model: nn.Module, encoder: Table, config: PromptTuningConfig) -> None:
    """Puts the chosen initial values into the encoder's table."""
    init, rows = str(getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)), config.rows
    if init == "RANDOM" or waits_for_file():
        return
    if init == "TEXT":
        ids = text_ids(config.prompt_tuning_init_text, config.tokenizer_name_or_path, config.tokenizer_kwargs, rows)
    else:
        ids = torch.randint(embedding_of(model).num_embeddings, (rows,))
    encoder.embedding.weight.copy_(embed_ids(model, ids))


@register
@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt Tuning's configuration.

    Args:
        prompt_tuning_init: RANDOM, SAMPLE_VOCAB or TEXT.
        prompt_tuning_init_text: the sentence, for TEXT.
        tokenizer_name_or_path: what splits it into tokens; tokenizer_kwargs: options for loading that.

    Raises:
        ConfigError: an init that does not exist, or TEXT without a text or a tokenizer.
    """

    prompt_tuning_init: enum.Enum | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    method: ClassVar[str] = "PROMPT_TUNING"
    summary: ClassVar[str] = "trained embeddings before the input"
    paper: ClassVar[str] = "arXiv 2104.08691"
    inits: ClassVar[type[enum.Enum]] = PromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [i.value for i in self.inits]
        given = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))
        if given not in names:
            raise ConfigError(f"prompt_tuning_init {given!r} is not one of {', '.join(names)}{hint(given, names)}")
        self.prompt_tuning_init = self.inits(given)
        if given != "TEXT":
            if self.tokenizer_kwargs:
                raise ConfigError("tokenizer_kwargs are for prompt_tuning_init='TEXT'; leave them out")
            return
        if not self.prompt_tuning_init_text or not self.prompt_tuning_init_text.strip():
            raise ConfigError("prompt_tuning_init='TEXT' needs prompt_tuning_init_text, and it is empty")
        if not self.tokenizer_name_or_path:
            raise ConfigError("prompt_tuning_init='TEXT' needs tokenizer_name_or_path, to split the text into tokens")

    def encoder(self, model: nn.Module) -> Table:
        assert self.token_dim is not None
        table = Table(self.rows, self.token_dim)
        start(model, table, self)
        return table
