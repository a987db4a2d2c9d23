"""What a method can do, found out by trying it on small networks: nothing in the tables is written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune import PeftModel, get_peft_model
from deltatune.config import PeftConfig
from deltatune.errors import DeltatuneError


class Net(nn.Module):
    """`layer` between an input and an output of any shape; self-attention gets its input three times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        many = isinstance(self.layer, nn.MultiheadAttention)
        out: Tensor = self.layer(x, x, x, need_weights=False)[0] if many else self.layer(x)
        return out


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(16, 12)


#: kind of layer -> (how to make one, an input of two rows)
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 16), lambda: torch.randn(2, 3, 12)),
    "Conv1D": (_conv1d, lambda: torch.randn(2, 3, 12)),
    "embedding": (lambda: nn.Embedding(20, 16), lambda: torch.randint(0, 20, (2, 3))),
    "conv": (lambda: nn.Conv2d(8, 16, 3), lambda: torch.randn(2, 8, 5, 5)),
    "attention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), lambda: torch.randn(2, 3, 16)),
}


@dataclass(frozen=True)
class Abilities:
    """What was seen: kinds of layers, and whether it merges and runs row by row on one of them."""

    layers: tuple[str, ...]
    merges: bool
    mixed: bool


def _tried(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except DeltatuneError:
        return None


def _can(model: PeftModel, **inputs: Any) -> tuple[bool, bool]:
    """(merges, runs in a mixed batch while it trains)."""
    mixed = _tried(lambda: model.train()(**inputs, adapter_names=["default", "__base__"])) is not None
    return _tried(lambda: (model.eval().merge_adapter(), True)) is not None, mixed


def _on_layers(kind: type[PeftConfig], options: dict[str, Any]) -> Iterator[tuple[str, bool, bool]]:
    example: Any = kind
    for name, (layer, x) in KINDS.items():
        model = _tried(lambda layer=layer: get_peft_model(Net(layer()), example.example(**options)))
        if model is not None:
            yield name, *_can(model, x=x())


def _on_language_model(kind: type[PeftConfig], options: dict[str, Any]) -> tuple[bool, bool] | None:
    """For methods that change the input or the attention of a whole model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    example: Any = kind
    model = _tried(lambda: get_peft_model(base, example.example(task_type="CAUSAL_LM", **options)))
    return None if model is None else _can(model, input_ids=torch.arange(8).view(2, 4))


@functools.cache
def _probe(kind: type[PeftConfig], options: tuple[tuple[str, Any], ...]) -> Abilities:
    with torch.random.fork_rng():
        found = list(_on_layers(kind, {"target_modules": ["layer"], **dict(options)})) if _targets(kind) else []
        if found:
            names, merges, mixed = zip(*found, strict=True)
            return Abilities(names, any(merges), any(mixed))
        whole = _on_language_model(kind, dict(options))
        return Abilities(("whole model",) if whole else (), *(whole or (False, False)))


def _targets(kind: type[PeftConfig]) -> bool:
    return "target_modules" in kind.__dataclass_fields__ and not kind.is_prompt_learning


def abilities(kind: type[PeftConfig], options: dict[str, Any] | None = None) -> Abilities:
    """What the method of a configuration class can do."""
    return _probe(kind, tuple(sorted((options or {}).items())))
