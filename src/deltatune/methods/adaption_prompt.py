"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention (arXiv 2303.16199).

    output = softmax(Q K^T / √d) V + g · softmax(Q K_a^T / √d) V_a        K_a, V_a = W_k A, W_v A without rotation

In each of the top L layers, A: (len, d) and the gate g train; the text's own softmax is untouched, and g = 0 at the
start makes the model the base exactly. As in peft, g is one number per layer, taken as it is; `gate="tanh"` is the
paper's: tanh(g) with one g per head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.edits import Edit, KVEdit
from deltatune.core.prompts import find_stacks, only
from deltatune.core.roles import role_of
from deltatune.core.sites import Site
from deltatune.errors import ConfigError, TargetError, hint
from deltatune.methods._prompts import Attention, attentions, check_task

GATES = ("scalar", "tanh")


class GatedPrompt(KVEdit):
    """The prompt's own attention, gated, added to a layer's."""

    no_merge = "adds an attention over a prompt and does not change a weight"

    def __init__(self, place: Attention, length: int, tanh: bool) -> None:
        super().__init__()
        self.heads, self.d, self.tanh = place.heads, place.d, tanh
        config: Any = getattr(place.module, "config", None)
        self.queries = int(config.num_attention_heads)
        width = next(int(getattr(c, "in_features", 0)) for n, c in place.module.named_children() if role_of(n) == "k")
        self.adaption_prompt = self.tensor("adaption_prompt", torch.randn(1, length, width), leaf=None)
        self.adaption_gate = self.tensor("adaption_gate", torch.zeros(self.queries if tanh else 1), leaf=None)

    def _pairs(self) -> tuple[Tensor, Tensor]:
        """K_a and V_a, `(1, heads, len, d)`, through the layer's own frozen projections."""
        layers = {role_of(n): c for n, c in self.host.named_children() if role_of(n) in ("k", "v")}
        x = self.adaption_prompt.weight
        x = x.to(next(layers["k"].parameters()).dtype)
        sides = []
        for role in ("k", "v"):
            side = layers[role](x).view(1, -1, self.heads, self.d)
            norm = getattr(self.host, f"{role}_norm", None)  # Qwen3 and others norm keys, and queries alike
            sides.append((side if norm is None else norm(side)).transpose(1, 2))
        return sides[0], sides[1]

    def after(self, q: Tensor, scaling: float) -> Tensor | None:
        keys, values = self._pairs()
        repeat = q.shape[1] // self.heads
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        scores = (q @ keys.to(q.dtype).transpose(2, 3)) * scaling  # (B, heads, T, len)
        found = (scores.float().softmax(-1).to(q.dtype) @ values.to(q.dtype)).transpose(1, 2)  # (B, T, heads, d)
        gate = self.adaption_gate.weight
        gate = torch.tanh(gate)[:, None] if self.tanh else gate
        return gate.to(q.dtype) * found


@register
@dataclass
class AdaptionPromptConfig(TargetedConfig):
    """LLaMA-Adapter's configuration.

    Args:
        target_modules: what the attention modules are called (`"self_attn"`); found if None.
        adapter_len: length of the prompt in each layer. adapter_layers: how many of the top layers have one.
        gate: `"scalar"`, one plain number per layer as in peft, or `"tanh"`, the paper's, one per head.

    Raises:
        ConfigError: a value is out of range.
    """

    adapter_len: int | None = None
    adapter_layers: int | None = None
    gate: str = "scalar"
    exclude_modules: list[str] | set[str] | str | None = field(default=None, init=False, repr=False)
    modules_to_save: list[str] | None = field(default=None, init=False, repr=False)
    layers_to_transform: list[int] | int | None = field(default=None, init=False, repr=False)
    layers_pattern: list[str] | str | None = field(default=None, init=False, repr=False)

    method: ClassVar[str] = "ADAPTION_PROMPT"
    summary: ClassVar[str] = "gated attention over a prompt in the top layers"
    paper: ClassVar[str] = "arXiv 2303.16199"
    is_adaption_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}")
        if self.gate not in GATES:
            raise ConfigError(f"gate {self.gate!r} is not one of {', '.join(GATES)}{hint(self.gate, GATES)}")

    def _add_heads(self) -> None:
        """peft's adaption prompt trains no head, and its files have no place for one."""

    @classmethod
    def example(cls, **fields: Any) -> TargetedConfig:
        return cls(**{"adapter_len": 3, "adapter_layers": 1, **{k: v for k, v in fields.items() if k == "gate"}})

    def to_json(self) -> dict[str, Any]:
        values = super().to_json()
        return {k: v for k, v in values.items() if k != "gate" or v != "scalar"}

    def sites(self, model: nn.Module) -> list[Site]:
        return []

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is None:
                raise ConfigError(f"AdaptionPromptConfig needs {name}")
        chosen = self.places(model)
        length, tanh = int(self.adapter_len or 0), self.gate == "tanh"
        return [(Site(a.path, None), [GatedPrompt(a, length, tanh)]) for a in chosen]

    def places(self, model: nn.Module) -> list[Attention]:
        """The attention modules of the top layers."""
        stacks = find_stacks(model)
        check_task(model, self.task_type, stacks)
        found = [a for a in attentions(model, only(stacks, "only", "decoder")) if a.kind == "decoder"]
        found = [a for a in found if {"k", "v"} <= {role_of(n) for n, _ in a.module.named_children()}]
        if not found:
            raise TargetError(
                f"{type(model).__name__} has no attention with separate key and value layers for an adaption prompt"
            )
        if self.target_modules is not None:
            wanted = str(self.target_modules) if isinstance(self.target_modules, str) else None
            names = sorted({a.path.rpartition(".")[2] for a in found})
            if wanted is None:
                raise ConfigError(f"target_modules must be one name such as {names[0]!r}, not {self.target_modules!r}")
            found = [a for a in found if re.search(rf"(^|\.){re.escape(wanted)}$", a.path)]
            if not found:
                raise TargetError(f"target_modules {wanted!r} matches no attention of this model{hint(wanted, names)}")
        else:
            self.target_modules = found[0].path.rpartition(".")[2]
        layers = int(self.adapter_layers or 0)
        if layers > len(found):
            raise ConfigError(f"adapter_layers={layers}, but the model has {len(found)} layers to adapt")
        return found[len(found) - layers :]
