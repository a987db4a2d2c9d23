"""Bottleneck adapters: small two-layer networks inside the blocks of a frozen transformer.

    Ad(h) = s · (U f(D h + b_D) + b_U)          D: (m, d), U: (d, m), m = d / reduction_factor

    Houlsby  (arXiv 1902.00751)  f' = f + Ad(f) after attention and after FFN, before the residual sum; norms train
    Pfeiffer (arXiv 2005.00247)  one after FFN, on the sum: y = LN(f + x + Ad(LN(f + x))), or h + Ad(h) with pre-norm
    parallel (arXiv 2110.04366)  f' = f + s · Ad(x_in), beside FFN, on FFN's own input; s = 4

with f a sub-layer's output and x what the block adds it to. None of them merges, since U and D are not one linear map.
The places are found from the model's structure (`core/sublayers.py`) and from `roles`; `target_modules` names others,
whose output the adapter reads and changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from deltatune.config import StructuredConfig, register
from deltatune.core.edits import Edit
from deltatune.core.ops import find_op
from deltatune.core.sites import Site, base_modules, excluded, is_multihead, norm_sites, select
from deltatune.core.sublayers import ATTENTION, CROSS, FEEDFORWARD, SubLayer, find_sublayers, named_outputs
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, TargetError
from deltatune.methods._bottleneck import (
    AfterOutput,
    BeforeSum,
    Beside,
    BesideReader,
    Bottleneck,
    Dense,
    OnBlock,
    OnSum,
    Reader,
    activation,
    initial,
)
from deltatune.methods._invertible import invertible
from deltatune.methods.ln_tuning import NormValue

#: what a sub-layer's adapter is attached to
OUTPUT, SUM, BLOCK, ADDED, WHOLE, READER = "output", "norm", "block", "summand", "sub-layer", "reader"


@register
@dataclass
class BottleneckConfig(StructuredConfig):
    """Every bottleneck adapter; the named ones are this with other defaults. Names as in the library `adapters`.

    Args:
        mh_adapter: one after each self-attention. cross_adapter: one after each cross-attention.
        output_adapter: one after each feed-forward part.
        reduction_factor: d / m; one number, or `{"<layer number>": number, "default": number}`, layers counted
            through the model, an encoder's first.
        non_linearity: f. scaling: s, or `"learned"` (one number), or `"channel"` (one per feature).
        original_ln_before: the adapter reads the residual sum (normed, where the model norms it) and not f.
        residual_before_ln: with `original_ln_before`, what Ad is added to beside x: True, f; False, what it reads;
            `"post_add"`, the sum. The last two bring x in twice, and the model does not start as the base.
        adapter_residual_before_ln: with `ln_after`, that goes into the adapter's own norm with U's output.
        is_parallel: the adapter reads the sub-layer's input.
        parallel_reads: `"sub-layer"`, what the sub-layer itself
            reads, or `"residual"`, the same before a pre-norm block's norm (as the library `adapters` does).
        ln_before, ln_after: norms of the adapter's own around it. use_gating: times sigmoid(w·h + b), averaged over
            the tokens; `"token"` for each token its own, which a causal model needs.
        dropout: on the adapter's output. stochastic_depth: chance, in training, that a row goes without.
        init_weights: `"bert"`, `"houlsby"` or `"mam_adapter"` (the last two start as the base, the first nearly).
        inv_adapter: `"nice"` or `"glow"` puts MAD-X's invertible adapter behind the embeddings, its networks
            smaller than half the width.
        inv_adapter_reduction_factor: by how much they are smaller.
        leave_out: numbers of layers without an adapter. train_layer_norms: the model's norms train too.

    Raises:
        ConfigError: an option that is not known, or that leaves no unit.
        TargetError: the model's blocks are not found.
    """

    mh_adapter: bool = True
    output_adapter: bool = True
    cross_adapter: bool = False
    reduction_factor: float | dict[str, float] = 16
    non_linearity: str = "relu"
    scaling: float | str = 1.0
    original_ln_before: bool = False
    is_parallel: bool = False
    parallel_reads: str = "sub-layer"
    residual_before_ln: bool | str = True
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    use_gating: bool | str = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    init_weights: str = "bert"
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float = 2.0
    leave_out: list[int] = field(default_factory=list)
    train_layer_norms: bool = False
    _places: dict[str, tuple[str, SubLayer, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False, metadata={"private": True}
    )

    method: ClassVar[str] = "BOTTLENECK"
    summary: ClassVar[str] = "small networks after attention and feed-forward parts"
    paper: ClassVar[str] = "arXiv 1902.00751"
    starts_as_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.non_linearity)
        if isinstance(self.reduction_factor, dict):
            self.reduction_factor = {str(layer): factor for layer, factor in self.reduction_factor.items()}
        for factor in self._factors():
            if not isinstance(factor, (int, float)):
                raise ConfigError(f"reduction_factor must be a number, or one for each layer, not {factor!r}")
        if not self.inv_adapter_reduction_factor > 0:
            raise ConfigError(
                f"inv_adapter_reduction_factor must be positive, not {self.inv_adapter_reduction_factor!r}"
            )
        if self.init_weights not in (kinds := ("bert", "houlsby", "mam_adapter")):
            raise ConfigError(f"init_weights {self.init_weights!r} is not one of {', '.join(kinds)}")
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ConfigError(f'scaling must be a number, "learned" or "channel", not {self.scaling!r}')
        if self.use_gating not in (False, True, "token"):
            raise ConfigError(f'use_gating must be True, False or "token", not {self.use_gating!r}')
        if self.inv_adapter not in (None, "nice", "glow"):
            raise ConfigError(f'inv_adapter must be "nice" or "glow", not {self.inv_adapter!r}')
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)!r}")
        if self.parallel_reads not in ("sub-layer", "residual"):
            raise ConfigError(f'parallel_reads must be "sub-layer" or "residual", not {self.parallel_reads!r}')
        if self.is_parallel and self.original_ln_before:
            raise ConfigError("a parallel adapter reads the sub-layer's input, so original_ln_before means nothing")
        if self.residual_before_ln not in (True, False, "post_add"):
            raise ConfigError(f'residual_before_ln must be True, False or "post_add", not {self.residual_before_ln!r}')
        if self.residual_before_ln is not True and not self.original_ln_before:
            raise ConfigError("residual_before_ln is about the sum that the adapter reads; it needs original_ln_before")
        if self.adapter_residual_before_ln and (not self.ln_after or self.is_parallel or self.stochastic_depth):
            raise ConfigError(
                "adapter_residual_before_ln puts the residual into the adapter's own norm; it needs ln_after=True, "
                "is_parallel=False and stochastic_depth=0"
            )
        if not (self.mh_adapter or self.output_adapter or self.cross_adapter):
            raise ConfigError("mh_adapter, output_adapter and cross_adapter are all off, so there is nothing to train")

    def _factors(self) -> list[Any]:
        factor = self.reduction_factor
        return list(factor.values()) if isinstance(factor, dict) else [factor]

    @classmethod
    def example(cls, **fields: Any) -> BottleneckConfig:
        return cls(**{"reduction_factor": 4, **fields})

    # ------------------------------------------------------------------ places
    def sites(self, model: nn.Module) -> list[Site]:
        self._places, found = {}, []
        self._readers.clear()
        for number, sub in self._sublayers(model):
            kind, host = self._place(model, sub)
            self._places[host] = (kind, sub, number)
            found.append(Site(host, None, pattern=sub.kind))
            if self._has_reader(kind):
                start = self._start(sub)
                self._places[start] = ("", sub, number)
                found.insert(-1, Site(start, None, pattern="reads"))
        if self.train_layer_norms:
            return [*found, *self._norms(model)]
        return found

    def _sublayers(self, model: nn.Module) -> list[tuple[int, SubLayer]]:
        """(number of the layer, sub-layer) of every adapter."""
        paths = [p for p, _ in base_modules(model) if p]
        named = self.named(model)
        if self.target_modules is not None:
            hits = select(self.target_modules, paths, "target_modules")
            chosen = named_outputs(model, list(dict.fromkeys(p for found in hits.values() for p in found)))
            drop = excluded(self, paths)
            return [(i, s) for i, s in enumerate(chosen) if s.output not in drop]
        subs = find_sublayers(model, named)
        numbers = {path: i for i, path in enumerate(dict.fromkeys(s.block.path for s in subs))}
        absent = [i for i in self.leave_out if i not in range(len(numbers))]
        if absent:
            raise TargetError(f"leave_out names layer {absent[0]}, and the model has layers 0 to {len(numbers) - 1}")
        known = {"default", *map(str, numbers.values())}
        named_layers = self.reduction_factor if isinstance(self.reduction_factor, dict) else {}
        strange = [layer for layer in named_layers if layer not in known]
        if strange:
            raise TargetError(
                f'reduction_factor names layer {strange[0]!r}, which is not "default" or one of 0 to {len(numbers) - 1}'
            )
        wanted = self._wanted(len(numbers))
        on = {ATTENTION: self.mh_adapter, CROSS: self.cross_adapter, FEEDFORWARD: self.output_adapter}
        drop = excluded(self, paths)
        found = [(numbers[s.block.path], s) for s in subs if on[s.kind] and s.output not in drop]
        found = [(i, s) for i, s in found if i in wanted]
        if not found:
            raise TargetError(
                f"no sub-layer of this {type(model).__name__} gets an adapter; see leave_out and the flags"
            )
        return found

    def _wanted(self, count: int) -> set[int]:
        """Numbers of the layers that get adapters."""
        chosen = self.layers_to_transform
        if chosen is None:
            return set(range(count)) - set(self.leave_out)
        layers = {chosen} if isinstance(chosen, int) else set(chosen)
        if absent := sorted(layers - set(range(count))):
            raise TargetError(f"layers_to_transform names layer {absent[0]}, and the model has layers 0 to {count - 1}")
        return layers - set(self.leave_out)

    def _place(self, model: nn.Module, sub: SubLayer) -> tuple[str, str]:
        """(kind of place, the host)."""
        if self.is_parallel:
            if self.parallel_reads == "residual" and sub.residual not in ("", sub.reads):
                return READER, sub.output
            whole = sub.output == sub.reads or sub.output.startswith(f"{sub.reads}.")
            return (WHOLE, sub.reads) if whole else (READER, sub.output)
        if not self.original_ln_before or sub.block.stack is None:
            return OUTPUT, sub.output
        if sub.norm is not None:
            return SUM, sub.norm
        if sub.kind == FEEDFORWARD:  # a pre-norm block ends with the sum
            return BLOCK, sub.block.path
        if sub.adds is not None:
            return ADDED, sub.adds
        raise ConfigError(
            f"what {sub.output!r} gives is scaled, or added together with other parts, so there is no sum of its own "
            f"in {type(model).__name__} that an adapter could read; set original_ln_before=False or mh_adapter=False"
        )

    def _has_reader(self, kind: str) -> bool:
        """Whether an adapter there needs what another module reads."""
        apart = self.residual_before_ln is not True or self.adapter_residual_before_ln
        return kind in (READER, ADDED) or (kind in (SUM, BLOCK) and apart)

    def _start(self, sub: SubLayer) -> str:
        """The module whose input such an adapter reads."""
        residual = self.original_ln_before or self.parallel_reads == "residual"
        return sub.residual if residual and sub.residual else sub.reads

    def _norms(self, model: nn.Module) -> list[Site]:
        taken = {host for host, (kind, _, _) in self._places.items() if kind == SUM}
        if taken:
            raise ConfigError("train_layer_norms and original_ln_before both take the norm behind the sum; choose one")
        # a pattern that is no module's name stays out of a file's target_modules
        return [replace(site, pattern="layer norms") for site in norm_sites(model, self.named(model).is_norm)]

    def written(self, model: nn.Module) -> dict[str, Any]:
        return {}  # sub-layers are found in the structure, here as there

    # ------------------------------------------------------------------ making
    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        return NormValue(ref)

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        kind, sub, number = self._places[site.path]
        if not kind:
            self._readers[site.path] = Reader()
            return self._readers[site.path]
        made = self._block(module, site, kind, sub, self.units(sub.size, number, site.path))
        made.sublayer = sub
        return made

    def _block(self, module: nn.Module, site: Site, kind: str, sub: SubLayer, m: int) -> Bottleneck:
        if kind == READER:
            return BesideReader(self._readers[self._start(sub)], self, sub.size, m)
        if kind == WHOLE:
            if getattr(find_op(module), "looks_up", False):
                raise ConfigError(f"{site.path!r} reads tokens, so no parallel adapter can stand beside it")
            return Beside(self, sub.size, m, reads_size(module, sub))
        if kind == OUTPUT:
            return AfterOutput(self, sub.size, m)
        reader = self._readers[self._start(sub)] if self._has_reader(kind) else None
        return {SUM: OnSum, BLOCK: OnBlock, ADDED: BeforeSum}[kind](self, sub.size, m, reader)

    def extras(self, model: nn.Module, made: Sequence[tuple[Site, list[Edit]]]) -> list[tuple[Site, list[Edit]]]:
        if self.inv_adapter is None:
            return []
        return invertible(model, self.inv_adapter, self.inv_adapter_reduction_factor, self.non_linearity)

    @property
    def _readers(self) -> dict[str, Reader]:
        return self.__dict__.setdefault("_made_readers", {})  # type: ignore[no-any-return]

    def units(self, size: int, number: int, path: str) -> int:
        """m of one layer.

        Raises:
            ConfigError: the reduction factor says nothing about the layer, or leaves no unit.
        """
        factor = self.reduction_factor
        if isinstance(factor, dict):
            found = factor.get(str(number), factor.get("default"))
            if found is None:
                raise ConfigError(f'reduction_factor has no entry for layer {number}; add it, or a "default"')
            factor = found
        m = int(size // factor) if factor > 0 else 0
        if m < 1:
            raise ConfigError(f"reduction_factor {factor:g} leaves no unit of the {size} features at {path!r}")
        return m

    def maps(self, edit: Edit, read: int, m: int, size: int) -> tuple[Any, Any]:
        """D and U of one block."""
        kind = self.init_weights
        return (
            Dense(edit, "bottleneck_down", initial(kind, m, read, False)),
            Dense(edit, "bottleneck_up", initial(kind, size, m, True)),
        )


def reads_size(module: nn.Module, sub: SubLayer) -> int:
    """Features of a whole sub-layer's input: the block's width, but for a single layer its own."""
    if sub.block.stack is not None or is_multihead(module):
        return sub.size
    size = getattr(module, "in_features", None)
    if size is None and hasattr(module, "nf"):  # GPT-2's transposed layer
        size = module.get_parameter("weight").shape[0]
    return int(size) if size is not None else sub.size


@register
@dataclass
class HoulsbyConfig(BottleneckConfig):
    """Houlsby's adapters: two in every layer, before the residual sums; the norms train too."""

    non_linearity: str = "gelu"
    init_weights: str = "houlsby"
    train_layer_norms: bool = True

    method: ClassVar[str] = "HOULSBY"
    summary: ClassVar[str] = "two small networks per layer, and the norms"


@register
@dataclass
class PfeifferConfig(BottleneckConfig):
    """Pfeiffer's adapters: one in every layer, on the sum behind the feed-forward part."""

    mh_adapter: bool = False
    original_ln_before: bool = True

    method: ClassVar[str] = "PFEIFFER"
    summary: ClassVar[str] = "one small network per layer, what AdapterFusion fuses"
    paper: ClassVar[str] = "arXiv 2005.00247"


@register
@dataclass
class ParallelConfig(BottleneckConfig):
    """The scaled parallel adapter: beside the feed-forward part, on its input, times 4 (1 is the plain one)."""

    mh_adapter: bool = False
    is_parallel: bool = True
    reduction_factor: float | dict[str, float] = 2
    scaling: float | str = 4.0
    init_weights: str = "mam_adapter"

    method: ClassVar[str] = "PARALLEL_ADAPTER"
    summary: ClassVar[str] = "a small network beside the feed-forward part"
    paper: ClassVar[str] = "arXiv 2110.04366"
    starts_as_base: ClassVar[bool] = True
