"""LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation (arXiv 2402.07721).

    g_i = mean over tokens of ‖ΔW_i x_i‖²        I_i = g_i / Σ_j g_j

First a LoRA on every layer trains briefly. Then the layers with the largest I_i, up to a share T of the whole, keep a
LoRA each, and all others of the same kind of layer share one. Both start afresh and train on all the data:

    stage = get_peft_model(model, LoraConfig(...)); train it briefly
    importance = output_importance(stage, batches)
    config = LoraDropConfig(..., shared=importance.share_rest(threshold=0.9))

`shared` is the map from layers to their LoRA and is saved. Merged: W_i + s · B A of whichever LoRA layer i uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import register
from deltatune.core.adapters import AdapterSet
from deltatune.core.bank import Bank
from deltatune.core.combine import first_tensor
from deltatune.core.edits import Args, Delta, Edit, Kwargs, LowRank, Slot
from deltatune.core.ops import VectorOp
from deltatune.core.sites import Site, check_patterns, pattern_value
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import Request, find_init
from deltatune.inits import start as start_of
from deltatune.inits._watch import attention_mask_of
from deltatune.inits.data import Collector, Forward, call_model, run_batches, summed
from deltatune.methods._fields import check_input_dropout
from deltatune.methods.lora import LoraConfig
from deltatune.state import find_adapters

Pair = tuple[Slot, Slot]


class SharedPairs(Bank):
    """The LoRAs that several layers share: `<root>.lora_A_<group>`, `<root>.lora_B_<group>`."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: dict[str, Pair] = {}

    def add(self, group: str, a: Tensor, b: Tensor) -> None:
        self.pairs[group] = (self.tensor(f"lora_A_{group}", a), self.tensor(f"lora_B_{group}", b))


class SharedDelta(LowRank):
    """One layer's use of a shared pair.

    Args:
        ref: the weight, `(*batch, out, in)`. pair: A and B.
        scale: s. dropout: probability on the input, in training.
    """

    def __init__(self, ref: WeightRef, pair: Pair, scale: float, dropout: float) -> None:
        super().__init__(ref)
        self.pair, self.scale, self.dropout = pair, scale, dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = self.ref.op.unpack(self.pair[0].weight, self.pair[1].weight)
        return a, self.scale * b


