"""S4: Parameter-Efficient Fine-Tuning Design Spaces (arXiv 2301.01821).

    layers of each stack in four groups, a spindle: few in the first and last, more in the middle (12: 2, 4, 4, 2)
    every layer trains the same number of parameters
    G1: adapter, LoRA   G2: adapter, prefix   G3: adapter, prefix, BitFit   G4: prefix, BitFit, LoRA

adapter: a bottleneck at the FFN's output, U zero at the start; LoRA: on query and value, s = 1; prefix: keys and values
in front of the self-attention; BitFit: the layer's biases. Within a layer the budget, less the biases, is divided
evenly; units, rank and length are then the whole numbers that come nearest to it. A layer without biases trains the
rest of its methods. The prefix takes no position, so tokens keep theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltatune.config import StructuredConfig, register
from deltatune.core.copies import ValueDelta
from deltatune.core.edits import Edit, KVEdit
from deltatune.core.ops import VectorOp
from deltatune.core.prompts import Stack, find_stacks
from deltatune.core.sites import Site, base_modules, base_parameters, bias_sites, is_linear
from deltatune.core.structure import attention_layers, out_in
from deltatune.core.sublayers import FEEDFORWARD, SubLayer, find_sublayers
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, hint
from deltatune.inits import Start
from deltatune.methods._bottleneck import AfterOutput, initial
from deltatune.methods._prompts import Attention, attentions
from deltatune.methods.bottleneck import BottleneckConfig
from deltatune.methods.lora import LoraDelta
from deltatune.methods.prefix_tuning import bias_source

ADAPTER, LORA, PREFIX, BITFIT = "adapter", "lora", "prefix", "bitfit"
METHODS = (ADAPTER, LORA, PREFIX, BITFIT)
GROUPS = [[ADAPTER, LORA], [ADAPTER, PREFIX], [ADAPTER, PREFIX, BITFIT], [PREFIX, BITFIT, LORA]]
#: how far a layer's count may be from the budget
TOLERANCE = 0.02


class LayerPrefix(KVEdit):
    """Trained keys and values of one layer, `(P, 2 · heads · d)`."""

    def __init__(self, length: int, place: Attention, source: nn.Module | None) -> None:
        super().__init__()
        self.heads, self.d, self.bias_source = place.heads, place.d, source
        self.table = self.tensor("s4_prefix", 0.02 * torch.randn(length, 2 * place.heads * place.d), leaf=None)

    def pairs(self) -> tuple[Tensor, Tensor] | None:
        flat = self.table.weight
        keys, values = flat.view(len(flat), 2, self.heads, self.d).permute(1, 2, 0, 3)
        return keys, values


@dataclass
class Layer:
    """What one layer can train, and does.

    Attributes:
        number: in its stack. group: 0 to 3. methods: those of its group. sizes: method -> units, rank, length; the
            number of values for biases. fixed, each: method -> numbers it trains at all, and per unit.
    """

    path: str
    number: int
    group: int
    methods: list[str]
    ffn: SubLayer
    attention: Attention | None
    queries: list[str]
    biases: list[Site]
    sizes: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    each: dict[str, int] = field(default_factory=dict)

    def count(self, method: str) -> int:
        """Numbers that a method trains here."""
        return self.fixed.get(method, 0) + self.each.get(method, 0) * self.sizes.get(method, 0)

    @property
    def total(self) -> int:
        return sum(self.count(m) for m in self.methods)


def spindle(layers: int) -> list[int]:
    """Sizes of the four groups.

    Raises:
        ConfigError: fewer than four layers.
    """
    if layers < 4:
        raise ConfigError(f"S4 divides a stack into four groups, and this one has {layers} layers; give groups")
    outer = max(1, round(layers / 6))
    middle = layers - 2 * outer
    return [outer, middle - middle // 2, middle // 2, outer]


@register
@dataclass
class S4Config(StructuredConfig):
    """S4's configuration; places are found from the model's structure.

    Args:
        budget: numbers that each layer trains; half a percent of the model over all layers if None.
        groups: how many layers are in each group; the spindle if None.
        methods: for each group, some of `"adapter"`, `"lora"`, `"prefix"`, `"bitfit"`; the paper's for T5 if None.

    Raises:
        ConfigError: groups that are not the layers, or a budget that whole units cannot meet within 2 %.
    """

    budget: int | None = None
    groups: list[int] | None = None
    methods: list[list[str]] | None = None
    _made: dict[tuple[str, str], Layer] = field(default_factory=dict, init=False, repr=False, compare=False)
    _stacks: list[Stack] = field(default_factory=list, init=False, repr=False, compare=False)

    method: ClassVar[str] = "S4"
    usage: ClassVar[str] = """
        from deltatune import S4Config, get_peft_model

        layers = base.config.num_hidden_layers  # from 4 layers on, groups may be left out
        methods = [["adapter", "lora"], ["lora", "bitfit"]]
        config = S4Config(task_type="CAUSAL_LM", groups=[layers - 1, 1], methods=methods)
        model = get_peft_model(base, config)
    """
    summary: ClassVar[str] = "adapters, LoRA, prefixes and biases, by groups of layers with equal budgets"
    paper: ClassVar[str] = "arXiv 2301.01821"
    starts_as_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules or self.exclude_modules or self.layers_to_transform is not None:
            raise ConfigError("S4 finds its places by layers; leave target_modules and the like out, and give groups")
        for name in (m for group in self.methods or () for m in group):
            if name not in METHODS:
                raise ConfigError(
                    f"methods names {name!r}, which is not one of {', '.join(METHODS)}{hint(name, METHODS)}"
                )
        if self.groups is not None and not isinstance(self.groups, list | tuple):
            raise ConfigError(f"groups is how many layers each group has, as [2, 4, 4, 2], not {self.groups!r}")
        if self.groups and len(self.groups) != len(self.methods or GROUPS):
            raise ConfigError(
                f"groups has {len(self.groups)} numbers for {len(self.methods or GROUPS)} lists of methods"
            )
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"budget must be 1 or more, not {self.budget}")

    # ------------------------------------------------------------------ the plan
    def layers(self, model: nn.Module) -> list[Layer]:
        """Every layer with its group, its methods and how large they are."""
        parts: dict[str, list[SubLayer]] = {}
        named = self.named(model)
        for sub in find_sublayers(model, named):
            parts.setdefault(sub.block.path, []).append(sub)
        stacks: dict[str | None, list[str]] = {}
        for path, subs in parts.items():
            stacks.setdefault(subs[0].block.stack, []).append(path)
        budget = self.budget or sum(p.numel() for _, p in base_parameters(model)) // (200 * len(parts))
        methods = self.methods or GROUPS
        with_prefix = any(PREFIX in group for group in methods)
        places = attentions(model, find_stacks(model)) if with_prefix else []
        queries = attention_layers(model, ("q", "v"), named) if any(LORA in group for group in methods) else []
        found = []
        for paths in stacks.values():
            sizes = self.groups or (spindle(len(paths)) if len(methods) == 4 else [])
            if sum(sizes) != len(paths) or len(sizes) != len(methods):
                raise ConfigError(f"groups {sizes} make {sum(sizes)} layers, and a stack of the model has {len(paths)}")
            numbers = [g for g, n in enumerate(sizes) for _ in range(n)]
            for i, (path, group) in enumerate(zip(paths, numbers, strict=True)):
                found.append(self._layer(model, path, i, group, list(methods[group]), parts[path], places, queries))
        for layer in found:
            share(layer, budget)
        return found

    def _layer(
        self, model: nn.Module, path: str, number: int, group: int, methods: list[str], subs: Sequence[SubLayer],
        places: Sequence[Attention], queries: Sequence[str],
    ) -> Layer:  # fmt: skip
        inside = {p: m for p, m in base_modules(model) if p.startswith(f"{path}.")}
        ffn = next(s for s in subs if s.kind == FEEDFORWARD)
        own = next((s for s in subs if s.kind != FEEDFORWARD), None)
        attention = next((a for a in places if a.path.startswith(f"{path}.") and a.kind != "cross"), None)
        queries = [p for p in queries if own and f"{p}.".startswith(f"{own.reads}.") and is_linear(inside[p])]
        biases = bias_sites(model, list(inside)) if BITFIT in methods else []
        layer = Layer(path, number, group, methods, ffn, attention, queries, biases)
        if ADAPTER in methods:
            layer.fixed[ADAPTER], layer.each[ADAPTER] = ffn.size, 2 * ffn.size + 1
        if LORA in methods:
            layer.each[LORA] = sum(sum(out_in(inside[p])) for p in queries)
        if PREFIX in methods:
            layer.each[PREFIX] = 2 * attention.heads * attention.d if attention is not None else 0
        if BITFIT in methods:
            layer.fixed[BITFIT] = sum(
                model.get_submodule(s.path).get_parameter(str(s.parameter)).numel() for s in biases
            )
        missing = next((m for m, n in layer.each.items() if not n), None)
        if missing is not None:
            raise ConfigError(f"{path!r} has no place for {missing!r}; leave it out of its group in methods")
        return layer

    # ------------------------------------------------------------------ edits
    def sites(self, model: nn.Module) -> list[Site]:
        found: list[Site] = []
        self._made = {}
        for layer in self.layers(model):
            here: list[Site] = []
            if ADAPTER in layer.methods:
                here.append(Site(layer.ffn.output, None, pattern=ADAPTER))
            if LORA in layer.methods:
                here += [Site(p, pattern=LORA) for p in layer.queries]
            if PREFIX in layer.methods and layer.attention is not None:
                here.append(Site(layer.attention.path, None, pattern=PREFIX))
            here += [replace(s, tag=s.tag or "bias", pattern=BITFIT) for s in layer.biases]
            self._made |= {(s.path, s.pattern): layer for s in here}
            found += here
        self._stacks = find_stacks(model) if any(s.pattern == PREFIX for s in found) else []
        return found

    def build(self, ref: WeightRef, site: Site) -> Edit | Sequence[Edit]:
        if isinstance(ref.op, VectorOp):
            return ValueDelta(ref)
        r = self._made[site.path, LORA].sizes[LORA]
        out, inp = ref.shape[-2:]
        return LoraDelta(ref, r, 1.0, 0.0, Start(initial("mam_adapter", r, inp, False), torch.zeros(out, r)))

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        layer = self._made[site.path, site.pattern]
        if site.pattern == ADAPTER:
            return AfterOutput(BottleneckConfig(init_weights="mam_adapter"), layer.ffn.size, layer.sizes[ADAPTER])
        assert layer.attention is not None
        return LayerPrefix(layer.sizes[PREFIX], layer.attention, bias_source(self._stacks, layer.attention))


def share(layer: Layer, budget: int) -> None:
    """Sets the sizes of a layer's methods so that they train `budget` numbers together, each about as many.

    Raises:
        ConfigError: whole units cannot meet the budget within 2 %.
    """
    names = [m for m in layer.methods if m in layer.each]
    rest = budget - sum(layer.fixed.get(m, 0) for m in layer.methods)
    if not names:
        return
    best: tuple[int, int, Mapping[str, int]] | None = None
    for sizes in _near(names, layer.each, rest):
        counts = [layer.each[m] * n for m, n in sizes.items()]
        rank = (abs(rest - sum(counts)), max(counts) - min(counts))
        if best is None or rank < best[:2]:
            best = (*rank, sizes)
    if best is None or best[0] > TOLERANCE * budget:
        least = sum(layer.fixed.get(m, 0) for m in layer.methods) + sum(layer.each[m] for m in names)
        raise ConfigError(
            f"budget={budget} cannot be met within 2 % by {', '.join(layer.methods)} in {layer.path!r}, which train "
            f"{least} numbers at least, in steps of {min(layer.each[m] for m in names)}; raise it"
        )
    layer.sizes.update(best[2])


def _near(names: Sequence[str], each: Mapping[str, int], rest: int) -> Iterator[dict[str, int]]:
    """Sizes that share `rest` about evenly: all but the last within a quarter of the even share."""
    even = rest / len(names)
    ranges = []
    for m in names[:-1]:
        middle = even / each[m]
        ranges.append(range(max(1, int(0.75 * middle)), max(1, int(1.25 * middle)) + 2))
    last = names[-1]
    for first in itertools.product(*ranges):
        left = rest - sum(each[m] * n for m, n in zip(names[:-1], first, strict=True))
        yield {**dict(zip(names[:-1], first, strict=True)), last: max(1, round(left / each[last]))}
