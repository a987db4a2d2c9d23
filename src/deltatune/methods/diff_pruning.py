"""Diff pruning: Parameter-Efficient Transfer Learning with Diff Pruning (arXiv 2012.07463).

    W' = W + z ∘ w      z = clamp(l + (r - l) s, 0, 1)      s = σ(log u - log(1 - u) + α)      (l, r) = (-1.5, 1.5)

A difference w and the log-odds α of a mask train together; u is drawn from (0, 1) at every step, and is ½ outside
training. Structured: one more gate per weight, which multiplies all of its z. The loss gets λ · `expected_l0`, the
number of entries that are not zero: Σ σ(α - log(-l / r)). Then `prune` keeps the largest |z ∘ w| of all weights
together, and only those train on:

    model = get_peft_model(base, DiffPruningConfig(...))
    optimizer = AdamW(diff_groups(model, lr=1e-5, alpha_lr=0.1))
    …  loss + 1.25e-7 * expected_l0(model) …
    prune(model, keep_ratio=0.005)
    …  train on, with a new optimizer …

Entries are saved as positions and values after `prune`. Merging adds them, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.edits import Delta, Edit
from deltatune.core.merge import evaluating
from deltatune.core.ops import VectorOp
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits.data import reattach
from deltatune.methods._sparse import ChosenConfig, name_of, share_of
from deltatune.state import find_adapters

#: the interval that s is stretched to, before it is clamped to [0, 1]
LOW, HIGH = -1.5, 1.5
#: u stays this far from 0 and 1
EDGE = 1e-4


def hard_concrete(alpha: Tensor, sample: bool) -> Tensor:
    """z, of the shape of α: drawn, or with u = ½."""
    noise: Tensor | float = 0.0
    if sample:
        u = torch.rand_like(alpha).clamp(EDGE, 1 - EDGE)
        noise = u.log() - (1 - u).log()
    s = torch.sigmoid(alpha + noise)
    return (LOW + (HIGH - LOW) * s).clamp(0, 1)


def open_probability(alpha: Tensor) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(alpha - math.log(-LOW / HIGH))


class MaskedDiff(Delta):
    """w and α of one weight.

    Args:
        ref: the weight, `(*batch, out, in)`. name: tells it from others of the model.
        alpha: where α starts. structured: one more gate for the whole weight.
    """

    def __init__(self, ref: WeightRef, name: str, alpha: float, structured: bool) -> None:
        super().__init__(ref)
        self.name = name
        tail = f"_{ref.leaf}" if isinstance(ref.op, VectorOp) else ""
        start = torch.zeros(ref.shape, device=ref.device)
        self.diff = self.tensor(f"diff_w{tail}", start, leaf=None)
        self.alpha = self.tensor(f"diff_alpha{tail}", torch.full_like(start, alpha), leaf=None)
        gate = torch.full((1,), alpha, device=ref.device)
        self.group_alpha = self.tensor(f"diff_group_alpha{tail}", gate, leaf=None) if structured else None

    def change(self) -> Tensor:
        """z ∘ w, `(*batch, out, in)`."""
        sample = self.host.training
        z = hard_concrete(self.alpha.weight, sample)
        if self.group_alpha is not None:
            z = z * hard_concrete(self.group_alpha.weight, sample)
        return z * self.diff.weight

    def merged(self, w: Tensor) -> Tensor:
        return w + self.change().to(w.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.ref.apply(x, self.change())

    def l0(self) -> Tensor:
        """The expected number of entries that are not zero, of the gate too."""
        total = open_probability(self.alpha.weight).sum()
        return total if self.group_alpha is None else total + open_probability(self.group_alpha.weight).sum()


@register
@dataclass
class DiffPruningConfig(ChosenConfig):
    """Diff pruning; the fields of chosen entries, and:

    Args:
        stage: `"search"` trains a difference and a mask of every entry, `"fixed"` those that `prune` has kept.
        structured: a gate per weight beside those of its entries.
        alpha_init: where the log-odds start; 5 leaves the mask nearly open.

    Raises:
        ConfigError: a value is out of range.
    """

    stage: Literal["search", "fixed"] = "search"
    structured: bool = True
    alpha_init: float = 5.0

    method: ClassVar[str] = "DIFF_PRUNING"
    summary: ClassVar[str] = "a sparse difference whose mask is learnt"
    paper: ClassVar[str] = "arXiv 2012.07463"
    draws: ClassVar[bool] = True
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "fixed": {"stage": "fixed", "kept": {r"(layer|out_proj)(\..*)?": 6}}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in ("search", "fixed"):
            raise ConfigError(f'stage must be "search" or "fixed", not {self.stage!r}')
        if (self.stage == "fixed") != self.settled:
            raise ConfigError('stage="fixed" and kept belong together: prune(model) sets both after the search')

    @classmethod
    def example(cls, **fields: Any) -> DiffPruningConfig:
        return cls(**{"alpha_init": 0.5, **fields})

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        if self.stage == "fixed":
            return self.sparse(ref, site)
        return MaskedDiff(ref, name_of(site), self.alpha_init, self.structured)


def _searching(model: nn.Module, adapter_name: str) -> list[MaskedDiff]:
    """The deltas of an adapter in its first stage.

    Raises:
        ConfigError: it is not.
    """
    adapters = find_adapters(model)
    adapters.check(adapter_name)
    found = [d for d in adapters.deltas(adapter_name) if isinstance(d, MaskedDiff)]
    if not found:
        raise ConfigError(f"adapter {adapter_name!r} learns no mask: it is no DiffPruningConfig, or pruned already")
    return found


def expected_l0(model: nn.Module, adapter_name: str = "default") -> Tensor:
    """The expected number of entries that are not zero; the loss gets it times λ (1.25e-7 in the paper's code)."""
    return torch.stack([delta.l0() for delta in _searching(model, adapter_name)]).sum()


def diff_groups(
    model: nn.Module, lr: float = 1e-5, alpha_lr: float = 0.1, adapter_name: str = "default"
) -> list[dict[str, Any]]:
    """Parameter groups: the log-odds at a rate of their own and without decay, all else that trains at `lr`."""
    gates = [s.weight for d in _searching(model, adapter_name) for s in (d.alpha, d.group_alpha) if s is not None]
    ids = {id(p) for p in gates}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [{"params": others, "lr": lr}, {"params": gates, "lr": alpha_lr, "weight_decay": 0.0}]


@torch.no_grad()
def prune(model: nn.Module, keep_ratio: float = 0.005, adapter_name: str = "default") -> int:
    """Ends the search: the largest entries of z ∘ w stay and train on, all others are the base's again.

    Args:
        keep_ratio: share of the competing entries to keep, in (0, 1].

    Returns:
        how many are kept. The parameters are new ones, so an optimiser must be made anew.

    Raises:
        ConfigError: no search is going on, or it is merged.
    """
    adapters = find_adapters(model)
    deltas = _searching(model, adapter_name)
    config = adapters.configs[adapter_name]
    assert isinstance(config, DiffPruningConfig)
    with evaluating(deltas):
        changes = {d.name: d.change().float() for d in deltas}
    keep = share_of(sum(c.numel() for c in changes.values()), keep_ratio, "keep_ratio")
    config.choose({name: c.abs() for name, c in changes.items()}, keep, changes)
    config.stage = "fixed"
    reattach(adapters, adapter_name)
    return keep
