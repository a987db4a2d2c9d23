"""All adapters attached to one model: add, choose, train, merge, save, load, delete.

An `AdapterSet` belongs to the root module it was attached to (`adapters_of(model)`); `PeftModel` is a face on it.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.config import PeftConfig, TargetedConfig
from deltatune.core import attention, merge, together
from deltatune.core.bank import Bank
from deltatune.core.combine import composable
from deltatune.core.composition import BatchSplit, Composition, Fuse, Node, beside, channels, leaves, nodes
from deltatune.core.copies import ModuleCopy
from deltatune.core.edits import AdapterTensors, Delta, Edit, KVEdit
from deltatune.core.hosts import Host, close_fused_paths, host, reopen_fused_paths, unhost
from deltatune.core.plan import BASE, Plan, RowPlan, State
from deltatune.core.rounding import Rounding, refuse_dropout
from deltatune.core.sites import Site, base_modules, saved_modules, standing
from deltatune.core.weights import WeightRef, is_computed
from deltatune.errors import AdapterNameError, ConfigError, DeltatuneError, TargetError, hint
from deltatune.stores import Packed, quantised, settle

ATTRIBUTE = "_deltatune"
#: reduced-precision bases get float32 adapters, unless the caller says otherwise
LOW_PRECISION = {torch.float16, torch.bfloat16}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Runs the body, which makes thousands of objects that stay, without the garbage collector: that would walk
    everything the process holds (0.2 s and more) to free nothing."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Modules(dict[str, nn.Module]):
    """The model's own modules by path, from one walk."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(base_modules(root))
        self.root = root

    def __missing__(self, path: str) -> nn.Module:
        return self.root.get_submodule(path)  # another name of a shared module


def adapters_of(model: nn.Module) -> AdapterSet | None:
    """The adapters attached to `model`, if any."""
    return model.__dict__.get(ATTRIBUTE)


