"""UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning (arXiv 2110.07577).

    LoRA on q and v:   y + g_q · B A x              prefix:  keys and values times g_P
    adapter on FFN:    h + g_A · Ad(h)              g = mean_t σ(w · h_t + b), one number per row, layer and module

Each part has a gate of its own, which reads the module's input. The mean over tokens would let a causal model see its
future, so there every token has its own gate (`gates="token"`): g_t · B A x_t, g_t · Ad(h_t), and for the prefix the
sum Attn(q_t) + g_t · softmax(q_t P_k) P_v in place of scaled keys. `gates=None` takes the one that fits the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import StructuredConfig, TargetedConfig, TaskType, register
from deltatune.core.edits import Edit
from deltatune.core.prompts import Stack
from deltatune.core.sites import Site, is_linear, targets, weight_sites
from deltatune.core.structure import attention_layers, chosen_sites
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.methods._bottleneck import Dense, Reader, initial
from deltatune.methods._prompts import Attention, PrefixPairs, Prompt
from deltatune.methods.bottleneck import PfeifferConfig
from deltatune.methods.prefix_tuning import PrefixTuningConfig, bias_source
from deltatune.methods.union import UnionConfig


def gate_of(dense: Dense, h: Tensor, causal: bool) -> Tensor:
    """σ(w · h + b): `(B, T, 1)`, or its mean over tokens `(B, 1, 1)`."""
    g = torch.sigmoid(dense(h.to(dense.weight.weight.dtype)))
    return g if causal else g.mean(1, keepdim=True)


class GatedLora(Edit):
    """y + g · B A x at one linear layer."""

    no_merge = "has a gate that depends on the input"

    def __init__(self, ref: WeightRef, r: int, scale: float, causal: bool) -> None:
        super().__init__()
        out, inp = ref.shape
        self.ref, self.scale, self.causal = ref, scale, causal
        start = nn.init.kaiming_uniform_(torch.empty(r, inp), a=5**0.5)
        self.a, self.b = self.tensor("lora_A", start), self.tensor("lora_B", torch.zeros(out, r))
        self.gate = Dense(self, "lora_gate", initial("bert", 1, inp, False))

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        change = self.ref.factored(x, self.a.weight, self.scale * self.b.weight)
        return change * gate_of(self.gate, x, self.causal).to(change.dtype)


@register
@dataclass
class GatedLoraConfig(StructuredConfig):
    """LoRA times a gate of its input; a part of UniPELT.

    Args:
        r, lora_alpha: as LoRA's; the update is scaled by lora_alpha / r and the gate.
        gate: `"row"` for the mean over tokens, `"token"` for each token its own.
    """

    r: int = 8
    lora_alpha: float = 16
    gate: str = "row"

    method: ClassVar[str] = "GATED_LORA"
    summary: ClassVar[str] = "LoRA times a gate of the input, a part of UniPELT"
    paper: ClassVar[str] = "arXiv 2110.07577"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gate(self.gate)
        if not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"r must be a whole number of at least 1, not {self.r!r}")

    @classmethod
    def example(cls, **fields: Any) -> GatedLoraConfig:
        return cls(**{"r": 4, "gate": "token", **fields})

    def sites(self, model: nn.Module) -> list[Site]:
        if self.target_modules is None and {"query", "value"} & set(self.roles):
            return chosen_sites(model, self, attention_layers(model, ("q", "v"), self.named(model)))
        return weight_sites(model, targets(model, self))

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        if not ref.bypass or not is_linear(ref.module) or ref.op.looks_up:
            raise ConfigError(f"{site.name!r} is no plain linear layer, and a gate needs one")
        return GatedLora(ref, self.r, self.lora_alpha / self.r, self.gate == "token")


def check_gate(value: str) -> None:
    if value not in ("row", "token"):
        raise ConfigError(f'gate must be "row" or "token", not {value!r}')


class GatedPairs(PrefixPairs):
    """A layer's keys and values times the row's gate; per token, attention to them alone is added instead."""

    def __init__(self, reader: Reader, size: int, causal: bool, *args: Any) -> None:
        super().__init__(*args)
        self.reader, self.causal = reader, causal
        self.gate = Dense(self, "prefix_gate", initial("bert", 1, size, False))

    def _gate(self) -> Tensor:
        noted = self.reader.noted
        assert noted is not None, "the attention's input is noted before its function runs"
        return gate_of(self.gate, noted, self.causal)

    def pairs(self) -> tuple[Tensor, Tensor] | None:
        if self.causal:
            return None
        found = super().pairs()
        assert found is not None
        gate = self._gate().unsqueeze(-1)  # (B, 1, 1, 1)
        return found[0] * gate, found[1] * gate

    def after_rows(self, q: Tensor, index: Tensor | None, scaling: float) -> Tensor | None:
        if not self.causal:
            return None
        found = super().pairs()
        assert found is not None
        gate = self._gate()
        if index is not None:
            q, gate = q[index], gate[index]
        times = q.shape[1] // self.heads  # query heads that share a key's head
        keys, values = (t.repeat_interleave(times, 0).to(q.dtype) for t in found)  # (heads, P, d)
        out = (q @ keys.mT * scaling).softmax(-1) @ values  # (B, heads, T, d)
        return out.transpose(1, 2) * gate.unsqueeze(-1).to(q.dtype)


@register
@dataclass
class GatedPrefixConfig(PrefixTuningConfig):
    """A prefix times a gate of the attention's input; a part of UniPELT. Positions are not moved.

    Args:
        gate: `"row"` for the mean over tokens, `"token"` for each token its own.
    """

    gate: str = "row"
    shift_positions: bool = False

    method: ClassVar[str] = "GATED_PREFIX"
    summary: ClassVar[str] = "a prefix times a gate of the input, a part of UniPELT"
    paper: ClassVar[str] = "arXiv 2110.07577"
    own_fields: ClassVar[tuple[str, ...]] = ("prefix_attention", "shift_positions", "gate")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_gate(self.gate)

    def edits(self, model: nn.Module, stacks: Sequence[Stack]) -> list[tuple[Site, list[Edit]]]:
        prompt = Prompt(self.encoder(model), self.frozen())
        made: list[tuple[Site, list[Edit]]] = [(Site("", None), [prompt])]
        places = self.places(model, stacks)
        start = 0
        for place in places:
            reader = Reader()
            size, causal = hidden_size(place), self.gate == "token"
            shared = (prompt, start, place.heads, place.d, bias_source(stacks, place))
            made.append((Site(place.path, None), [reader, GatedPairs(reader, size, causal, *shared)]))
            start += 2 * place.heads * place.d
        return made


def hidden_size(place: Attention) -> int:
    """Features of what an attention reads."""
    linear: Any = next(m for m in place.module.modules() if isinstance(getattr(m, "weight", None), Tensor))
    size: int = getattr(linear, "in_features", None) or linear.weight.shape[0]
    return size


@register
@dataclass
class UniPELTConfig(UnionConfig):
    """LoRA, prefix and Pfeiffer adapter with a gate each.

    Args:
        r, lora_alpha: of the LoRA on q and v. num_virtual_tokens, encoder_hidden_size: of the prefix.
        reduction_factor: of the adapter. gates: `"row"`, `"token"`, or None: `"token"` for `CAUSAL_LM`.
    """

    r: int = 8
    lora_alpha: float = 16
    num_virtual_tokens: int = 10
    encoder_hidden_size: int = 512
    reduction_factor: float = 16
    gates: str | None = None

    method: ClassVar[str] = "UNIPELT"
    summary: ClassVar[str] = "LoRA, prefix and adapter, each with a gate"
    paper: ClassVar[str] = "arXiv 2110.07577"

    def parts_by_default(self) -> Sequence[TargetedConfig]:
        gate = self.gates or ("token" if self.task_type == TaskType.CAUSAL_LM else "row")
        check_gate(gate)
        prefix = GatedPrefixConfig(
            task_type=self.task_type,
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=True,
            encoder_hidden_size=self.encoder_hidden_size,
            gate=gate,
        )
        adapter = PfeifferConfig(
            reduction_factor=self.reduction_factor, use_gating="token" if gate == "token" else True
        )
        return prefix, GatedLoraConfig(r=self.r, lora_alpha=self.lora_alpha, gate=gate), adapter

    @classmethod
    def example(cls, **fields: Any) -> UniPELTConfig:
        options: dict[str, Any] = {"r": 4, "num_virtual_tokens": 3, "encoder_hidden_size": 8, "reduction_factor": 4}
        return cls(**options, task_type=TaskType.CAUSAL_LM)
