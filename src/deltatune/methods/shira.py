"""SHiRA: Sparse High Rank Adapters (arXiv 2406.13175).

    W' = W + Δ        Δ: r · (out + in) trained entries (as many as a LoRA of rank r has), zero elsewhere

Where the entries lie is chosen once, at random or at the largest weights; they start at zero. Merging adds them, which
touches a share of about 1 % of the weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import TargetedConfig, register
from deltatune.core.edits import Edit
from deltatune.core.sites import Site
from deltatune.core.sparse import SparseDelta
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, hint
from deltatune.inits import is_loading
from deltatune.methods._fields import check_ranks

#: (layer, r) -> a tensor of the weight's shape that is not zero where entries train
MaskFunction = Callable[..., Tensor]


def random_mask(ref: WeightRef, n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(ref.shape.numel(), generator=generator, device="cpu")[:n]


def magnitude_mask(ref: WeightRef, n: int, generator: torch.Generator) -> Tensor:
    if ref.param.is_meta:
        return torch.arange(n, device="cpu")  # a file fills it
    return ref.load().abs().flatten().topk(n).indices


MASKS: dict[str, Callable[[WeightRef, int, torch.Generator], Tensor]] = {
    "random": random_mask,
    "magnitude": magnitude_mask,
}


@register
@dataclass
class ShiraConfig(TargetedConfig):
    """SHiRA's configuration, with peft's field names and defaults.

    Args:
        r: r · (out + in) entries of a weight train.
        mask_type: `"random"`, `"magnitude"` (the largest weights; the paper's WM), or a name of your own, with
            `config.mask_fn = f` set, where f(layer, r, **kwargs) gives a tensor of the weight's shape that is not zero
            where entries train.
        random_seed: of the random masks; None draws from torch's generator.
        fan_in_fan_out: accepted for peft's sake; the storage order is read from the layer itself.
        init_weights: True starts the entries at zero; False at random (for tests).

    Raises:
        ConfigError: a value is out of range, or a weight has fewer entries.
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    mask_fn: MaskFunction | None = field(default=None, init=False, repr=False, compare=False)

    method: ClassVar[str] = "SHIRA"
    summary: ClassVar[str] = "a random few of a weight's entries train"
    paper: ClassVar[str] = "arXiv 2406.13175"
    ours: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    variants: ClassVar[dict[str, dict[str, Any]]] = {"magnitude": {"mask_type": "magnitude"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks(self.r, {})

    @classmethod
    def example(cls, **fields: Any) -> ShiraConfig:
        return cls(**{"r": 2, **fields})

    def build(self, ref: WeightRef, site: Site) -> Edit:
        n = self.r * (ref.shape[-2] + ref.shape[-1]) * ref.shape[:-2].numel()
        if n > ref.shape.numel():
            raise ConfigError(
                f"r={self.r} asks for {n} entries of {site.name!r}, which has {ref.shape.numel()}; lower r"
            )
        flat = self._positions(ref, site, n)
        values = None if self.init_weights else torch.randn(len(flat), device=ref.device)
        index = torch.stack(torch.unravel_index(flat, ref.shape))
        return SparseDelta(ref, index, values, name="shira", values_name="shira_weight")

    def _positions(self, ref: WeightRef, site: Site, n: int) -> Tensor:
        """Flat positions of the entries that train, rising; real numbers on any device and while loading."""
        if self.mask_fn is not None:
            return self._own_mask(ref, site, n)
        if self.mask_type not in MASKS and not is_loading():
            raise ConfigError(
                f"mask_type {self.mask_type!r} is none of {', '.join(MASKS)}{hint(self.mask_type, MASKS)}; for a mask "
                "of your own set config.mask_fn"
            )
        seed = int(torch.randint(2**31, (), device="cpu")) if self.random_seed is None else self.random_seed
        seed = zlib.crc32(f"{seed} {site.key}".encode())
        return MASKS.get(self.mask_type, random_mask)(ref, n, torch.Generator().manual_seed(seed)).sort().values

    def _own_mask(self, ref: WeightRef, site: Site, n: int) -> Tensor:
        assert self.mask_fn is not None
        module: nn.Module = ref.module
        mask = self.mask_fn(module, self.r, **({} if self.random_seed is None else {"random_seed": self.random_seed}))
        if mask.shape != ref.raw_shape:
            raise ConfigError(
                f"mask_fn gave a mask of shape {tuple(mask.shape)} for {site.name!r}, whose weight is "
                f"{tuple(ref.raw_shape)}"
            )
        flat = ref.take(ref.op.matrix(mask)).flatten().nonzero().flatten()
        if len(flat) != n:
            raise ConfigError(f"mask_fn chose {len(flat)} entries of {site.name!r}; r={self.r} asks for {n}")
        return flat
