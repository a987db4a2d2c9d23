"""WHAT changes: the base classes every method is written with.

An `Edit` changes one module's call. A `Delta` is an edit that changes one weight: `merged(w)` is its
definition, `update(x, y)` an equal and faster path. A `LowRank` delta gives `factors()` and inherits the
rest. `ModuleEdit` replaces a call, `KVEdit` sees keys and values, `PromptEdit` the model's inputs.

Edits are plain objects. Their tensors live in the module tree under the names users know,
`<module>.<tensor>.<adapter>.weight`; an edit reaches them through `Slot`s, so that whatever replaces a
parameter (FSDP2, `.to()`, an optimiser's offload) is seen here too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import kernels
from deltatune.core.plan import Plan
from deltatune.core.weights import WeightRef
from deltatune.errors import AdapterNameError
from deltatune.kernels import gpu
from deltatune.kernels.low_rank import Product, low_rank_linear
from deltatune.kernels.reading import Reader, reader, reader_of_rows
from deltatune.kernels.shared_input import Layer

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class AdapterTensors(nn.Module):
    """`<module>.<tensor>`: one entry per adapter, a parameter, a buffer or a small module."""

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers) + len(self._modules)

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._parameters or adapter in self._buffers or adapter in self._modules

    def __getitem__(self, adapter: str) -> Any:
        """As in peft, `layer.lora_A["default"]` is `layer.lora_A.default`."""
        if adapter not in self:
            raise KeyError(f"no tensors of an adapter {adapter!r} here, only of {', '.join(self.keys()) or 'none'}")
        return getattr(self, adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """The adapters that have an entry."""
        return [*self._parameters, *self._buffers, *self._modules]

    def extra_repr(self) -> str:
        return ", ".join([*self._parameters, *self._buffers])

    def forward(self, x: Any) -> Any:
        """A container that calls its children one after the other (`nn.Sequential`) calls this one too."""
        return x


#: ranks are padded to multiples of this, which grouped products need
ALIGN = 8


class Leaf(nn.Module):
    """Holds the tensors of one adapter under their leaf names (`weight`, `bias`)."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={tuple(p.shape)}" for k, p in self._parameters.items() if p is not None)


#: holds what has no place yet
NOWHERE = AdapterTensors()


