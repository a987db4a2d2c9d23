"""ReFT: Representation Finetuning for Language Models (arXiv 2404.03592).

    LoReFT: h' = h + Rᵀ (W h + b - R h)        R: (r, d) with orthonormal rows, W: (r, d), b: (r)
    DiReFT: h' = h + Rᵀ (W h + b)              R: (r, d) free

An edit of the hidden states that chosen blocks give, at the first `prefix_positions` and the last `suffix_positions`
tokens of an input; padding does not count. Prefix and suffix have tensors of their own unless `tied_weights`. LoReFT
starts at W = R and b = 0, DiReFT at W = 0 and b = 0: as the base. R is kept as any matrix and made orthonormal by a QR
decomposition when it is used.

In generation the input is the prompt, and tokens that come after it are left alone. A causal language model that trains
with labels takes for its prompt what stands before the first label. Not a change of a weight, so it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.config import StructuredConfig, TaskType, register
from deltatune.core.bank import Bank
from deltatune.core.edits import Args, Edit, Kwargs, Witness
from deltatune.core.named import Named
from deltatune.core.ops import ConvOp, find_op
from deltatune.core.prompts import bind, cached, find_stacks
from deltatune.core.sites import Site, base_modules, excluded, in_layers, is_multihead, is_norm, select
from deltatune.core.structure import find_blocks, out_in, width_of
from deltatune.core.sublayers import output_size
from deltatune.errors import ConfigError
from deltatune.methods._fields import check_probability, check_ranks


class Positions(Bank):
    """What the calls of a model's stacks said: where the tokens of this call's rows begin and end."""

    def __init__(self) -> None:
        super().__init__()
        #: (B, 2): first token and end of every row's input; None for whole rows
        self.spans: Tensor | None = None
        #: this call goes on after a prompt that is in the cache
        self.going_on = False
        #: (B, T), the labels of the call, where those say what the prompt is
        self.labels: Tensor | None = None


class StackWitness(Witness):
    """Notes the padding of a stack's call, and whether it goes on from a cache."""

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions

    def see(self, args: Args, kwargs: Kwargs) -> None:
        call = bind(self.host, args, kwargs)
        mask, labels = call.get("attention_mask"), self.positions.labels
        self.positions.going_on = cached(call) > 0
        spans = None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask != 0
            start = (real.cumsum(1) == 0).sum(1)
            spans = torch.stack([start, start + real.sum(1)], 1)
        if labels is not None and not self.positions.going_on:
            n = labels.shape[1]
            asked = (labels == -100).cumprod(1).sum(1)  # before the first label
            end = torch.where(asked < n, asked, asked.new_tensor(n))
            start = spans[:, 0] if spans is not None else torch.zeros_like(end)
            spans = torch.stack([start, torch.where(end > start, end, n if spans is None else spans[:, 1])], 1)
        self.positions.spans = spans


class LabelWitness(Witness):
    """Notes the labels of a causal language model's call."""

    def __init__(self, positions: Positions) -> None:
        super().__init__()
        self.positions = positions

    def see(self, args: Args, kwargs: Kwargs) -> None:
        labels = kwargs.get("labels")
        self.positions.labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None


@dataclass
class Unit:
    """R, W and b of one edit."""

    r: Any
    w: Any
    b: Any