@register
@dataclass
class LoraDropConfig(LoraConfig):
    """LoRA of which some layers share one; LoRA's fields, and the map.

    Args:
        shared: path of an adapted layer (or an ending, or a regular expression) -> name of the LoRA that it shares;
            layers that are not in it have their own.

    Raises:
        TargetError: a shared layer is not adapted. ConfigError: layers that share differ in shape, rank or scale.
    """

    shared: dict[str, str] = field(default_factory=dict)

    method: ClassVar[str] = "LORA_DROP"
    summary: ClassVar[str] = "LoRA where it matters; the other layers of a kind share one"
    paper: ClassVar[str] = "arXiv 2402.07721"
    variants: ClassVar[dict[str, dict[str, Any]]] = {"shared": {"shared": {"layer": "rest"}}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("use_dora", "lora_bias", "enable_lora"):
            if getattr(self, name):
                raise ConfigError(f"{name} does not go with LoRA-drop: layers share A and B alone")
        for path, group in self.shared.items():
            if not isinstance(group, str) or not group.isidentifier():
                raise ConfigError(f"shared[{path!r}] must name a LoRA by letters, digits and _, not {group!r}")
        init, _ = find_init(self.init_name)
        if self.shared and (init.offset or init.needs_data):
            raise ConfigError(f"a LoRA that layers share cannot start from one of them (init {self.init_name!r})")

    def bank(self, weights: Sequence[tuple[WeightRef, Site]]) -> Bank | None:
        keys = [site.key for ref, site in weights if not isinstance(ref.op, VectorOp)]
        check_patterns(self.shared, keys, "shared")
        members: dict[str, list[tuple[WeightRef, Site]]] = {}
        for ref, site in weights:
            group = self._group(ref, site)
            if group is not None:
                members.setdefault(group, []).append((ref, site))
        bank = SharedPairs()
        for group, layers in members.items():
            self._add_pair(bank, group, layers)
        return bank if members else None

    def _group(self, ref: WeightRef, site: Site) -> str | None:
        """The LoRA that a weight shares, if any."""
        return None if isinstance(ref.op, VectorOp) else pattern_value(self.shared, site.key, None)

    def _add_pair(self, bank: SharedPairs, group: str, layers: Sequence[tuple[WeightRef, Site]]) -> None:
        ref, site = layers[0]
        like = (ref.shape, ref.raw_shape, type(ref.op), self.pair(site.name))
        for other, place in layers[1:]:
            if (other.shape, other.raw_shape, type(other.op), self.pair(place.name)) != like:
                raise ConfigError(
                    f"{site.key!r} and {place.key!r} differ in shape, rank or scale, so they cannot share the LoRA "
                    f"{group!r}; give them different names in shared"
                )
        r, scale = self.pair(site.name)
        start = start_of(Request(self.init_name, ref, site.key, r, scale, self))
        bank.add(group, *ref.op.pack(ref.module, start.a, start.b))

    def build_shared(self, ref: WeightRef, site: Site, bank: Bank) -> Edit | Sequence[Edit]:
        group = self._group(ref, site)
        if group is None:
            return self.build(ref, site)
        check_input_dropout("lora_dropout", self.lora_dropout, ref, site)
        assert isinstance(bank, SharedPairs)
        return SharedDelta(ref, bank.pairs[group], self.pair(site.name)[1], self.lora_dropout)


# ---------------------------------------------------------------------- the first stage
@dataclass(frozen=True)
class Importance:
    """How large the LoRA outputs are.

    Attributes:
        shares: path -> I; they add up to 1 over the layers of one kind.
        kinds: path -> the layer's kind: its own name, numbered where weights of several shapes have that name.
    """

    shares: dict[str, float]
    kinds: dict[str, str]

    def share_rest(self, threshold: float = 0.9) -> dict[str, str]:
        """The map for `LoraDropConfig.shared`.

        Args:
            threshold: the most important layers of a kind keep their own LoRA until they hold this share of the
                importance, the others share one; 1 keeps all, 0 none.

        Raises:
            ConfigError: `threshold` is outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is a share of the importance, in [0, 1], not {threshold!r}")
        held = dict.fromkeys(self.kinds.values(), 0.0)
        rest: set[str] = set()
        for path in sorted(self.shares, key=lambda p: -self.shares[p]):
            kind = self.kinds[path]
            if threshold < 1 and held[kind] >= threshold:
                rest.add(path)
            held[kind] += self.shares[path]
        return {path: kind for path, kind in self.kinds.items() if path in rest}


def output_importance(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str = "default",
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> Importance:
    """Measures every layer's LoRA output on real batches.

    Args:
        model: with a trained adapter; its other adapters keep running as they do.
        batches: what the model is called with; padding that an `attention_mask` marks does not count.
        forward: (model, batch) -> anything; default `model(**batch)`, `model(*batch)` or `model(batch)`.
        max_batches: stop after so many.

    Raises:
        ConfigError: there was no batch, or the adapter changes nothing yet (B is zero before training).
    """
    meter = Meter(find_adapters(model), adapter_name)
    run_batches(model, meter, batches, forward or call_model, max_batches=max_batches, progress=progress)
    return meter.finish()


class Meter(Collector):
    """The mean of ‖ΔW x‖² over tokens, for every weight of one adapter."""

    title = "the importance of layers"

    def __init__(self, adapters: AdapterSet, name: str) -> None:
        adapters.check(name)
        super().__init__(adapters.root, adapters.configs[name])
        self.adapters, self.name = adapters, name
        self.deltas = {str(d.host.path): d for d in adapters.deltas(name) if not isinstance(d.ref.op, VectorOp)}
        for path, delta in self.deltas.items():
            if not delta.ref.bypass:
                raise ConfigError(f"{path!r} reads its weight itself, so the output of its LoRA cannot be measured")
        self.sums, self.counts = dict.fromkeys(self.deltas, 0.0), dict.fromkeys(self.deltas, 0.0)
        #: (B, T), True where a position counts
        self.mask: Tensor | None = None

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(model)

    def expect(self, batch: Any) -> None:
        self.mask = attention_mask_of(batch)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Measures while the body runs the model, in evaluation mode and with the adapter active."""
        active = self.adapters.plan.active
        training = [m for m in self.adapters.root.modules() if m.training]
        self.adapters.root.eval()
        self.adapters.activate([*active, *([] if self.name in active else [self.name])])
        handles = [
            delta.host.register_forward_hook(self._hook(path, delta), with_kwargs=True)
            for path, delta in self.deltas.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.adapters.activate(active)
            for module in training:
                module.training = True

    def _hook(self, path: str, delta: Delta) -> Any:
        def hook(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> None:
            x = first_tensor(args, kwargs)
            y = output[0] if isinstance(output, tuple) else output
            change = delta.update(x, y) if isinstance(delta, LowRank) else delta.apart(x)
            assert change is not None
            vector = delta.ref.op.align(change.new_empty(delta.ref.full_shape[-2]), change)
            size = change.double().square().sum(change.ndim - vector.ndim)  # the output's axis summed away
            counted = self._counted(size)
            self.sums[path] += float((size * counted).sum())
            self.counts[path] += float(counted.sum())

        return hook

    def _counted(self, size: Tensor) -> Tensor:
        mask = self.mask
        if mask is not None and size.numel() == mask.numel() and size.ndim <= 2:  # (B, T), or (B · T,) in experts
            return mask.to(size.device).view(size.shape)
        return torch.ones_like(size)

    def finish(self) -> Importance:
        """The means, normalised over the layers of one kind."""
        kinds = self._kinds()
        device = next(self.adapters.root.parameters()).device
        pairs = torch.tensor([[g, self.counts[path]] for path, g in self.sums.items()], dtype=torch.float64)
        both = summed(pairs.to(device)).tolist()  # over all processes
        means = {path: g / (count or 1.0) for path, (g, count) in zip(self.sums, both, strict=True)}
        totals: dict[str, float] = {}
        for path, g in means.items():
            totals[kinds[path]] = totals.get(kinds[path], 0.0) + g
        for kind, total in totals.items():
            if not total:
                raise ConfigError(f"adapter {self.name!r} changes nothing at {kind!r} yet; train it briefly first")
        return Importance({path: g / totals[kinds[path]] for path, g in means.items()}, kinds)

    def _kinds(self) -> dict[str, str]:
        shapes: dict[str, list[torch.Size]] = {}
        kinds: dict[str, str] = {}
        for path, delta in self.deltas.items():
            name = _own_name(path)
            known = shapes.setdefault(name, [])
            if delta.ref.raw_shape not in known:
                known.append(delta.ref.raw_shape)
            number = known.index(delta.ref.raw_shape)
            kinds[path] = f"{name}_{number + 1}" if number else name
        return kinds


def _own_name(path: str) -> str:
    """The last part of a path, with what is before a mere number: `to_out.0` -> `to_out_0`."""
    parts = path.split(".")
    start = next((i for i in range(len(parts) - 1, -1, -1) if not parts[i].isdigit()), 0)
    name = "_".join(parts[start:])
    return f"layer_{name}" if name[:1].isdigit() else name
