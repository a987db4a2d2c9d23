"""A few batches first: the one way in which inits and methods learn from data before the adapter is attached.

    config = LoraConfig(init_lora_weights="lora_ga", ...)      # or "eva", "corda"; or FishMaskConfig(...)
    prepare_init(model, config, batches)
    model = get_peft_model(model, config)

`prepare_init` watches the base (inputs of the adapted weights, or their gradients), computes what the adapter starts
with (pairs of factors, masks) and leaves it in `config.prepared`; nothing in the model changes. Whatever learns so is a
`Collector` registered in `COLLECTORS`, under the name of an init or of a method; peft's own names for these steps are
functions beside each.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.core.adapters import LOW_PRECISION, AdapterSet, adapters_of
from deltatune.core.copies import ModuleCopy
from deltatune.core.edits import Slot
from deltatune.core.ops import VectorOp
from deltatune.core.sharded import whole
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError, hint
from deltatune.inits import Request, Start, find_init
from deltatune.inits._watch import Spot
from deltatune.progress import track

Forward = Callable[[nn.Module, Any], Any]


def spots_of(model: nn.Module, config: Any) -> list[Spot]:
    """The weights that `config` would give pairs to, as `get_peft_model` would find them.

    Raises:
        ConfigError: the configuration changes the model's layers first. TargetError: as there.
    """
    if getattr(config, "layer_replication", None):
        raise ConfigError("an init that starts from data cannot see layers that layer_replication has yet to make")
    root, adapters = base_of(model)
    spots = []
    for site in config.sites(root):
        if site.parameter is None:
            continue
        ref = WeightRef(root.get_submodule(site.path), site.parameter, site.rows)
        if adapters is not None:
            ref.original = adapters.merged.originals.get((id(ref.owner), ref.leaf))
        if not isinstance(ref.op, VectorOp):
            spots.append(Spot(site.key, site.name, ref, *config.pair(site.name)))
    return spots


def base_of(model: nn.Module) -> tuple[nn.Module, AdapterSet | None]:
    """(the base, the adapters attached to it) of a base model or of a PeftModel."""
    adapters: AdapterSet | None = adapters_of(model) or getattr(model, "adapters", None)
    return (model, None) if adapters is None else (adapters.root, adapters)


@contextlib.contextmanager
def as_base(model: nn.Module) -> Iterator[nn.Module]:
    """Runs the body with the plain base, whatever adapters it has."""
    root, adapters = base_of(model)
    with adapters.disabled() if adapters is not None else contextlib.nullcontext():
        yield root


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[nn.Module]:
    """As `as_base`, and without dropout."""
    root, _ = base_of(model)
    training = [m for m in root.modules() if m.training]
    root.eval()
    try:
        with as_base(model) as base:
            yield base
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------------- the one way
class Collector(abc.ABC):
    """Learns from a model's runs what an adapter starts as.

    Args:
        model: the base, or a PeftModel. config: the method's configuration.

    Attributes:
        root: the base.
    """

    #: whether runs go backward too
    backward = False
    #: how often the batches are run through; `again` is called between two times
    passes = 1

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.root, self.config = base_of(model)[0], config

    @property
    def title(self) -> str:
        """What learns, for messages and progress bars."""
        return f"init {self.config.init_name!r}"

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """What runs: the plain base, unless a method looks at its own adapter."""
        return as_base(model)

    @abc.abstractmethod
    def watch(self) -> contextlib.AbstractContextManager[Any]:
        """Observes the model while the body runs it."""

    def again(self) -> None:  # noqa: B027  (most look once)
        """All batches have been run, and come again."""

    def differentiate(self, loss: Tensor) -> None:
        """Goes backward from one loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def on_file(self) -> dict[str, Any] | None:
        """The starts that an earlier run has left in a file that the options name; then no data is needed."""
        return None

    def expect(self, batch: Any) -> None:  # noqa: B027  (most need no masks)
        """The batch that runs next, for masks."""

    def parts(self, batch: Any) -> Iterable[Any]:
        """What is run of a batch, one after the other; all of it at once, unless single rows are asked for."""
        return (batch,)

    @property
    def satisfied(self) -> bool:
        """More batches would change nothing."""
        return False

    @abc.abstractmethod
    def finish(self) -> Any:
        """path of a weight -> what its pair (or mask) starts as; may change the configuration (ranks).

        Raises:
            ConfigError: the data were not enough.
        """