class Slot:
    """Where one tensor of one adapter lives.

    Before `place` it holds the initial value; afterwards `weight` reads the module tree.

    Args:
        name: the tensor's name as users see it (`"lora_A"`).
        leaf: `<name>.<adapter>.<leaf>`; None puts the tensor directly at `<name>.<adapter>`.
        file_name: its name in a checkpoint, if that is not `<name>.<leaf>` (or `<name>` without leaf).
        trainable: False for frozen parts, `buffer` for those that are no parameters.
        saved: False for tensors that are not written to checkpoints.
        derived: saved, but a file may lack it: `later` computes it then.
    """

    def __init__(
        self,
        name: str,
        value: Tensor,
        *,
        leaf: str | None = "weight",
        file_name: str | None = None,
        trainable: bool = True,
        buffer: bool = False,
        saved: bool = True,
        derived: bool = False,
    ) -> None:
        self.name, self.leaf = name, leaf
        self.trainable, self.buffer, self.saved = trainable and not buffer, buffer, saved
        self.derived = derived
        self.file_name = file_name or (name if leaf is None else f"{name}.{leaf}")
        self.value: Tensor | None = value
        #: gives the value that a tensor has if the file that fills it lacks it
        self.later: Callable[[], Tensor] | None = None
        #: what to tell someone whose file lacks it
        self.advice = ""
        #: the device it belongs on, for tensors created without memory
        self.device: torch.device | None = None
        self.holder: nn.Module = NOWHERE
        self.attr = ""
        self.key = self.file_name

    @property
    def weight(self) -> Tensor:
        if self.value is not None:
            return self.value
        params = self.holder._parameters  # three times as fast as the attribute; ZeRO-3 fetches at this lookup, too
        found = params[self.attr] if self.attr in params else getattr(self.holder, self.attr)
        return cast(Tensor, found)

    def place(self, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        """Registers the tensor at `home.<name>[_<tag>].<adapter>[.<leaf>]`; `path` is `home`'s path in files."""
        assert self.value is not None
        holder: nn.Module = container_at(home, f"{self.name}_{tag}" if tag else self.name)
        if self.leaf is not None:
            if adapter not in holder._modules:
                holder.add_module(adapter, Leaf())
            holder = cast(nn.Module, holder._modules[adapter])
        self.holder, self.attr = holder, self.leaf if self.leaf is not None else adapter
        self._register(self.value)
        self.value = None
        self.key = f"{path}.{self.file_name}" if path else self.file_name

    def _register(self, value: Tensor) -> None:
        if self.buffer:
            self.holder.register_buffer(self.attr, value)
        else:
            self.holder.register_parameter(self.attr, nn.Parameter(value, requires_grad=self.trainable))

    def fill(self, tensor: Tensor, *, keep: bool = False) -> None:
        """Copies a checkpoint's tensor into place; one without memory is replaced, a sharded one gets its own part.

        Args:
            keep: nobody else holds the tensor, so its memory may become ours.
        """
        here: Any = self.weight
        if keep and here.dtype == tensor.dtype and here.device == tensor.device and type(here.data) is Tensor:
            here.data = tensor
        elif here.is_meta:
            self.replace(tensor.to(self.device or tensor.device, here.dtype))
        elif hasattr(here, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            part = distribute_tensor(tensor.to(here.device), here.device_mesh, here.placements)
            here.copy_(part.to(here.dtype))
        else:
            here.copy_(tensor)

    def replace(self, value: Tensor) -> None:
        """Puts another tensor here: another shape, device or dtype (loading, rank changes)."""
        grad = self.weight.requires_grad
        self.holder._parameters.pop(self.attr, None)
        self.holder._buffers.pop(self.attr, None)
        self._register(value)
        if not self.buffer:
            self.weight.requires_grad_(grad)


def container_at(home: nn.Module, name: str) -> AdapterTensors:
    """The `AdapterTensors` at `home.<name>`, made if it is not there."""
    found = home._modules.get(name)
    if found is None:
        if hasattr(home, name):
            raise AdapterNameError(
                f"{type(home).__name__} already has an attribute {name!r}, where an adapter's tensors would go"
            )
        found = AdapterTensors()
        found.train(home.training)
        home.add_module(name, found)
    assert isinstance(found, AdapterTensors)
    return found


class Edit:
    """A change to one module's call. Subclasses declare tensors with `self.tensor(...)` in `__init__`.

    Attributes:
        host: the module whose call is changed; set when attached.
        slots: the tensors of this edit, in the order they were declared.
        reads_output: whether `update` uses `y`.
        no_merge: why an edit that is no `Delta` cannot be merged, to end a sentence with.
    """

    host: nn.Module
    reads_output = False
    no_merge = "changes a call and not a weight"
    #: it trains the base's own tensors
    changes_base = False
    #: no tensors of its own, it follows another edit (a tied head); files may repeat that one's tensors there
    follows = False

    def __init__(self) -> None:
        self.slots: list[Slot] = []

    def tensor(self, name: str, value: Tensor, **options: Any) -> Slot:
        """Declares a tensor of this edit; see `Slot` for the options."""
        slot = Slot(name, value, **options)
        self.slots.append(slot)
        return slot

    def place(self, host: nn.Module, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        """Registers the tensors in the module tree under `home`."""
        self.host = host
        for slot in self.slots:
            slot.place(home, path, adapter, tag)

    def pre(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """What the module is called with instead; the default changes nothing."""
        return args, kwargs

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What to add to the output `y`, given the first input `x`; None adds nothing."""
        return None

    def whole(self, x: Tensor, base: Callable[[Tensor], Any]) -> Tensor | None:
        """The module's whole output under this edit alone, equal to adding `update` and faster; None if it has no
        such path here. `base` is the module's own forward."""
        return None

    def layer(self, x: Tensor) -> Layer | None:
        """The module under this edit alone, for a node that runs several modules on the input `x`; None for others."""
        return None

    def group(self) -> Hashable | None:
        """In a mixed batch, edits of the same group run in one `update_rows`; None runs alone on its rows."""
        return None

    def update_rows(self, edits: Sequence[Any], sizes: Sequence[int], x: Tensor, y: Tensor | None) -> Tensor:
        """`update` for the rows of several adapters: the first `sizes[0]` rows use `edits[0]`, and so on.

        Args:
            edits: members of this edit's group, itself the first.
            y: the base's output on these rows; None unless `reads_output`.
        """
        raise NotImplementedError

    def state(self) -> Iterator[tuple[str, Slot]]:
        """The checkpoint's view: (key, slot) for every tensor that is saved."""
        return ((slot.key, slot) for slot in self.slots if slot.saved)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that train when this adapter trains."""
        return (s.weight for s in self.slots if s.trainable and isinstance(s.weight, nn.Parameter))


class Delta(Edit):
    """A change to one weight. `merged` is the definition; `update` must agree with it.

    Attributes:
        ref: the frozen weight.
        reads_output: whether `update` uses `y`; then `apart` runs while another adapter is merged into the
            base, since `y` is no longer the base's.
        few_rows: it changes a few rows of a table, so files need not hold the table itself.
    """

    few_rows = False
    #: the update is what the weight makes of a change of the input, which `moved` gives
    moves_input = False

    def __init__(self, ref: WeightRef) -> None:
        super().__init__()
        self.ref = ref

    def merged(self, w: Tensor) -> Tensor:
        """The weight that the base's weight `w: (*batch, out, in)` becomes."""
        raise NotImplementedError

    def moved(self, x: Tensor) -> Tensor:
        """What to add to the input instead of `update` to the output, with the same effect: one product less."""
        raise NotImplementedError

    def apart(self, x: Tensor) -> Tensor:
        """The update without the base's output at hand."""
        w = self.ref.load()
        return self.ref.apply(x, self.merged(w) - w)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.apart(x)


class LowRank(Delta):
    """`merged(w) = w + b @ a`; `factors` is all a low-rank method has to say.

    Attributes:
        dropout: probability of dropout on the input of `a`, in training.
    """

    dropout: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "factors" in cls.__dict__ and "scaled" not in cls.__dict__:
            cls.scaled = LowRank.scaled  # type: ignore[method-assign]

    def factors(self) -> tuple[Tensor, Tensor]:
        """`a: (*batch, r, in)` and `b: (*batch, out, r)`, scale included."""
        raise NotImplementedError

    def scaled(self) -> tuple[Tensor, Tensor, float]:
        """`a`, `b` and s with `factors() = (a, s · b)`: for kernels, where b is then a parameter itself."""
        return (*self.factors(), 1.0)

    def drop(self, x: Tensor) -> Tensor:
        """Dropout on the input of `a` in training, if the method has any."""
        if self.dropout and self.host.training and x.is_floating_point():
            return F.dropout(x, self.dropout)
        return x

    def merged(self, w: Tensor) -> Tensor:
        a, b = (t.to(w.dtype) for t in self.factors())
        return torch.addmm(w, b, a) if w.ndim == 2 else torch.baddbmm(w, b, a)

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        return self.ref.factored(self.drop(x), *self.factors())

    def whole(self, x: Tensor, base: Callable[[Tensor], Any]) -> Tensor | None:
        if type(self).update is not LowRank.update or not self.ref.linear:
            return None
        if not kernels.possible():
            return self._compiled(x) if torch.compiler.is_compiling() else None
        pair = self.ref.plain_base(x) or self.packed(x, base)
        if pair is not None:
            return self.fused(x, pair)
        if not torch.is_grad_enabled() or type(x) is not Tensor:
            return None
        y: Tensor = base(x)
        return cast(Tensor, self.fused(x, y))

    def packed(self, x: Tensor, base: Callable[[Tensor], Any]) -> tuple[Product, Tensor | None] | None:
        """A packed weight's own product and the bias, where it is chosen before the module's forward `base`."""
        pair = self.ref.packed_base(x)
        if pair is None:
            return None
        a, b, s = self.scaled()
        what = ("packed", gpu.bucket(x.numel() // x.shape[-1]), gpu.bucket(a.shape[-2]), *self.ref.shape)

        def plain(x: Tensor) -> Tensor:
            return low_rank_linear(x, base(x), a, b, s)

        def own(x: Tensor) -> Tensor:
            return low_rank_linear(x, pair, a, b, s)

        return pair if gpu.faster(what, plain, own, x) else None

    def _compiled(self, x: Tensor) -> Tensor | None:
        """The same in compiled code, as an operator that the compiler does not look into."""
        pair = self.ref.packed_base(x) if kernels.mode() == "triton" else None
        if pair is None:
            return None
        a, b = self.factors()
        h = F.linear(self.drop(x), a.to(x.dtype))
        return pair[0].operator(x, pair[1], h, b.to(x.dtype))

    def _undisturbed(self, x: Tensor, edits: Sequence[LowRank]) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of a linear layer that these edits, without dropout, do nothing to but what LowRank does."""
        plain = all(type(e).update is LowRank.update and type(e).drop is LowRank.drop for e in edits)
        drops = self.host.training and any(e.dropout for e in edits)
        return self.ref.plain_base(x) if plain and not drops and self.ref.linear else None

    def layer(self, x: Tensor) -> Layer | None:
        base = self._undisturbed(x, [self])
        if base is None:
            return None
        a, b, scale = self.scaled()
        return Layer(*base, a, b, scale, None)

    def reader(self, x: Tensor, others: Sequence[LowRank] = (), index: Tensor | None = None) -> Reader | None:
        """The module's whole call on inputs like `x` while no weight changes and nothing is trained, alone or with the
        adapters of other rows (see `reader_of_rows`); None where there is no such path."""
        edits = [self, *others]
        base = self._undisturbed(x, edits)
        if base is None:
            return None
        if not others and index is None:
            a, b = (t.to(x.dtype) for t in self.factors())
            return reader(*base, a, b)
        if gpu.on(x):
            return None  # `grouped` chooses between products there
        return reader_of_rows(*base, *self.stack([e.factors() for e in edits], x.dtype), index)

    def fused(
        self, x: Tensor, base: Tensor | tuple[Tensor | Product, Tensor | None], c: Tensor | None = None
    ) -> Tensor | None:
        """`low_rank_linear` of this pair; None where its dropout is not the usual one and the base not made yet."""
        p, own = self.dropout if self.host.training else 0.0, x
        if type(self).drop is not LowRank.drop:
            p, own = 0.0, self.drop(x)
            if own is not x and not isinstance(base, Tensor):
                return None
        if not torch.is_grad_enabled():
            plan: Plan = cast(Any, self.host).plan
            a, b, s = plan.remember(("pair", id(self), x.dtype), lambda: self._ready(x.dtype))
        else:
            a, b, s = self.scaled()
        return low_rank_linear(own, base, a, b, s, p=p, c=c)

    def _ready(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """`scaled` for calls that only read: in their dtype, and `b` in the memory order that few rows read faster."""
        a, b, s = self.scaled()
        if not cast(Any, self.host).plan.is_steady:
            return a, b, s
        return a.to(dtype), b.to(dtype).mT.contiguous().mT, s

    def group(self) -> Hashable | None:
        plain = self.ref.bypass and type(self).update is LowRank.update
        return (LowRank, self.ref.place) if plain else None

    def update_rows(self, edits: Sequence[LowRank], sizes: Sequence[int], x: Tensor, y: Tensor | None) -> Tensor:
        plan: Plan = cast(Any, self.host).plan
        key = ("rows", *map(id, edits), x.dtype)
        a, b, ranks = plan.remember(key, lambda: self._stacked([edit.factors() for edit in edits], x.dtype))
        return self.grouped(a, b, sizes, self.drop_rows(edits, sizes, x), ranks)

    def _stacked(self, pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[int]]:
        return (*self.stack(pairs, dtype), [a.shape[-2] for a, _ in pairs])

    def drop_rows(self, edits: Sequence[LowRank], sizes: Sequence[int], x: Tensor) -> Tensor:
        """Every adapter's own `drop` on its rows; `x` itself where none has any."""
        if not self.host.training:
            return x
        parts: Sequence[Tensor] = torch.split(x, list(sizes))
        dropped = [edit.drop(part) for edit, part in zip(edits, parts, strict=True)]
        return x if all(d is p for d, p in zip(dropped, parts, strict=True)) else torch.cat(dropped)

    def stack(self, pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`a: (n, r, in)` and `b: (n, out, r)` of several adapters, ranks padded to a multiple of 8 where they differ.

        The memory of `b` is `(n, r, out)`, which products of few rows read much faster.
        """
        dtype = dtype if dtype.is_floating_point else self.ref.dtype
        ranks = {a.shape[-2] for a, _ in pairs}
        if len(ranks) > 1:
            r = -(-max(ranks) // ALIGN) * ALIGN
            pairs = [(F.pad(a, (0, 0, 0, r - a.shape[-2])), F.pad(b, (0, r - b.shape[-1]))) for a, b in pairs]
        return torch.stack([a for a, _ in pairs]).to(dtype), torch.stack([b.mT for _, b in pairs]).to(dtype).mT

    def grouped(self, a: Tensor, b: Tensor, sizes: Sequence[int], x: Tensor, ranks: Sequence[int]) -> Tensor:
        """Every run's own product, by a GPU kernel where one is chosen; `ranks` are those before they were padded."""
        if len(sizes) == 1:
            return self.ref.factored(x, a[0], b[0])
        if self.ref.linear and gpu.on(x):
            made = gpu.grouped(x, a, b, sizes, ranks, lambda x, a, b: self._by_torch(a, b, sizes, x))
            if made is not None:
                return made
        return self._by_torch(a, b, sizes, x)

    def _by_torch(self, a: Tensor, b: Tensor, sizes: Sequence[int], x: Tensor) -> Tensor:
        """Runs of equal length share one batched product, others one grouped by run."""
        n = len(sizes)
        if len(set(sizes)) == 1:
            return self.ref.factored_rows(x.reshape(n, sizes[0], *x.shape[1:]), a, b)
        if self.ref.linear and groupable(x, a, b):
            return self._by_runs(a, b, sizes, x)
        rows = torch.tensor([i for i, k in enumerate(sizes) for _ in range(k)], device=x.device)
        return self.ref.factored_rows(x.unsqueeze(1), a[rows], b[rows])

    def _by_runs(self, a: Tensor, b: Tensor, sizes: Sequence[int], x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        each = tokens.shape[0] // x.shape[0]
        ends = torch.tensor([k * each for k in sizes], device=x.device).cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(tokens, a.mT, offs=ends)
        return F.grouped_mm(h, b.mT, offs=ends).view(*x.shape[:-1], b.shape[-2])


def groupable(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether torch has a grouped product for these; the sizes it takes are whole 16-byte blocks."""
    if not hasattr(F, "grouped_mm") or torch.compiler.is_compiling():
        return False
    kinds = {torch.float32, torch.bfloat16} if x.device.type == "cpu" else {torch.bfloat16}
    return x.dtype in kinds and not any(d % ALIGN for d in (a.shape[-1], a.shape[-2], b.shape[-2]))


class Witness(Edit):
    """Sees a module's call and changes nothing; other edits of its adapter read what it noted."""

    def see(self, args: Args, kwargs: Kwargs) -> None:
        """Called before the module, with the whole batch."""
        raise NotImplementedError


class ModuleEdit(Edit):
    """Takes over the whole call of a module (a fully trained copy, for one)."""

    def run(self, args: Args, kwargs: Kwargs) -> Any:
        raise NotImplementedError

    def replacements(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """For merging: (module, leaf, tensor) that the base's tensors become."""
        raise NotImplementedError


class KVEdit(Edit):
    """A change of attention, at transformers' attention function: `q, k, v` are `(B, heads, T, d)`.

    Attributes:
        bias_source: the module whose `compute_bias` gives relative position biases (T5), where the attention has any.
    """

    no_merge = "changes what attention sees and not a weight"
    bias_source: nn.Module | None = None

    def pairs(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values `(key-value heads, P, d)` that every query attends to beside the others; None for none."""
        return None

    def after(self, q: Tensor, scaling: float) -> Tensor | None:
        """What to add to the attention's output `(B, T, heads, d)`; None adds nothing."""
        return None

    def after_rows(self, q: Tensor, index: Tensor | None, scaling: float) -> Tensor | None:
        """`after` on the batch rows `index`, all if None."""
        return self.after(q if index is None else q[index], scaling)


class PromptEdit(Edit):
    """Embeddings put before the input of one stack of the model (the module that embeds tokens).

    The core widens the input, its mask and positions, and takes the prompt's positions out of the output; see
    `deltatune.core.prompts`.

    Attributes:
        length: P, how many embeddings `prompt` gives.
        shift: positions in front of the tokens that hold no token (those of a prefix in the attention).
        encoder_length: how many of the encoder's states are its prompt, for a decoder that looks at them.
        placeholder: the token id that stands where the embeddings go; None puts them in front.
        reads_first: a classifier that reads the first position reads the prompt's first.
        keeps_width: the prompt's positions stay in the output (an encoder's, which the decoder looks at).
        causal, positions, offset: of the stack; see `deltatune.core.prompts.Stack`.
        at_table: it sits on a table of positions that a stack calls, and moves what is looked up there by `shift`.
    """

    no_merge = "adds to the input and does not change a weight"
    length = 0
    shift = 0
    encoder_length = 0
    placeholder: int | None = None
    reads_first = False
    keeps_width = False
    causal = False
    positions: int | None = None
    offset = 0
    at_table = False

    def moved(self, call: Kwargs, by: int) -> Kwargs:
        """The call of a table of positions, `by` positions further on."""
        raise NotImplementedError

    def prompt(self, tasks: Tensor | None) -> Tensor:
        """The embeddings, `(P, d)`, or `(B, P, d)` where they depend on each row's entry of `tasks: (B,)`."""
        raise NotImplementedError
