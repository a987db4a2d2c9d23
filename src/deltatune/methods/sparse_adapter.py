"""SparseAdapter: pruning bottleneck adapters at initialisation (arXiv 2210.04284).

    every weight of D and U of every adapter gets a score; the best `keep` of all of them together train, the rest are
    zero for good

    random     a random number            magnitude   |w|
    snip       |g · w|, g the gradient summed over some batches
    grasp      w · H g, from the gradient of ⟨g, ∇L⟩ with g held (arXiv 2002.07376)
    synflow    |w · ∂R/∂w|, R the mean output of the adapter with |w| for every weight and an input of ones

Kept weights are saved, and held by the optimiser, as positions and values; biases are not pruned. A wider adapter
(`reduction_factor`) with fewer kept weights is the paper's Large-Sparse. `snip` and `grasp` look at data:

    config = SparseAdapterConfig(score="snip")
    prepare_init(model, config, batches)               # not for the other scores
    model = get_peft_model(model, config)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltatune.config import register
from deltatune.core.adapters import AdapterSet, adapters_of
from deltatune.core.edits import Edit, Slot
from deltatune.core.sites import Site
from deltatune.core.sparse import SparseLinear, dense, largest
from deltatune.errors import ConfigError, hint
from deltatune.inits.data import COLLECTORS, Collector
from deltatune.methods._bottleneck import Bottleneck, activation, initial
from deltatune.methods._sparse import share_of
from deltatune.methods.bottleneck import WHOLE, BottleneckConfig, reads_size

SCORES = ("random", "magnitude", "snip", "grasp", "synflow")
#: those that look at data
OF_DATA = ("snip", "grasp")
DOWN, UP = "bottleneck_down", "bottleneck_up"
#: name of the adapter that these look at and take away again
PROBE = "sparse_probe"


class Sparse:
    """An affine map `(…, in) -> (…, out)` of which `n` weights are kept: `<name>_values`, `<name>_indices`."""

    def __init__(self, edit: Edit, name: str, out: int, inp: int, indices: Tensor, values: Tensor) -> None:
        self.shape = (out, inp)
        self.values: Slot | None = None
        self.indices: Slot | None = None
        if len(indices):
            self.values = edit.tensor(f"{name}_values", values, leaf=None)
            self.indices = edit.tensor(f"{name}_indices", indices.to(torch.int32), leaf=None, buffer=True)
        self.bias = edit.tensor(name, torch.zeros(out), leaf="bias")

    def __call__(self, x: Tensor) -> Tensor:
        bias = self.bias.weight
        if self.values is None or self.indices is None:  # all of it was pruned
            return bias.expand(*x.shape[:-1], -1)
        values, flat = self.values.weight, self.indices.weight.long()
        if torch.compiler.is_compiling():
            return F.linear(x, dense(values, flat, self.shape), bias)
        product: Tensor = SparseLinear.apply(x, values, flat, self.shape)  # type: ignore[no-untyped-call]
        return product + bias


@register
@dataclass
class SparseAdapterConfig(BottleneckConfig):
    """SparseAdapter's configuration, with the fields of `BottleneckConfig` for the adapter that is pruned.

    Args:
        keep: the share of the weights that is kept. score: what ranks them.
        kept: `<module>.bottleneck_down` or `_up` -> how many weights are kept there; filled in, and files have it.

    Raises:
        ConfigError: a value is out of range, or a score that cannot rank weights which start at zero.
    """

    keep: float = 0.4
    score: str = "snip"
    kept: dict[str, int] = field(default_factory=dict)
    #: what was chosen: name of a map -> (flat positions, values)
    prepared: dict[str, tuple[Tensor, Tensor]] | None = field(default=None, init=False, repr=False, compare=False)

    method: ClassVar[str] = "SPARSE_ADAPTER"
    usage: ClassVar[str] = """
        import torch

        from deltatune import SparseAdapterConfig, get_peft_model, prepare_init

        ids = torch.arange(2, 34).view(4, 8)  # a few batches of your own data
        batches = [{"input_ids": ids, "labels": ids}]
        config = SparseAdapterConfig(task_type="CAUSAL_LM", reduction_factor=16)
        prepare_init(base, config, batches)
        model = get_peft_model(base, config)
    """
    summary: ClassVar[str] = "bottleneck adapters, pruned before they train"
    paper: ClassVar[str] = "arXiv 2210.04284"
    variants: ClassVar[dict[str, dict[str, Any]]] = {"synflow": {"score": "synflow"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        share_of(1, self.keep, "keep")
        if self.score not in SCORES:
            raise ConfigError(f"score {self.score!r} is not one of {', '.join(SCORES)}{hint(str(self.score), SCORES)}")
        if self.init_weights == "mam_adapter" and self.score != "random":
            raise ConfigError(
                f"init_weights='mam_adapter' starts U at zero, so score={self.score!r} would rank zeros; use \"bert\" "
                'or score="random"'
            )

    @classmethod
    def example(cls, **fields: Any) -> SparseAdapterConfig:
        return cls(**{"reduction_factor": 4, "score": "magnitude", **fields})

    @property
    def settled(self) -> bool:
        """The weights are chosen, or can be without data."""
        return bool(self.kept) or self.score not in OF_DATA

    def prepare(self, model: nn.Module) -> Callable[[], None] | None:
        if not self.kept:
            if not self.settled:
                raise ConfigError(
                    f"score={self.score!r} looks at data: call prepare_init(model, config, batches) before the adapter "
                    "is attached"
                )
            self._choose_alone(model)
        return None

    def _choose_alone(self, model: nn.Module) -> None:
        """Ranks the weights that the adapters start with, without data."""
        weights: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        for site in self.sites(model):
            kind, sub, number = self._places.get(site.path, ("", None, 0))
            if not kind or sub is None or site.parameter is not None:
                continue
            read = reads_size(model.get_submodule(site.path), sub) if kind == WHOLE else sub.size
            m = self.units(sub.size, number, site.path)
            down = initial(self.init_weights, m, read, False)
            up = initial(self.init_weights, sub.size, m, True)
            weights |= {f"{site.path}.{DOWN}": down, f"{site.path}.{UP}": up}
            of_down, of_up = self._scores(down, up)
            scores |= {f"{site.path}.{DOWN}": of_down, f"{site.path}.{UP}": of_up}
        self.choose(scores, weights)

    def _scores(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        if self.score == "random":
            return torch.rand_like(down), torch.rand_like(up)
        if self.score == "magnitude":
            return down.abs(), up.abs()
        with torch.enable_grad():
            d, u = down.abs().requires_grad_(), up.abs().requires_grad_()
            flow = F.linear(activation(self.non_linearity)(F.linear(torch.ones(d.shape[1]), d)), u).mean()
            of_d, of_u = torch.autograd.grad(flow, (d, u))
        return (d.detach() * of_d).abs(), (u.detach() * of_u).abs()

    def choose(self, scores: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Settles on the weights with the largest scores over all maps together."""
        total = sum(w.numel() for w in weights.values())
        found = largest(scores, max(1, round(self.keep * total)))
        self.prepared = {name: (index, weights[name].flatten()[index].clone()) for name, index in found.items()}
        self.kept = {name: len(index) for name, index in found.items()}

    def build_module(self, module: nn.Module, site: Site) -> Edit | Sequence[Edit]:
        self.__dict__["_at"] = site.path
        return super().build_module(module, site)

    def maps(self, edit: Edit, read: int, m: int, size: int) -> tuple[Any, Any]:
        return self._map(edit, DOWN, m, read), self._map(edit, UP, size, m)

    def _map(self, edit: Edit, name: str, out: int, inp: int) -> Sparse:
        key = f"{self.__dict__['_at']}.{name}"
        if key not in self.kept:
            raise ConfigError(
                f"kept says nothing about {key!r}{hint(key, self.kept)}; the weights were chosen elsewhere"
            )
        n = self.kept[key]
        if not 0 <= n <= out * inp:
            raise ConfigError(f"kept[{key!r}]={n}, and there are {out * inp} weights")
        start = (self.prepared or {}).get(key)
        index, values = start if start is not None else (torch.arange(n), torch.zeros(n))  # a file fills them in
        return Sparse(edit, name, out, inp, index.clone(), values.clone())


