"""AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning (arXiv 2205.12410).

    training    Ad(h) = U_j f(D_i h + b_i) + b_j       i, j drawn from M experts for each batch and each layer
    otherwise   the experts' mean weights: D = mean D_i, U = mean U_j, so one adapter and no extra cost

Two passes over a batch draw differently, and their outputs are held together:

    L = CE(a) + w · ½ (KL(a‖b) + KL(b‖a))             `consistent_loss`, with a and b the two passes' predictions

Averaging is of weights, not of outputs. `merge_experts` makes the average final, for saving. Of several processes, all
use the first one's draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.edits import Edit
from deltatune.errors import ConfigError
from deltatune.methods._bottleneck import Bottleneck, initial
from deltatune.methods.bottleneck import BottleneckConfig
from deltatune.state import find_adapters


class Experts:
    """M affine maps in one tensor `(M, out, in)`; `(out, in)` once they are merged.

    Args:
        weights: their initial weights.
    """

    def __init__(self, edit: Edit, name: str, weights: list[Tensor]) -> None:
        weight = torch.stack(weights) if len(weights) > 1 else weights[0]
        self.edit = edit
        self.weight = edit.tensor(name, weight)
        self.bias = edit.tensor(name, weight.new_zeros(weight.shape[:-1]), leaf="bias")

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.weight, self.bias.weight
        if weight.ndim == 2:
            return F.linear(x, weight, bias)
        if not self.edit.host.training:
            return F.linear(x, weight.mean(0), bias.mean(0))
        one = same_draw(torch.randint(len(weight), (1,), device=weight.device))
        return F.linear(x, weight.index_select(0, one)[0], bias.index_select(0, one)[0])

    @torch.no_grad()
    def merge(self) -> None:
        """The mean takes the experts' place; new parameters, so an optimiser must not hold the old."""
        for slot, dims in ((self.weight, 3), (self.bias, 2)):
            if slot.weight.ndim == dims:
                slot.replace(slot.weight.detach().mean(0))


def same_draw(drawn: Tensor) -> Tensor:
    """The first process's draw, in all of them: they hold parts of one batch, or of one layer."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(drawn, 0)
    return drawn


@register
@dataclass
class AdaMixConfig(BottleneckConfig):
    """AdaMix's configuration, with the fields of `BottleneckConfig`.

    Args:
        num_experts: M; 1 once they are merged.
        share_up: one U for all experts, as in the paper's code.

    Raises:
        ConfigError: a value is out of range.
    """

    mh_adapter: bool = False
    non_linearity: str = "gelu"
    num_experts: int = 4
    share_up: bool = True

    method: ClassVar[str] = "ADAMIX"
    summary: ClassVar[str] = "adapters drawn at random from several, averaged for inference"
    paper: ClassVar[str] = "arXiv 2205.12410"
    variants: ClassVar[dict[str, dict[str, Any]]] = {"own_up": {"share_up": False}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_experts, bool) or not isinstance(self.num_experts, int) or self.num_experts < 1:
            raise ConfigError(f"num_experts must be a whole number of at least 1, not {self.num_experts!r}")

    def maps(self, edit: Edit, read: int, m: int, size: int) -> tuple[Any, Any]:
        n, kind = self.num_experts, self.init_weights
        ups = 1 if self.share_up else n
        return (
            Experts(edit, "bottleneck_down", [initial(kind, m, read, False) for _ in range(n)]),
            Experts(edit, "bottleneck_up", [initial(kind, size, m, True) for _ in range(ups)]),
        )


def merge_experts(model: nn.Module, adapter_name: str = "default") -> None:
    """Makes one adapter of the experts' mean, for good; outputs outside training do not change.

    Raises:
        ConfigError: the adapter is no AdaMix.
    """
    adapters = find_adapters(model)
    adapters.check(adapter_name)
    config = adapters.configs[adapter_name]
    if not isinstance(config, AdaMixConfig):
        raise ConfigError(f"adapter {adapter_name!r} is {config.method}, which has no experts to merge")
    for edit in adapters.edits[adapter_name]:
        if isinstance(edit, Bottleneck):
            for part in (edit.down, edit.up):
                part.merge()
    config.num_experts = 1


def consistent_loss(model: Any, batch: Mapping[str, Any], weight: float = 1.0) -> Tensor:
    """The loss of two passes that draw their experts (and dropout) independently.

    Positions whose label is -100 do not count in the divergence. A causal model's predictions stand one position
    before their labels.

    Raises:
        ConfigError: the model gives no loss for this batch, or is not in training.
    """
    if not model.training:
        raise ConfigError("the two passes are the same outside training; call model.train() first")
    a, b = model(**batch), model(**batch)
    if getattr(a, "loss", None) is None:
        raise ConfigError(f"{type(model).__name__} returned no loss; put labels into the batch")
    p, q = (F.log_softmax(out.logits.float(), -1) for out in (a, b))
    labels = batch.get("labels")
    if labels is not None and labels.ndim == 2 and p.ndim == 3:
        counted = labels != -100
        if _shifts(model):
            p, q, counted = p[:, :-1], q[:, :-1], counted[:, 1:]
        p, q = p[counted], q[counted]
    both = F.kl_div(q, p, reduction="none", log_target=True) + F.kl_div(p, q, reduction="none", log_target=True)
    loss: Tensor = a.loss + weight * 0.5 * both.sum(-1).mean()
    return loss


def _shifts(model: Any) -> bool:
    """Whether a label stands one position behind the prediction of it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    generates = getattr(base, "can_generate", lambda: False)
    return bool(generates()) and not base.config.is_encoder_decoder