class AdapterSet:
    """The adapters of one model.

    Attributes:
        root: the model. plan: who runs. configs: adapter name -> its configuration.
        edits: adapter name -> its edits, in the model's order.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.plan = Plan()
        self.configs: dict[str, PeftConfig] = {}
        self.edits: dict[str, list[Edit]] = {}
        self.merged = merge.Merged()
        #: what has changed the base's own weights, if anything did: there is no plain base to run then
        self.base_changed = ""
        self._undo: dict[str, Callable[[], None]] = {}
        root.__dict__[ATTRIBUTE] = self

    # ------------------------------------------------------------------ adding and deleting
    @uncollected()
    def add(self, config: PeftConfig, name: str, *, float32: bool = True, meta: bool = False) -> None:
        """Attaches an adapter. The model is untouched if anything about it is wrong.

        Args:
            float32: keep the adapter in float32 on a 16-bit base.
            meta: create its tensors without memory, to be filled by loading.

        Raises:
            TargetError, ConfigError, AdapterNameError: one sentence each.
        """
        self.check_new_name(name)
        if not isinstance(config, TargetedConfig):
            raise ConfigError(f"{type(config).__name__} gives no edits; a method's configuration is needed")
        if self.plan.rounding is not None:
            refuse_dropout(config)
        undo = config.prepare(self.root)
        with standing(self.root):
            modules = Modules(self.root)
            try:
                with self.merged.base_in_place(), torch.device("meta") if meta else contextlib.nullcontext():
                    bank, made = self.build(config, modules)
                if not any(edits for _, edits in made):
                    raise ConfigError(f"{type(config).__name__} changes nothing in this model")
            except DeltatuneError:
                if undo is not None:
                    undo()
                raise
        if undo is not None:
            self._undo[name] = undo
        self.configs[name], self.edits[name] = config, []
        new = [module for site, _ in made if not isinstance(module := modules[site.path], Host)]
        if bank is not None:
            self._attach_bank(name, bank, float32)
        for site, edits in made:
            self._attach(name, site, edits, float32, modules)
        together.find([modules[p] for p in dict.fromkeys(s.path.rpartition(".")[0] for s, _ in made)])
        close_fused_paths(modules, [site.path for site, _ in made])
        for module in [self.root] if len(self.configs) == 1 else new:  # one may have come after the first adapter
            settle(module, still=True)
        self.merged.tell(self.deltas(name))
        self.set_requires_grad(name, not config.inference_mode)
        if any(edit.changes_base for edit in self.edits[name]):
            self.base_changed = f"adapter {name!r}"

    def check_new_name(self, name: str) -> None:
        """Raises AdapterNameError for a name that is taken or cannot be one."""
        if not isinstance(name, str) or not name or "." in name or name == BASE:
            raise AdapterNameError(f"{name!r} cannot name an adapter: it must be text without dots")
        if name in self.configs:
            raise AdapterNameError(f"an adapter named {name!r} is already there; delete it or take another name")
        if hasattr(AdapterTensors(), name):
            raise AdapterNameError(f"{name!r} cannot name an adapter: torch modules have an attribute of that name")

    def build(
        self, config: TargetedConfig, modules: dict[str, nn.Module]
    ) -> tuple[Bank | None, list[tuple[Site, list[Edit]]]]:
        """(what the sites share, the edits of every site); nothing is attached yet."""
        sites = [(site, self._ref(site, modules)) for site in config.sites(self.root)]
        bank = config.bank([(ref, site) for site, ref in sites if ref is not None])
        made: list[tuple[Site, list[Edit]]] = []
        for site, ref in sites:
            if ref is None:
                edits = config.build_module(self.root.get_submodule(site.path), site)
            else:
                edits = config.build(ref, site) if bank is None else config.build_shared(ref, site, bank)
            made.append((site, [edits] if isinstance(edits, Edit) else list(edits)))
        for path in saved_modules(self.root, config):
            made.append((Site(path, None), [ModuleCopy(self.root.get_submodule(path))]))
        made += config.extras(self.root, made)
        return bank, made

    def _ref(self, site: Site, modules: dict[str, nn.Module]) -> WeightRef | None:
        """The weight at a site; None for sites of a whole module."""
        if site.parameter is None:
            return None
        if is_computed(modules[site.path], site.parameter):
            raise TargetError(
                f"{site.parameter!r} of {site.path!r} is computed from other tensors at every call (weight_norm, "
                "spectral_norm or another parametrisation), so there is no weight to change; take that off first, with "
                "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm, or leave the module out"
            )
        ref = WeightRef(modules[site.path], site.parameter, site.rows)
        ref.original = self.merged.originals.get((id(ref.owner), ref.leaf))
        return ref

    def _attach(self, name: str, site: Site, edits: list[Edit], float32: bool, modules: dict[str, nn.Module]) -> None:
        for bank in (e for e in edits if isinstance(e, Bank)):
            self._attach_bank(name, bank, float32)
        edits = [e for e in edits if not isinstance(e, Bank)]
        if not edits:
            return
        module = modules[site.path]
        hosted = host(module, self.plan, site.path)
        home = modules[site.home or site.path]
        for edit in edits:
            _fit(edit, module, float32)
            if isinstance(edit, KVEdit):
                attention.enable(self.root)
            path = site.home or site.path
            edit.place(module, home, site.file_path or path, name, site.tag)
            if site.tag and not site.file_path:  # peft has no name for this, so files carry the tag too
                for slot in edit.slots:
                    slot.key = f"{path}.{slot.file_name.replace(slot.name, f'{slot.name}_{site.tag}', 1)}"
        if any(isinstance(edit, Delta) and not edit.ref.bypass for edit in edits):
            hosted._places = True
        hosted._edits[name] = (*hosted._edits.get(name, ()), *edits)
        self.edits[name].extend(edits)

    def _attach_bank(self, name: str, bank: Bank, float32: bool) -> None:
        _fit(bank, self.root, float32)
        bank.place_on(self.root, name)
        self.edits[name].append(bank)

    def delete(self, name: str) -> None:
        """Removes an adapter; modules that no adapter changes any more get their own class back."""
        self.check(name)
        if name in self.plan.merged:
            self.unmerge([name])
        for module in list(self.root.modules()):
            if isinstance(module, AdapterTensors) and name in module:
                for table in (module._parameters, module._buffers, module._modules):
                    table.pop(name, None)
        for _, module in list(base_modules(self.root)):
            _drop_empty(module)
            if isinstance(module, Host):
                module._edits.pop(name, None)
                if not module._edits:
                    unhost(module)
        del self.configs[name], self.edits[name]
        if name in self._undo:
            self._undo.pop(name)()
        if self.plan.tree is not None and name in self.plan.active:
            self.plan.tree = None
        self.plan.active = tuple(n for n in self.plan.active if n != name)
        self.plan.refresh()
        if not any(isinstance(e, KVEdit) for edits in self.edits.values() for e in edits):
            attention.disable(self.root)
        if not self.configs:
            reopen_fused_paths(self.root)
            settle(self.root, still=False)

    def remove_all(self) -> nn.Module:
        """Takes every adapter out and returns the plain base; what is merged stays in the weights."""
        for name in self.plan.merged:  # what is merged has been computed on the base as it was prepared
            self._undo.pop(name, None)
        self.plan.merged = ()
        self.merged.bake()
        for name in list(self.configs):
            self.delete(name)
        self.root.__dict__.pop(ATTRIBUTE, None)
        return self.root

    def rename(self, old: str, new: str) -> None:
        """Gives an adapter another name; its parameters are the same objects."""
        self.check(old)
        self.check_new_name(new)
        if self.plan.tree is not None and old in self.plan.active:
            raise AdapterNameError(f"adapter {old!r} runs in {self.plan.tree!r}; activate something else to rename it")
        for module in list(self.root.modules()):
            if isinstance(module, AdapterTensors) and old in module:
                for table in (module._parameters, module._buffers, module._modules):
                    _rename_key(table, old, new)
            elif isinstance(module, Host):
                _rename_key(module._edits, old, new)
        for edit in self.edits[old]:
            for slot in edit.slots:
                if slot.attr == old and isinstance(slot.holder, AdapterTensors):
                    slot.attr = new
        _rename_key(self.configs, old, new)
        _rename_key(self.edits, old, new)
        _rename_key(self._undo, old, new)
        self.plan.active = tuple(new if n == old else n for n in self.plan.active)
        self.plan.merged = tuple(new if n == old else n for n in self.plan.merged)
        self.plan.refresh()

    # ------------------------------------------------------------------ choosing
    def check(self, *names: str) -> None:
        """Raises AdapterNameError for a name that is not there."""
        for name in names:
            if name not in self.configs:
                raise AdapterNameError(
                    f"there is no adapter named {name!r}{hint(str(name), self.configs)} "
                    f"(adapters here: {', '.join(self.configs) or 'none'})"
                )

    def activate(self, names: Node | Sequence[str]) -> None:
        """Makes these adapters run, their changes added up or composed; says nothing about what trains."""
        if isinstance(names, Composition):
            self.compose(names)
            return
        chosen = (names,) if isinstance(names, str) else tuple(names)
        self.check(*chosen)
        if len(set(chosen)) != len(chosen):
            raise AdapterNameError(f"an adapter is named twice in {list(chosen)}")
        if len(chosen) > 1:
            self._check_together(chosen)
        self.plan.active, self.plan.tree = chosen, None
        self.plan.refresh()

    def compose(self, tree: Composition) -> None:
        """Makes a composition run.

        Raises:
            AdapterNameError: an adapter that is not there.
            ConfigError: one that cannot stand where it does: a prompt or a change of attention, say, in an average.
        """
        self.check_composition(tree)
        self.plan.active, self.plan.tree = leaves(tree), tree
        self.plan.refresh()

    def check_composition(self, tree: Node) -> None:
        """Raises as `compose` does."""
        for node in nodes(tree):
            if isinstance(node, Fuse) and node.fusion_name not in self.configs:
                self.check(*(c for c in node.children if isinstance(c, str)))
                raise AdapterNameError(
                    f"{node!r} has no fusion adapter: add_adapter({node.fusion_name!r}, FusionConfig(…)) first"
                )
        self.check(*leaves(tree))
        for channel in channels(tree):
            for node in [channel] if not isinstance(channel, BatchSplit) else channel.children:
                for name in beside(node):
                    for edit in self.edits[name]:
                        if not composable(edit):
                            raise ConfigError(
                                f"adapter {name!r} cannot stand in {node!r}: {type(edit).__name__} at "
                                f"{getattr(edit.host, 'path', '')!r} does not add to an output; only Stack takes it"
                            )

    def _check_together(self, names: Sequence[str]) -> None:
        """Two whole copies of one module cannot both be called."""
        owner: dict[str, str] = {}
        for name in names:
            for edit in self.edits[name]:
                if isinstance(edit, ModuleCopy):
                    path = str(getattr(edit.host, "path", ""))
                    if path in owner:
                        raise ConfigError(
                            f"adapters {owner[path]!r} and {name!r} both have their own copy of {path!r}, so they "
                            "cannot be active together; use adapter_names to choose per row, or activate one"
                        )
                    owner[path] = name

    def rows(self, names: Sequence[Node], positions: int) -> State:
        """The state for a batch whose row i uses adapter `names[i]`."""
        for node in dict.fromkeys(names):
            if node != BASE:
                self.check_composition(node)
        if self.plan.merged:
            raise ConfigError(
                f"adapter {self.plan.merged[0]!r} is merged into the base, so rows cannot be told apart; call "
                "unmerge_adapter() first"
            )
        return State((), RowPlan.of(names, positions), None, self.plan.dropped)

    def drop_layers(self, count: int) -> None:
        """AdapterDrop (arXiv 2010.11918): adapters in the lowest `count` layers do not run; calls cost nothing more.

        Raises:
            ConfigError: not a number of layers, or no adapter is in a numbered one.
        """
        if not isinstance(count, int) or count < 0:
            raise ConfigError(f"the number of layers to drop must be a whole number of at least 0, not {count!r}")
        layers = [getattr(e.host, "_layer", 0) for edits in self.edits.values() for e in edits if hasattr(e, "host")]
        if count and layers and min(layers) == sys.maxsize:
            raise ConfigError(
                f"no adapter lies in a numbered layer of this {type(self.root).__name__} (a path with '.0.'), so "
                "none can be left out by its layer"
            )
        self.plan.dropped = count
        self.plan.refresh()

    def disabled(self) -> contextlib.AbstractContextManager[None]:
        """Runs the body as the plain base, whatever is active or merged.

        Raises:
            ConfigError: a training procedure has changed the base itself.
        """
        self.check_base()
        return self._on_base() if self.merged else self.plan.disabled()

    @contextlib.contextmanager
    def _on_base(self) -> Iterator[None]:
        with self.plan.disabled(), self.merged.base_in_place():
            yield

    def check_base(self) -> None:
        """Raises ConfigError if the plain base is not here any more."""
        if self.base_changed:
            raise ConfigError(
                f"{self.base_changed} has changed the base's own weights, so the plain base is not here any more; load "
                "it again"
            )

    def set_requires_grad(self, names: Node | Sequence[str], value: bool) -> None:
        """Makes the adapters' parameters train, or not; says nothing about what runs."""
        chosen = leaves(names) if isinstance(names, (str, Composition)) else tuple(names)
        self.check(*chosen)
        for name in chosen:
            for edit in self.edits[name]:
                for param in edit.trainable():
                    param.requires_grad_(value)

    # ------------------------------------------------------------------ merging
    def merge(
        self, names: Sequence[str], *, safe: bool = False, same: Rounding | None = None, for_good: bool = False
    ) -> None:
        """Folds adapters into the base weights, in float32; the originals are kept for `unmerge`.

        Args:
            same: into the base's own storage, and how to round where that is quantised; None for dense weights.
            for_good: every adapter is taken out next, and there will be no `unmerge`.

        Raises:
            CannotMergeError: one of them has no equivalent weight. ConfigError: a result is not finite.
        """
        self.check(*names)
        all_names = (*self.plan.merged, *(n for n in names if n not in self.plan.merged))
        edits = [(n, self.edits[n]) for n in all_names]
        self.merged.fold(edits, safe=safe, root=self.root, same=same, aware=self.plan.rounding, for_good=for_good)
        for name in self.configs:
            self.merged.tell(self.deltas(name))
        self.plan.merged = all_names
        self.plan.refresh()

    def unmerge(self, names: Sequence[str] | None = None) -> None:
        """Gives the base its own numbers back, bit for bit; others that were merged stay merged."""
        gone = self.plan.merged if names is None else tuple(names)
        rest, same = tuple(n for n in self.plan.merged if n not in gone), self.merged.same
        self.merged.restore(self.root)
        self.plan.merged = ()
        if rest:
            self.merge(rest, same=same)
        self.plan.refresh()

    def merge_aware(self, how: Rounding | None) -> None:
        """Makes live adapters compute with the weight that a merge into the base's own storage would leave, or not.

        Args:
            how: such a merge rounds; None ends it.

        Raises:
            ConfigError: no quantised weight is adapted, or a method drops inputs at random.
            CannotMergeError: a storage cannot be written back so.
        """
        if how is not None:
            deltas = [d for name in self.configs for d in self.deltas(name) if not d.ref.store.exact]
            if not deltas:
                raise ConfigError(
                    "merge-aware training needs an adapted weight that is stored in few bits, and this base has none; "
                    "load it with load_in_4bit or load_in_8bit, or leave merge_aware out"
                )
            for config in self.configs.values():
                refuse_dropout(config)
            with torch.no_grad():
                for store in {type(d.ref.store): d for d in deltas}.values():
                    how.write(store.ref, store.ref.store.load(store.ref.param))
        self.plan.rounding = how

    # ------------------------------------------------------------------ looking
    def parameters(self, name: str) -> list[Tensor]:
        """Every tensor of an adapter, trained or not."""
        return [slot.weight for edit in self.edits[name] for slot in edit.slots]

    def deltas(self, name: str) -> list[Delta]:
        return [e for e in self.edits[name] if isinstance(e, Delta)]

    def count(self) -> tuple[int, int]:
        """(trainable, all) numbers; a module and its trained copy count once, tied weights once."""
        copied = {
            id(p)
            for edits in self.edits.values()
            for e in edits
            if isinstance(e, ModuleCopy)
            for p in e.original.parameters(recurse=True)
            if not any(p is s.weight for s in e.slots)
        }
        spread = [w for module in self.root.modules() if isinstance(w := quantised(module), Packed)]
        parts = {id(tensor) for weight in spread for tensor in weight.tensors.values()}
        trainable, total = 0, sum(math.prod(weight.shape) for weight in spread)
        for param in self.root.parameters():
            n = logical_size(param) if id(param) not in parts else 0
            trainable += n if param.requires_grad else 0
            total += n if id(param) not in copied else 0
        return trainable, total


