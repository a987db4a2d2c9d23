"""AdapterFusion: Non-Destructive Task Composition for Transfer Learning (arXiv 2005.00247).

    p = softmax_n((Q h)ᵀ (K z_n))        o = Σ_n p_n V z_n        h' = h_residual + o

Stage two: N adapters that were trained apart are frozen, and attention over what each of them gives learns to mix them;
h is what the adapters read, z_n the change that adapter n makes. V starts near the identity and is drawn to it by
0.01 · ‖V - I‖² in the loss (`schedules/fusion.py` adds it). `set_adapter(Fuse("a", "b"))` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.adapters import adapters_of
from deltatune.core.compose import FusionEdit
from deltatune.core.composition import leaves
from deltatune.core.edits import Edit
from deltatune.core.sites import Site
from deltatune.errors import ConfigError
from deltatune.methods._bottleneck import Dense, initial
from deltatune.methods._fields import check_probability

if TYPE_CHECKING:
    from deltatune.schedules.base import Procedure


class Fusion(FusionEdit):
    """Q, K and V of one place; `d` features."""

    def __init__(self, size: int, dropout: float, temperature: float) -> None:
        super().__init__()
        self.dropout, self.temperature = dropout, temperature
        self.q = Dense(self, "fusion_query", initial("bert", size, size, False))
        self.k = Dense(self, "fusion_key", initial("bert", size, size, False))
        near = torch.full((size, size), 1e-6).fill_diagonal_(1.0)
        self.v = Dense(self, "fusion_value", near, bias=False)
        #: of the last call without gradients: the mean weight of every adapter, for pruning and for looking
        self.weights: Tensor | None = None

    def mix(self, query: Tensor, changes: list[Tensor]) -> Tensor:
        z = torch.stack(changes, -2).to(self.q.weight.weight.dtype)  # (…, N, d)
        q = self.q(query.to(z.dtype)).unsqueeze(-1)  # (…, d, 1)
        scores = (self.k(z) @ q).squeeze(-1) / self.temperature  # (…, N)
        p = F.dropout(scores, self.dropout, self.host.training).softmax(-1)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.weights = p.detach().flatten(0, -2).mean(0)
        return (p.unsqueeze(-2) @ self.v(z)).squeeze(-2)

    def distance(self) -> Tensor:
        """‖V - I‖²."""
        v = self.v.weight.weight
        return (v - torch.eye(v.shape[0], device=v.device, dtype=v.dtype)).square().sum()


@register
@dataclass
class FusionConfig(TargetedConfig):
    """The fusion of adapters that are on the model already; name it as `Fuse(…).fusion_name` says (`"a,b"`).

    Args:
        adapters: names of the adapters to fuse, in the order of `Fuse`.
        dropout: on the scores, in training. temperature: the scores are divided by it.
        regularization: weight of ‖V - I‖², summed over places, in the loss.

    Raises:
        ConfigError: fewer than two adapters, or none of them can be fused anywhere.
    """

    adapters: list[str] = field(default_factory=list)
    dropout: float = 0.0
    temperature: float = 1.0
    regularization: float = 0.01

    method: ClassVar[str] = "FUSION"
    usage: ClassVar[str] = """
        from deltatune import Fuse, FusionConfig, PfeifferConfig, get_peft_model

        model = get_peft_model(base, PfeifferConfig(task_type="CAUSAL_LM"), adapter_name="a")
        model.add_adapter("b", PfeifferConfig(task_type="CAUSAL_LM"))
        # ... train each of them; then freeze both and train what mixes them:
        model.set_requires_grad(["a", "b"], False)
        model.add_adapter("a,b", FusionConfig(adapters=["a", "b"]))
        model.set_adapter(Fuse("a", "b"))
    """
    summary: ClassVar[str] = "attention over adapters that were trained apart"
    paper: ClassVar[str] = "arXiv 2005.00247"
    #: nothing without other adapters, so the laws of single methods do not apply
    alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.adapters) < 2:
            raise ConfigError(f"a fusion needs at least two adapters, not {self.adapters}")
        check_probability("dropout", self.dropout)
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, not {self.temperature!r}")
        for option in ("target_modules", "exclude_modules", "layers_to_transform"):
            if getattr(self, option) is not None:
                raise ConfigError(f"a fusion goes where its adapters are, so {option} means nothing here")

    @classmethod
    def example(cls, **fields: Any) -> FusionConfig:
        fields.pop("target_modules", None)
        return cls(**{"adapters": ["a", "b"], **fields})

    def sites(self, model: nn.Module) -> list[Site]:
        there = adapters_of(model)
        assert there is not None, "an adapter set is made before any adapter"
        there.check(*self.adapters)
        names = {n for name in self.adapters for n in leaves(name)}
        edits = [e for name in self.adapters if name in names for e in there.edits[name] if hasattr(e, "query")]
        paths = dict.fromkeys(str(getattr(e.host, "path", "")) for e in edits)
        if not paths:
            raise ConfigError(
                f"none of {', '.join(self.adapters)} is a bottleneck adapter, and only those can be fused"
            )
        self._sizes = {str(getattr(e.host, "path", "")): e.size for e in edits}  # type: ignore[attr-defined]
        return [Site(path, None, pattern="fusion") for path in paths]

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        return Fusion(self._sizes[site.path], self.dropout, self.temperature)

    def procedures(self) -> list[Procedure]:
        from deltatune.schedules.fusion import FusionPenalty

        return [FusionPenalty()] if self.regularization else []