class HiddenEdit(Edit):
    """The edit of one module's output `(B, T, d)`.

    Args:
        d: width. config: the method's. positions: of the model's calls.
    """

    no_merge = "changes hidden states at some positions and not a weight"

    def __init__(self, d: int, config: ReftConfig, positions: Positions, device: torch.device) -> None:
        super().__init__()
        self.config, self.positions = config, positions
        counts = {"": config.prefix_positions, "suffix_": config.suffix_positions}
        if config.tied_weights:
            counts = {"": 1}
        self.units = {name: self._unit(name, d, device) for name, n in counts.items() if n}

    def _unit(self, name: str, d: int, device: torch.device) -> Unit:
        r, low = self.config.r, self.config.orthogonal
        start = torch.empty(r, d, device=device)
        nn.init.orthogonal_(start)
        if not self.config.init_weights:
            w, b = torch.randn(r, d, device=device) / d**0.5, torch.zeros(r, device=device)
        else:
            w, b = start.clone() if low else torch.zeros_like(start), torch.zeros(r, device=device)
        tensors = (("R", start), ("W", w), ("b", b))
        return Unit(*(self.tensor(f"reft_{name}{leaf}", value, leaf=None) for leaf, value in tensors))

    def change(self, h: Tensor, unit: Unit) -> Tensor:
        """What is added to `h: (…, d)`."""
        r = unit.r.weight
        if self.config.orthogonal:
            r = orthonormal(r)
        r, w, b = r.to(h.dtype), unit.w.weight.to(h.dtype), unit.b.weight.to(h.dtype)
        inner = F.linear(h, w - r if self.config.orthogonal else w, b)
        if self.config.dropout and self.host.training:
            inner = F.dropout(inner, self.config.dropout)
        change: Tensor = inner @ r
        return change

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        if y.ndim != 3:
            raise ConfigError(
                f"{self.host.path!r} gives a tensor of shape {tuple(y.shape)}; ReFT edits hidden states (B, T, d)"
            )
        total = torch.zeros_like(y)
        if self.positions.going_on:
            return total
        spans = self._spans(y)
        first, last = self.config.prefix_positions, self.config.suffix_positions
        start, end = spans[:, :1], spans[:, 1:]
        if first:
            index = start + torch.arange(first, device=y.device)
            total = self._add(total, y, index, index < end, self.units[""])
        if last:
            index = end - last + torch.arange(last, device=y.device)
            # a short input's tokens are edited once, as its first
            total = self._add(total, y, index, index >= start + first, self.units.get("suffix_", self.units.get("")))
        return total

    def _add(self, total: Tensor, y: Tensor, index: Tensor, valid: Tensor, unit: Unit | None) -> Tensor:
        assert unit is not None
        index = index.clamp(0, y.shape[1] - 1).unsqueeze(-1).expand(-1, -1, y.shape[-1])
        change = self.change(y.gather(1, index), unit) * valid.unsqueeze(-1).to(y.dtype)
        return total.scatter_add(1, index, change)

    def _spans(self, y: Tensor) -> Tensor:
        """`(B, 2)` for the rows of `y`, which in a mixed batch are this adapter's."""
        spans = self.positions.spans
        if spans is None or (len(spans) != len(y) and self._mine() is None):
            return torch.tensor([[0, y.shape[1]]], device=y.device).expand(len(y), 2)
        mine = self._mine()
        return (spans if mine is None else spans[list(mine)]).to(y.device)

    def _mine(self) -> tuple[int, ...] | None:
        """The batch rows that this adapter has; None for all."""
        host: Any = self.host
        if host.plan.state.rows is None:
            return None
        name = next(name for name, edits in host._edits.items() if self in edits)
        rows: tuple[int, ...] | None = host.plan.state.rows_of(name)
        return rows


def orthonormal(r: Tensor) -> Tensor:
    """The rows of `r: (r, d)` made orthonormal; those that are stay as they are."""
    q, upper = torch.linalg.qr(r.float().mT)
    rows: Tensor = (q * torch.diagonal(upper).sign()).mT
    return rows