def logical_size(param: Tensor) -> int:
    """Numbers a parameter stands for, whatever its packing (ZeRO-3 shards, 4-bit bytes)."""
    from deltatune.stores import find_store

    if hasattr(param, "ds_numel"):
        return int(param.ds_numel)
    return math.prod(find_store(param).shape(param))


def _fit(edit: Edit, module: nn.Module, float32: bool) -> None:
    """Gives new tensors their final device and dtype, before anything (an optimiser) can hold them."""
    near = edit.ref.param if isinstance(edit, Delta) else next(module.parameters(), None)
    dtype = edit.ref.store.dtype(near) if isinstance(edit, Delta) else getattr(near, "dtype", None)
    if float32 and dtype is not None and (dtype in LOW_PRECISION or not dtype.is_floating_point):
        dtype = torch.float32
    device = getattr(near, "device", None)
    for slot in (s for s in edit.slots if s.value is not None):
        value: Any = slot.value
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        value = value if value.is_meta or device is None else value.to(device)
        slot.device, slot.value = device, value.contiguous()  # FSDP2 asks for it


def _drop_empty(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        if isinstance(child, AdapterTensors) and len(child) == 0:
            del module._modules[name]


def _rename_key(table: dict[str, Any], old: str, new: str) -> None:
    """Renames a key and keeps the order of the table."""
    if old in table:
        items = [(new if k == old else k, v) for k, v in table.items()]
        table.clear()
        table.update(items)
