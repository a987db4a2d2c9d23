"""IA³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning (arXiv 2205.05638).

    keys, values:              y = l ∘ (W x + b)            l: (out)
    the feed-forward's output: y = W (l ∘ x) + b            l: (in)

One vector of gains per layer, at ones in the beginning. Merged: diag(l) W and l ∘ b, or W diag(l). Adapters combine as
ΔW do: l = 1 + Σ w_i (l_i - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import StructuredConfig, register
from deltatune.core.adapters import AdapterSet
from deltatune.core.edits import Delta, Edit, Slot
from deltatune.core.named import Named
from deltatune.core.ops import ConvOp
from deltatune.core.sites import Site, parameter_sites, select, short_names
from deltatune.core.structure import attention_layers, chosen_sites, feedforward_outputs, find_blocks, fused_experts
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError

NAME = "ia3_l"


class OutputGain(Delta):
    """`y = l ∘ (W x + b)`: the rows of W; `BiasGain` is the same for b.

    Args:
        ref: the weight, `(*batch, out, in)`. ones: start at ones; otherwise at random.
    """

    reads_output = True

    def __init__(self, ref: WeightRef, ones: bool) -> None:
        super().__init__(ref)
        self.l = self.tensor(NAME, _start(ref, ref.shape[-2], (-1, 1), ones), leaf=None)

    def gain(self) -> Tensor:
        """l, `(out,)`."""
        return self.l.weight.flatten()

    def merged(self, w: Tensor) -> Tensor:
        return w * self.gain().to(w.dtype).unsqueeze(-1)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return y * self.ref.align((self.gain() - 1).to(y.dtype), y)


class BiasGain(Delta):
    """The bias of a layer whose output has gains. Its share of `y` is in that edit's update already."""

    reads_output = True

    def __init__(self, ref: WeightRef, weight: OutputGain) -> None:
        super().__init__(ref)
        self.weight = weight

    def merged(self, w: Tensor) -> Tensor:
        return w * self.weight.gain().to(w.dtype).unsqueeze(-1)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return None


class InputGain(Delta):
    """`y = W (l ∘ x) + b`: the columns of W."""

    moves_input = True

    def __init__(self, ref: WeightRef, ones: bool) -> None:
        super().__init__(ref)
        experts = ref.shape[:-2].numel()
        value = _start(ref, experts * ref.op.inputs(ref.module, ref.shape), (experts, -1), ones)
        self.l = self.tensor(NAME, value, leaf=None)

    def gain(self) -> Tensor:
        """l, `(in,)`, or `(experts, 1, in)`."""
        return self.l.weight.unsqueeze(-2) if len(self.ref.shape) > 2 else self.l.weight.flatten()

    def merged(self, w: Tensor) -> Tensor:
        return w * self.ref.op.columns(self.ref.module, self.gain().to(w.dtype))

    def moved(self, x: Tensor) -> Tensor:
        return x * self.ref.op.align_input((self.gain() - 1).to(x.dtype), x)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.ref.apply(self.moved(x), self.ref.load_as(x.dtype))


def _gains(adapters: AdapterSet, name: str) -> list[Slot]:
    return [slot for delta in adapters.deltas(name) for slot in delta.slots]


def _places(adapters: AdapterSet, name: str) -> tuple[str, ...]:
    """Where an adapter has gains, and of which kind."""
    return tuple(f"{slot.key} {tuple(slot.weight.shape)}" for slot in _gains(adapters, name))


def _start(ref: WeightRef, n: int, shape: tuple[int, int], ones: bool) -> Tensor:
    """l in the shape that peft's files have: a column or a row, along the channels of a convolution."""
    value = torch.ones(n, device=ref.device) if ones else torch.randn(n, device=ref.device)
    return value.view(1, n, *[1] * (len(ref.raw_shape) - 2)) if isinstance(ref.op, ConvOp) else value.view(shape)


