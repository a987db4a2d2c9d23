"""FAR: Freeze And Reconfigure, A Continuously Learning Transformer on the Edge (arXiv 2205.01541).

    m_n = Σ_j |W'_nj - W_nj|        the rows n of a feed-forward layer that move most are its learners

First all of the feed-forward layers trains for a small share of the steps (priming). Then every layer keeps the share
of its rows (with their biases) that moved most and all others are frozen at the base again. The learners are a small
linear layer of their own beside the frozen one, so their step costs what they weigh:

    model = get_peft_model(base, FarConfig(...))            # prime: train briefly
    reconfigure(model, share=0.1)                           # then train on, with a new optimizer

Learners go on from where priming left them, unless told otherwise (the paper does not say). Merging writes the rows
back, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.config import StructuredConfig, register
from deltatune.core.edits import Delta, Edit
from deltatune.core.ops import VectorOp
from deltatune.core.sites import Site, bias_sites, check_patterns, pattern_value
from deltatune.core.structure import chosen_sites, feedforward, find_blocks
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, TargetError
from deltatune.inits.data import reattach
from deltatune.state import find_adapters

Values = dict[str, tuple[Tensor, Tensor | None]]


class RowValues(Delta):
    """The adapter's own value of rows of a weight; `ref` is those rows, `(*batch, n, in)`."""

    def __init__(self, ref: WeightRef, value: Tensor | None) -> None:
        super().__init__(ref)
        start = ref.take(ref.op.matrix(ref.store.load(ref.param))) if value is None else value
        self.value = self.tensor("far_rows", start.clone(), leaf=None)

    def merged(self, w: Tensor) -> Tensor:
        return self.value.weight.to(w.dtype)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        dtype = x.dtype if x.is_floating_point() else self.ref.dtype
        return self.ref.apply(x, self.value.weight.to(dtype) - self.ref.load_as(dtype))


class BiasRows(Delta):
    """The same of a bias; `rows: (n,)` of it, all if None."""

    def __init__(self, ref: WeightRef, rows: Tensor | None, value: Tensor | None) -> None:
        super().__init__(ref)
        self.rows = torch.arange(ref.shape[0], device=ref.device) if rows is None else rows.to(ref.device)
        start = ref.store.load(ref.param)[self.rows] if value is None else value
        self.value = self.tensor("far_bias", start.clone(), leaf=None)

    def merged(self, w: Tensor) -> Tensor:
        return w.index_copy(0, self.rows, self.value.weight.to(w.dtype)[:, None])


@register
@dataclass
class FarConfig(StructuredConfig):
    """FAR's configuration.

    Args:
        target_modules: the feed-forward layers; None finds them from the structure.
        learners: path of a layer (or a regular expression) -> its rows that train; empty while priming, when all do.
            `reconfigure` fills it in, and files have it.

    Raises:
        ConfigError: rows that are repeated or that a layer does not have.
    """

    learners: dict[str, list[int]] = field(default_factory=dict)
    #: what priming left: path -> (rows of the weight, of the bias)
    prepared: Values | None = field(default=None, init=False, repr=False, compare=False)

    method: ClassVar[str] = "FAR"
    summary: ClassVar[str] = "the feed-forward units that move most train"
    paper: ClassVar[str] = "arXiv 2205.01541"
    variants: ClassVar[dict[str, dict[str, Any]]] = {"learners": {"learners": {"layer|out_proj": [5, 0, 2]}}}

    def sites(self, model: nn.Module) -> list[Site]:
        named = self.named(model)
        if self.target_modules is None:
            paths = [path for block in find_blocks(model, named) for path in feedforward(model, block, named)]
            if not paths:
                raise TargetError(
                    f"the blocks of this {type(model).__name__} have no linear feed-forward layer (fused experts "
                    "have no rows that FAR could choose); name linear layers in target_modules"
                )
            weights = chosen_sites(model, self, paths)
        else:
            weights = super().sites(model)
        names = [site.name for site in weights]
        check_patterns(self.learners, names, "learners")
        biases = {(s.path, s.home): s for s in bias_sites(model, names)}
        found = []
        for site in weights:
            rows = self.rows(site)
            if rows is not None and not len(rows):
                continue
            if rows is not None:
                _check_rows(model, site, rows)
            found.append(replace(site, rows=rows))
            if (bias := biases.get((site.path, site.home))) is not None:
                found.append(bias)
        return found

    def rows(self, site: Site) -> Tensor | None:
        """The learners of a layer, rising; None for all rows."""
        if not self.learners:
            return None
        name = site.name
        rows: list[int] = self.learners[name] if name in self.learners else pattern_value(self.learners, name, [])
        if len(set(rows)) != len(rows):
            raise ConfigError(f"learners[{name!r}] names a row twice")
        return torch.tensor(sorted(rows), dtype=torch.long, device="cpu")

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        weight, bias = (self.prepared or {}).get(site.name, (None, None))
        rows = self.rows(site)
        if isinstance(ref.op, VectorOp):
            return BiasRows(ref, rows, bias)
        if rows is not None and getattr(ref.module, "groups", 1) > 1:
            raise ConfigError(f"{site.name!r} is a grouped convolution, whose rows cannot be run apart; leave it out")
        return RowValues(ref, weight)


def _check_rows(model: nn.Module, site: Site, rows: Tensor) -> None:
    n = WeightRef(model.get_submodule(site.path), site.parameter or "weight").full_shape[-2]
    bad = [i for i in rows.tolist() if not 0 <= i < n]
    if bad:
        raise ConfigError(f"learners[{site.name!r}] names row {bad[0]} of a layer of {n} rows")


@torch.no_grad()
def reconfigure(
    model: nn.Module,
    share: float = 0.1,
    adapter_name: str = "default",
    start: Literal["primed", "base"] = "primed",
) -> dict[str, list[int]]:
    """Ends priming: the rows that moved most stay and train on, all others are the base's again.

    Args:
        share: of every layer's rows, in (0, 1]; `round(share · rows)`, at least one.
        start: where learners go on from.

    Returns:
        path of a layer -> its learners. The parameters are new ones, so an optimiser must be made anew.

    Raises:
        ConfigError: the share is out of range, or the adapter is not priming, or nothing has moved yet.
    """
    adapters = find_adapters(model)
    adapters.check(adapter_name)
    config = adapters.configs[adapter_name]
    if not isinstance(config, FarConfig) or config.learners:
        raise ConfigError(f"adapter {adapter_name!r} is not priming: it is no FarConfig, or has its learners already")
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1], not {share!r}")
    if start not in ("primed", "base"):
        raise ConfigError(f'start must be "primed" or "base", not {start!r}')
    learners: dict[str, list[int]] = {}
    values: Values = {}
    deltas = {d.value.key: d for d in adapters.deltas(adapter_name) if isinstance(d, (RowValues, BiasRows))}
    for key, delta in deltas.items():
        if not isinstance(delta, RowValues):
            continue
        w = delta.ref.load()
        moved = (delta.merged(w) - w).abs().sum(-1).flatten()
        if not moved.any():
            raise ConfigError(f"adapter {adapter_name!r} has not moved {key!r} yet; prime it: train it briefly")
        rows = moved.topk(max(1, round(share * len(moved)))).indices.sort().values
        path = key.removesuffix(f".{delta.value.file_name}")
        bias = deltas.get(f"{path}.far_bias")
        learners[path] = rows.tolist()
        values[path] = (delta.value.weight[rows].clone(), None if bias is None else bias.value.weight[rows].clone())
    config.learners, config.prepared = learners, values if start == "primed" else None
    reattach(adapters, adapter_name)
    config.prepared = None
    return learners