class PairCollector(Collector):
    """Learns the pairs of an init.

    Attributes:
        spots: the base's weights that get pairs.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__(model, config)
        self.spots = spots_of(model, config)


#: name of an init, or of a method -> how it learns
COLLECTORS: dict[str, type[Collector]] = {}


def prepare_init(
    model: nn.Module,
    config: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    loss: Forward | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> int:
    """Runs batches through the base for what starts from data; call it before `get_peft_model`.

    Args:
        model: the base, or a PeftModel whose base is meant.
        config: its `init_lora_weights` is "eva", "corda" or "lora_ga", or its method looks at data (FishMask); what
            was learnt is left in it.
        batches: what the model is called with, a few dozen; training data, shuffled.
        forward: (model, batch) -> anything; default `model(**batch)`, `model(*batch)` or `model(batch)`.
        loss: (model, batch) -> scalar, where gradients are needed; default the output's `loss`.
        max_batches: stop after so many.
        progress: show a bar.

    Returns:
        how many batches were used.

    Raises:
        ConfigError: nothing in it needs data, a weight cannot be watched, or there were too few batches.
    """
    collector = collector_for(model, config)
    if finish(collector, collector.on_file()):
        return 0
    step = partial(_backward, collector, loss or _own_loss) if collector.backward else (forward or call_model)
    used = run_batches(model, collector, batches, step, max_batches=max_batches, progress=progress)
    with torch.no_grad():
        finish(collector, collector.finish())
    return used


def run_batches(
    model: nn.Module,
    collector: Collector,
    batches: Iterable[Any],
    step: Forward,
    *,
    max_batches: int | None = None,
    progress: bool = True,
) -> int:
    """Runs `step(model, batch)` over batches while the collector watches; returns how many there were.

    Raises:
        ConfigError: there was none.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    used = 0
    if collector.passes > 1:
        batches = list(itertools.islice(batches, max_batches))
    with collector.running(model) as runs, collector.watch(), torch.set_grad_enabled(collector.backward):
        for time in range(collector.passes):
            if time:
                collector.again()
            used = 0
            for batch in track(batches, collector.title, show=progress, total=max_batches):
                for part in collector.parts(to_device(batch, device)):
                    collector.expect(part)
                    step(runs, part)
                used += 1
                if collector.satisfied or used == max_batches:
                    break
    if not used:
        raise ConfigError(f"{collector.title} starts from data, and there is no batch")
    return used


def collector_for(model: nn.Module, config: Any, only: str = "") -> Collector:
    """The collector of the configuration's init, which must be `only` if that is given.

    Raises:
        ConfigError: its init does not start from data, or is another one.
    """
    name = getattr(config, "init_name", "")
    if only and name != only:
        raise ConfigError(f"this needs a LoraConfig with init_lora_weights={only!r}, not {name!r}")
    kind = COLLECTORS.get(name) or COLLECTORS.get(str(config.method))
    if kind is None:
        what = f"init_lora_weights={config.init_lora_weights!r}" if name else type(config).__name__
        raise ConfigError(f"{what} needs no data; what does is {', '.join(sorted(COLLECTORS))}")
    return kind(model, config)


def finish(collector: Collector, starts: Any) -> bool:
    """Leaves the starts in the configuration; False if there are none."""
    if starts is not None:
        collector.config.prepared = starts
    return starts is not None


def prepared_start(request: Request) -> Start:
    """What `prepare_init` left for a weight.

    Raises:
        ConfigError: it has not run, or not for this weight and rank.
    """
    starts: Mapping[str, Start] | None = request.config.prepared
    if starts is None:
        raise ConfigError(
            f"init {request.init!r} starts from data: call prepare_init(model, config, batches) before the adapter "
            "is attached"
        )
    found = starts.get(request.site)
    if found is None:
        raise ConfigError(f"prepare_init has seen no {request.site!r}{hint(request.site, starts)}; run it again")
    if found.a.shape[-2] != request.r:
        raise ConfigError(
            f"prepare_init ran with r={found.a.shape[-2]} for {request.site!r}, and r is now {request.r}; run it again"
        )
    return Start(found.a.clone(), found.b.clone(), found.offset)