@dataclass
class ReftConfig(StructuredConfig):
    """What LoReFT and DiReFT share.

    Args:
        target_modules: the modules whose output is edited; None: every block, found from the structure.
        layers_to_transform: numbers of the blocks; all if None.
        r: rows of R.
        prefix_positions: tokens at the beginning of an input that are edited.
        suffix_positions: tokens at its end.
        tied_weights: prefix and suffix share R, W and b.
        dropout: on W h + b - R h, in training.
        init_weights: start as the base; False starts W at random, as the paper does.

    Raises:
        ConfigError: a value is out of range, or no position is edited.
    """

    r: int = 4
    prefix_positions: int = 3
    suffix_positions: int = 0
    tied_weights: bool = False
    dropout: float = 0.0
    init_weights: bool = True

    orthogonal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r, {})
        check_probability("dropout", self.dropout)
        for name in ("prefix_positions", "suffix_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ConfigError(f"{name} must be a number of tokens, not {value!r}")
        if not self.prefix_positions + self.suffix_positions:
            raise ConfigError("prefix_positions and suffix_positions are both 0, so no hidden state would be edited")

    @classmethod
    def example(cls, **fields: Any) -> ReftConfig:
        return cls(**{"r": 2, "prefix_positions": 1, "suffix_positions": 1, **fields})

    def sites(self, model: nn.Module) -> list[Site]:
        paths = [p for p, _ in base_modules(model) if p]
        named = self.__dict__["_named"] = self.named(model)
        if self.target_modules is None:
            found = {"block": [block.path for block in find_blocks(model, named)]}
        else:
            found = select(self.target_modules, paths, "target_modules")
        found = in_layers(self, {k: [f"{p}." for p in v] for k, v in found.items()})
        drop = excluded(self, paths)
        return [Site(p[:-1], None, pattern=k) for k, hits in found.items() for p in hits if p[:-1] not in drop]

    def written(self, model: nn.Module) -> dict[str, Any]:
        return {}  # blocks are found in the structure, here as there

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        try:
            stacks = {s.path: Positions() for s in find_stacks(model)}
        except ConfigError:  # it embeds no tokens, so there is no padding to see
            return []
        for site, edits in made:
            inside = [p for p in stacks if not p or site.path.startswith(f"{p}.")]
            for edit in edits:
                if isinstance(edit, HiddenEdit) and inside:
                    edit.positions = stacks[inside[0]]
        witnesses: list[tuple[Site, list[Edit]]] = []
        if self.task_type == TaskType.CAUSAL_LM:
            witnesses.append((Site("", None), [LabelWitness(positions) for positions in stacks.values()]))
        return witnesses + [(Site(path, None), [StackWitness(positions)]) for path, positions in stacks.items()]

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        return HiddenEdit(_width(module, site, self.__dict__["_named"]), self, Positions(), device)


def _width(module: nn.Module, site: Site, named: Named) -> int:
    """The size of a module's hidden states.

    Raises:
        ConfigError: they have no axis of positions, or the size is unknown.
    """
    op = find_op(module)
    if isinstance(op, ConvOp):
        raise ConfigError(f"{site.path!r} is a convolution, whose output is no sequence of hidden states; name a block")
    if op is not None:
        return out_in(module)[0]
    if is_multihead(module):
        return int(module.embed_dim)  # type: ignore[arg-type]
    if is_norm(module):
        return len(module.get_parameter("weight"))
    found = width_of(module, site.path, named)
    if found is None and "norm" in named:  # it has none, as the user says
        return output_size(module, site.path)
    if found is None:
        raise ConfigError(f"the width of what {site.path!r} gives is unknown: it has no norm; name one of its layers")
    return found


@register
@dataclass
class LoReftConfig(ReftConfig):
    """LoReFT: see `ReftConfig`."""

    method: ClassVar[str] = "LOREFT"
    summary: ClassVar[str] = "hidden states of some positions, in a low-rank subspace"
    paper: ClassVar[str] = "arXiv 2404.03592"
    variants: ClassVar[dict[str, dict[str, Any]]] = {"tied": {"tied_weights": True}}


@register
@dataclass
class DiReftConfig(ReftConfig):
    """DiReFT: see `ReftConfig`; R is free, and R h is not taken away."""

    method: ClassVar[str] = "DIREFT"
    summary: ClassVar[str] = "LoReFT without orthogonality, cheaper"
    paper: ClassVar[str] = "arXiv 2404.03592"
    orthogonal: ClassVar[bool] = False
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
