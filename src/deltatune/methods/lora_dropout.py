"""LoRA Dropout: LoRA Dropout as a Sparsity Regularizer for Overfitting Control (arXiv 2404.09610).

    y = W x + b + s · (m_B ∘ B) (A ∘ m_A) x        m_A: (in,), m_B: (out, 1), entries 1 with probability 1 - p

In training whole columns of A (input dimensions) and whole rows of B (output dimensions) are left out, drawn anew for
every call; the rank axis never. The paper trains on the mean loss of several draws (`train_samples`) and answers with
the mean output of several draws (`ensemble`); with 1, the answer is the plain one without any mask. Merged:
W + s · B A, exact for the weights without masks; an ensemble has no equivalent weight.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deltatune.config import register
from deltatune.core.adapters import adapters_of
from deltatune.core.combine import refuse_merge
from deltatune.core.edits import Args, Edit, Kwargs, LowRank, ModuleEdit
from deltatune.core.hosts import base_forward
from deltatune.core.prompts import cache_of
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, MixedBatchError
from deltatune.methods._fields import check_probability
from deltatune.methods.lora import LoraConfig


class RowColumnDropout(LowRank):
    """Any low-rank change, with columns of `a` and rows of `b` left out.

    Args:
        inner: the change. p: probability of leaving out. rescale: divide what is kept by 1 - p.
    """

    def __init__(self, inner: LowRank, p: float, rescale: bool = False) -> None:
        super().__init__(inner.ref)
        self.inner, self.slots = inner, inner.slots
        self.p, self.kept_by = p, 1 - p if rescale else 1.0
        #: draws masks outside training too
        self.sampling = False

    def place(self, host: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().place(host, *args, **kwargs)
        self.inner.host = host

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.inner.factors()
        if not self.p or not (self.host.training or self.sampling):
            return a, b
        # (*batch, 1, in) and (*batch, out, 1)
        return a * self._mask(a[..., :1, :]), b * self._mask(b[..., :1])

    def _mask(self, like: Tensor) -> Tensor:
        return (torch.rand_like(like) >= self.p).to(like.dtype) / self.kept_by

    def drop(self, x: Tensor) -> Tensor:
        return self.inner.drop(x)


class Samples(ModuleEdit):
    """Runs the whole model several times, each with masks of its own, and gives the mean of the outputs.

    Args:
        train: runs of a training call, evaluate: of others; 1 is the ordinary call.
        seed: of the masks outside training, the same at every call; None draws new ones.
    """

    no_merge = "answers with the mean of several runs"

    def __init__(self, train: int, evaluate: int, seed: int | None) -> None:
        super().__init__()
        self.train, self.evaluate, self.seed = train, evaluate, seed

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        module = self.host
        base = base_forward(module)
        n = self.train if module.training else self.evaluate
        if n == 1:
            return base(*args, **kwargs)
        if module.plan.state.rows is not None:  # type: ignore[union-attr]
            raise MixedBatchError("the mean of several runs is for a whole batch; run the adapters one by one")
        kwargs = without_cache(module, kwargs)
        with self._drawing():
            return mean([base(*args, **kwargs) for _ in range(n)])

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Masks are drawn in the body, outside training too, and there from the seed."""
        adapters = adapters_of(self.host)
        assert adapters is not None
        deltas = [
            d for name in adapters.plan.state.names for d in adapters.deltas(name) if isinstance(d, RowColumnDropout)
        ]
        devices = {d.ref.device for d in deltas if d.ref.device.type != "cpu"}
        seeded = self.seed is not None and not self.host.training
        with torch.random.fork_rng(list(devices), enabled=seeded):
            if seeded:
                torch.manual_seed(self.seed or 0)
            for delta in deltas:
                delta.sampling = True
            try:
                yield
            finally:
                for delta in deltas:
                    delta.sampling = False

    def replacements(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        if self.evaluate > 1:
            raise refuse_merge(self, type(self.host).__name__)
        return iter(())


def without_cache(model: nn.Module, kwargs: Kwargs) -> Kwargs:
    """The keywords of a call that is made several times: runs cannot share a cache of keys and values.

    Raises:
        ConfigError: the call brings a cache.
    """
    if cache_of(kwargs) is not None or kwargs.get("use_cache"):
        raise ConfigError("several runs of one call cannot share a cache; pass use_cache=False (to generate too)")
    takes = inspect.signature(base_forward(model)).parameters
    return {**kwargs, "use_cache": False} if "use_cache" in takes else kwargs


def mean(outputs: Sequence[Any]) -> Any:
    """The mean of every floating-point tensor in equally structured outputs; the rest is the last one's."""
    flat = [pytree.tree_flatten(output) for output in outputs]
    leaves = [
        torch.stack(same).mean(0) if isinstance(same[-1], Tensor) and same[-1].is_floating_point() else same[-1]
        for same in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return pytree.tree_unflatten(leaves, flat[-1][1])


@register
@dataclass
class LoraDropoutConfig(LoraConfig):
    """LoRA with dropout of whole input and output dimensions; LoRA's fields, and these.

    Args:
        mask_dropout: p, in [0, 1). rescale: what is kept is divided by 1 - p, for A and for B.
        train_samples: draws of masks per training call; outputs, the loss among them, are their mean.
        ensemble: draws per call outside training; 1 runs once, without masks.
        ensemble_seed: of the masks outside training; None draws new ones at every call.

    Raises:
        ConfigError: a value is out of range, or an option of LoRA does not go with masks.
    """

    mask_dropout: float = 0.5
    rescale: bool = False
    train_samples: int = 1
    ensemble: int = 1
    ensemble_seed: int | None = 0

    method: ClassVar[str] = "LORA_DROPOUT"
    summary: ClassVar[str] = "LoRA whose input and output dimensions are dropped in training"
    paper: ClassVar[str] = "arXiv 2404.09610"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("mask_dropout", self.mask_dropout)
        for name in ("train_samples", "ensemble"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")
        for name in ("use_dora", "lora_bias"):
            if getattr(self, name):
                raise ConfigError(f"{name} does not go with LoRA Dropout: its masks are for A and B alone")

    def sites(self, model: nn.Module) -> list[Site]:
        found = super().sites(model)
        several = self.train_samples > 1 or self.ensemble > 1
        return [*found, Site("", None, pattern="ensemble")] if several else found

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        edit = super().build(ref, site)
        return RowColumnDropout(edit, self.mask_dropout, self.rescale) if isinstance(edit, LowRank) else edit

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        return Samples(self.train_samples, self.ensemble, self.ensemble_seed)