def reattach(adapters: AdapterSet, name: str) -> None:
    """Builds an adapter anew from its configuration, in its old place; whole copies of modules keep their numbers.

    Raises:
        ConfigError: it is merged.
    """
    adapters.check(name)
    if name in adapters.plan.merged:
        raise ConfigError(
            f"adapter {name!r} is merged into the base; call unmerge_adapter() before its start is changed"
        )
    config, active, order = adapters.configs[name], adapters.plan.active, list(adapters.configs)
    tensors = adapters.parameters(name)
    trains = any(t.requires_grad for t in tensors)
    copied = _copies(adapters, name)
    adapters.delete(name)
    adapters.add(config, name, float32=not any(t.dtype in LOW_PRECISION for t in tensors))
    with torch.no_grad():
        for key, slot in _copies(adapters, name).items():
            slot.weight.copy_(copied[key].weight)
    for table in (adapters.configs, adapters.edits):
        for other in order:  # an adapter that is added goes last
            table[other] = table.pop(other)  # type: ignore[assignment]
    adapters.set_requires_grad(name, trains)
    adapters.activate(active)


def _copies(adapters: AdapterSet, name: str) -> dict[str, Slot]:
    """The tensors of the modules that an adapter trains whole."""
    return {slot.key: slot for edit in adapters.edits[name] if isinstance(edit, ModuleCopy) for slot in edit.slots}


def check_file_name(option: str, path: str | None) -> None:
    """Files of tensors end in .safetensors.

    Raises:
        ConfigError: this one does not.
    """
    if path is not None and not os.fspath(path).endswith(".safetensors"):
        raise ConfigError(f"{option} must end in .safetensors, not {os.fspath(path)!r}")


def needs_data(config: Any) -> bool:
    """Whether a configuration starts from data that it has not seen yet."""
    name = getattr(config, "init_name", "")
    if name and find_init(name)[0].needs_data:
        return config.prepared is None
    return str(config.method) in COLLECTORS and config.prepared is None and not config.settled


# ---------------------------------------------------------------------- running
def call_model(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, `model(*batch)` or `model(batch)`, by the batch's type."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (list, tuple)) else model(batch)


def _backward(collector: Collector, loss: Forward, model: nn.Module, batch: Any) -> None:
    collector.differentiate(loss(model, batch))


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    out = call_model(model, batch)
    found = getattr(out, "loss", None)
    if found is None and isinstance(out, Tensor) and out.ndim == 0:
        found = out
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} returned no loss; put labels into the batches, or give loss=(model, batch) -> "
            "scalar"
        )
    return cast(Tensor, found)


def to_device(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch on a device, whatever they are nested in."""
    return _map_tensors(batch, lambda t: t.to(device))


def _map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: _map_tensors(v, function) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_map_tensors(v, function) for v in batch)
    return batch


def rows_of_batch(batch: Any) -> Iterator[Any]:
    """The rows of a batch as batches of one."""
    for i in range(_batch_size(batch)):
        yield _map_tensors(batch, partial(_row, i))


def _row(i: int, t: Tensor) -> Tensor:
    return t[i : i + 1] if t.ndim else t


def _batch_size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, (Mapping, list, tuple)):
        raise ConfigError(f"a batch of type {type(batch).__name__} has no rows to look at one by one")
    return max((_batch_size(v) for v in values if isinstance(v, (Tensor, Mapping, list, tuple))), default=0)


# ---------------------------------------------------------------------- several processes
def world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """A tensor summed over all processes."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def averaged(total: Tensor, calls: int) -> Tensor:
    """The mean of gradients over all processes, from each one's sum and number of them."""
    if hasattr(total, "device_mesh"):  # FSDP2 has averaged over the processes already
        return whole(total) / calls
    return summed(total) / summed(torch.tensor(float(calls), device=total.device))


def gathered(value: Any) -> list[Any]:
    """A value of every process, in their order."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
