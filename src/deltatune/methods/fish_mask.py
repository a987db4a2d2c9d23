"""FISH Mask: Training Neural Networks with Fixed Sparse Masks (arXiv 2111.09839).

    F_i = Σ over samples (∂ loss(x, y) / ∂ θ_i)²        the entries with the largest F train, the others are frozen

F is the diagonal of the empirical Fisher information, so gradients are taken of one sample at a time, with dropout off.
All weights share one threshold, and the mask is fixed for the whole training:

    config = FishMaskConfig(keep_ratio=0.005)
    prepare_init(model, config, batches)        # the paper takes 1024 samples
    model = get_peft_model(model, config)

Entries are saved as positions and values. Merging adds them, exactly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.edits import Edit
from deltatune.core.sites import Site
from deltatune.core.sparse import SparseDelta
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import is_loading
from deltatune.inits._watch import GradientWatch
from deltatune.inits.data import COLLECTORS, Collector, evaluated, rows_of_batch, summed
from deltatune.methods._sparse import ChosenConfig, name_of, share_of


@register
@dataclass
class FishMaskConfig(ChosenConfig):
    """FISH Mask; the fields of chosen entries, and:

    Args:
        keep_ratio: share of the competing entries that train, in (0, 1].
        score: what is summed over samples: squares of gradients, or their magnitudes.

    Raises:
        ConfigError: a value is out of range, or no data were seen.
    """

    keep_ratio: float = 0.005
    score: Literal["square", "absolute"] = "square"

    method: ClassVar[str] = "FISH_MASK"
    usage: ClassVar[str] = """
        import torch

        from deltatune import FishMaskConfig, get_peft_model, prepare_init

        ids = torch.arange(2, 34).view(4, 8)  # a few batches of your own data
        batches = [{"input_ids": ids, "labels": ids}]
        config = FishMaskConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        prepare_init(base, config, batches)
        model = get_peft_model(base, config)
    """
    summary: ClassVar[str] = "the entries with the largest Fisher information train"
    paper: ClassVar[str] = "arXiv 2111.09839"

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of(1, self.keep_ratio, "keep_ratio")
        if self.score not in ("square", "absolute"):
            raise ConfigError(f'score must be "square" or "absolute", not {self.score!r}')

    @classmethod
    def example(cls, **fields: Any) -> FishMaskConfig:
        return cls(**{"kept": {r"(layer|out_proj)(\..*)?": 6}, **fields})

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        if not self.settled and is_loading():  # a dry run: as many entries, wherever they will be
            n = share_of(ref.shape.numel(), self.keep_ratio, "keep_ratio")
            return SparseDelta(ref, torch.arange(n, device=ref.device))
        if not self.settled:
            raise ConfigError(
                "FISH Mask looks at data first: call prepare_init(model, config, batches) before get_peft_model"
            )
        return super().build(ref, site)


class FisherCollector(Collector):
    """Sums of squared gradients, a sample at a time."""

    backward = True
    title = "FISH Mask"

    def __init__(self, model: nn.Module, config: FishMaskConfig) -> None:
        super().__init__(model, config)
        config.kept, config.prepared = {}, None  # a new choice
        self.refs: dict[str, WeightRef] = {}
        for site in config.candidates(self.root):
            assert site.parameter is not None
            ref = WeightRef(self.root.get_submodule(site.path), site.parameter, site.rows)
            if not ref.store.exact or not ref.param.is_floating_point():
                raise ConfigError(
                    f"FISH Mask needs the gradient of {site.name!r}, whose weight is quantised; choose on the base in "
                    "full precision"
                )
            if hasattr(ref.param, "device_mesh"):
                raise ConfigError(
                    "FISH Mask needs gradients of single samples, and FSDP averages those of its processes; choose the "
                    "mask before the base is sharded"
                )
            self.refs[name_of(site)] = ref
        #: id of a parameter -> the sum of its scores, in its own layout
        self.sums: dict[int, Tensor] = {}

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return evaluated(model)

    def watch(self) -> GradientWatch:
        return GradientWatch(self.root, (ref.param for ref in self.refs.values()), self._add)

    def parts(self, batch: Any) -> Iterable[Any]:
        return rows_of_batch(batch)

    def _add(self, key: int, grad: Tensor) -> None:
        score = grad.square() if self.config.score == "square" else grad.abs()
        self.sums[key] = self.sums[key] + score if key in self.sums else score

    def scores(self) -> dict[str, Tensor]:
        """name of a weight -> the score of every entry, `(*batch, out, in)`, over all processes.

        Raises:
            ConfigError: no gradient reached a weight, or one is not finite.
        """
        sums = {key: summed(score) for key, score in self.sums.items()}
        found = {}
        for name, ref in self.refs.items():
            if id(ref.param) not in sums:
                raise ConfigError(f"FISH Mask: no batch gave {name!r} a gradient; leave it out, or check the loss")
            score = ref.take(ref.op.matrix(sums[id(ref.param)]))
            if not torch.isfinite(score).all():
                raise ConfigError(f"FISH Mask: the gradient of {name!r} is not finite")
            found[name] = score
        return found

    def finish(self) -> Any:
        scores = self.scores()
        keep = share_of(sum(s.numel() for s in scores.values()), self.config.keep_ratio, "keep_ratio")
        self.config.choose(scores, keep)
        return self.config.prepared


COLLECTORS[FishMaskConfig.method] = FisherCollector