@register
@dataclass
class IA3Config(StructuredConfig):
    """IA³'s configuration, with peft's field names and defaults.

    Args:
        target_modules: as everywhere; None finds keys, values (or the fused projection) and the feed-forward's output
            from the structure, that of fused experts too.
        target_parameters: fused `(experts, out, in)` weights, every input of which gets a gain per expert. The weights
            of all experts are formed at every call.
        feedforward_modules: those of the targets whose input is scaled, and not their output: name endings or a
            regular expression; None with given targets means none.
        fan_in_fan_out: accepted for peft's sake; the storage order is read from the layer itself.
        init_ia3_weights: gains start at ones; False: at random (the model does not start as the base; for tests).

    Raises:
        ConfigError: `feedforward_modules` names what is no target.
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True
    target_parameters: list[str] | None = None
    #: keys of the sites whose input is scaled, found by `sites`
    inputs: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    method: ClassVar[str] = "IA3"
    summary: ClassVar[str] = "gains on keys, values and the feed-forward's hidden units"
    ours: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern", "target_parameters", "roles")
    paper: ClassVar[str] = "arXiv 2205.05638"
    variants: ClassVar[dict[str, dict[str, Any]]] = {"feedforward": {"feedforward_modules": ["layer"]}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        if self.feedforward_modules and not self.target_modules:
            raise ConfigError("feedforward_modules names some of target_modules, so target_modules must be given too")

    def sites(self, model: nn.Module) -> list[Site]:
        named = self.named(model)
        if self.target_modules is None:
            sites, inputs, parameters = self._found(model, named)
        else:
            sites, parameters = super().sites(model), self.target_parameters or []
            wanted = self.feedforward_modules or []
            found = select(wanted, [site.name for site in sites], "feedforward_modules") if wanted else {}
            inputs = {path for hits in found.values() for path in hits}
        experts = parameter_sites(model, parameters)
        self.inputs = {s.key for s in sites if s.name in inputs} | {s.key for s in experts}
        return sites + experts

    def _found(self, model: nn.Module, named: Named) -> tuple[list[Site], set[str], list[str]]:
        """(sites, paths of those whose input is scaled, fused experts) of the structure."""
        blocks = find_blocks(model, named)
        outputs = [path for block in blocks for path in feedforward_outputs(model, block, named)]
        sites = chosen_sites(model, self, [*attention_layers(model, ("k", "v"), named), *outputs])
        fused = self.target_parameters
        if fused is None:
            fused = [name for block in blocks for name in fused_experts(model, block)]
        return sites, set(outputs), fused

    def written(self, model: nn.Module) -> dict[str, Any]:
        values = super().written(model)
        if self.target_modules is None:
            sites, inputs, parameters = self._found(model, self.named(model))
            names = [s.name for s in sites if s.name in inputs]
            values["feedforward_modules"] = set(short_names(model, names).values())
            values["target_parameters"] = parameters or None
        return values

    def add_weighted(self, adapters: AdapterSet, names: Sequence[str], weights: Sequence[float], name: str) -> bool:
        configs = [adapters.configs[n] for n in names]
        if not all(isinstance(c, IA3Config) for c in configs) or len({_places(adapters, n) for n in names}) > 1:
            return False
        adapters.add(replace(self, inference_mode=True), name)
        with torch.no_grad():
            for slots in zip(*(_gains(adapters, n) for n in (*names, name)), strict=True):
                change = sum(w * (slot.weight - 1) for w, slot in zip(weights, slots, strict=False))
                slots[-1].weight.copy_(1 + change)
        return True

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        if site.key in self.inputs:
            if ref.op.looks_up:
                raise ConfigError(
                    f"{site.name!r} is an embedding, whose inputs are token ids that nothing can scale; leave it out "
                    "of feedforward_modules"
                )
            return InputGain(ref, self.init_ia3_weights)
        weight = OutputGain(ref, self.init_ia3_weights)
        name = ref.name.removesuffix("weight") + "bias"
        if not isinstance(getattr(ref.owner, name.rpartition(".")[2], None), Tensor):
            return weight
        bias = WeightRef(ref.module, name)
        bias.bypass = ref.bypass  # whatever layer it is, the weight's update holds the bias's too
        return [weight, BiasGain(bias, weight)]