class DataCollector(Collector):
    """Sums the gradients of the adapters as they start, over all batches; for `grasp` H g in a second run of them."""

    backward = True

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)
        if config.score not in OF_DATA:
            raise ConfigError(f"score={config.score!r} needs no data; attach the adapter as it is")
        self.passes = 2 if config.score == "grasp" else 1
        self.found: Any = None
        #: D and U of the probe, and in the second run what g was
        self.params: list[Tensor] = []
        self.g: list[Tensor] = []

    @property
    def title(self) -> str:
        return f"SparseAdapter's {self.config.score}"

    def again(self) -> None:
        self.g = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        for p in self.params:
            p.grad = None

    def differentiate(self, loss: Tensor) -> None:
        if self.g:
            grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
            pairs = zip(self.g, grads, strict=True)
            loss = torch.stack([(g * now).sum() for g, now in pairs if now is not None]).sum()
        super().differentiate(loss)

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[nn.Module]:
        """The base with the dense adapter at its start; both are as before afterwards."""
        own = adapters_of(self.root)
        adapters = own or AdapterSet(self.root)
        names = {f.name for f in dataclasses.fields(BottleneckConfig) if f.init} - {"peft_type", "task_type"}
        probe = BottleneckConfig(**{n: getattr(self.config, n) for n in names})
        probe.modules_to_save = None
        before = [(p, p.requires_grad, p.grad) for p in self.root.parameters()]
        active = adapters.plan.active
        for p, _, _ in before:
            p.requires_grad_(False)
        adapters.add(probe, PROBE)
        adapters.activate(PROBE)
        blocks = [e for e in adapters.edits[PROBE] if isinstance(e, Bottleneck)]
        self.params = [part.weight.weight for e in blocks for part in (e.down, e.up)]
        twice = sdpa_kernel(SDPBackend.MATH) if self.passes > 1 else contextlib.nullcontext()  # others go back once
        try:
            with twice:
                yield self.root
            self._look(adapters)
        finally:
            if own is None:
                adapters.remove_all()
            else:
                adapters.delete(PROBE)
                adapters.activate(active)
            for p, grad, value in before:
                p.requires_grad_(grad)
                p.grad = value

    def _look(self, adapters: AdapterSet) -> None:
        weights, scores = {}, {}
        for edit in adapters.edits[PROBE]:
            if isinstance(edit, Bottleneck):
                for name, part in ((DOWN, edit.down), (UP, edit.up)):
                    w: Any = part.weight.weight
                    key = f"{edit.host.path}.{name}"
                    weights[key] = w.detach().cpu().clone()
                    score = torch.zeros_like(w) if w.grad is None else w * w.grad
                    scores[key] = (score if self.g else score.abs()).detach().cpu()
        self.found = scores, weights

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        yield

    def finish(self) -> dict[str, tuple[Tensor, Tensor]]:
        scores, weights = self.found
        self.config.choose(scores, weights)
        chosen: dict[str, tuple[Tensor, Tensor]] = self.config.prepared
        return chosen


COLLECTORS[SparseAdapterConfig.method] = DataCollector
