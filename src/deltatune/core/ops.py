"""HOW a layer maps: every kind of layer seen as one matrix `(*batch, out, in)`.

An op knows three things about a kind of layer: how its stored weight reads as a matrix, how to run the
layer's linear map with any matrix (dense or factored), and where the output axis lies. Methods never look at
the layer type; a new layer kind is one class and one table line here (or `register_op` outside).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearOp:
    """`y = x Wᵀ` on the last axis; the weight is stored as `(out, in)`."""

    looks_up = False  # True where the input is an index into the `in` axis (embeddings)

    def matrix(self, raw: Tensor) -> Tensor:
        """Stored layout -> `(*batch, out, in)`; a view where the layout allows it."""
        return raw

    def shape(self, raw: torch.Size) -> torch.Size:
        """`(*batch, out, in)` of a weight that is stored in the shape `raw`."""
        if type(self).matrix is LinearOp.matrix:
            return raw
        return self.matrix(torch.empty(raw, device="meta")).shape

    def stored(self, w: Tensor, shape: torch.Size) -> Tensor:
        """`(*batch, out, in)` -> stored layout of `shape`."""
        return w

    def apply(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        """The layer's output for input `x` under the matrix `w`, without bias."""
        return F.linear(x, w)

    def factored(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor, d: Tensor | None = None) -> Tensor:
        """`apply(x, b @ diag(d) @ a)` without forming the product; `a: (r, in)`, `b: (out, r)`, `d: (r,)`."""
        h = F.linear(x, a)
        return F.linear(h if d is None else h * d, b)

    def factored_rows(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """As `factored`, one pair per run: `x: (N, k, …)`, `a: (N, r, in)`, `b: (N, out, r)` -> `(N·k, …)`."""
        h = torch.bmm(x.flatten(1, -2), a.mT)  # (N, T, r)
        return torch.bmm(h, b.mT).view(x.shape[:2].numel(), *x.shape[2:-1], b.shape[-2])

    def kron(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`apply(x, a ⊗ b)` without forming the Kronecker product; `a: (l, m)`, `b: (k, n)`."""
        h = x.view(*x.shape[:-1], a.shape[1], b.shape[1])  # (…, m, n)
        return F.linear(F.linear(h, b).mT, a).mT.flatten(-2)  # (…, m, k) -> (…, k, l) -> (…, l·k)

    def kron_rows(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """As `kron`, with one pair of factors per batch row; `a: (N, l, m)`, `b: (N, k, n)`."""
        h = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)  # (N, T, m·n)
        h = torch.unflatten(h, -1, (a.shape[2], b.shape[2])) @ b.mT.unsqueeze(1)  # (N, T, m, k)
        return (a.unsqueeze(1) @ h).view(*x.shape[:-1], -1)

    def align(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over `out`, shaped to broadcast against the layer's output `y`."""
        return v

    def columns(self, module: nn.Module, v: Tensor) -> Tensor:
        """A vector over the module's inputs, shaped to broadcast against the matrix: a factor of its columns."""
        return v

    def align_input(self, v: Tensor, x: Tensor) -> Tensor:
        """The same vector, shaped to broadcast against the module's input `x`."""
        return v

    def inputs(self, module: nn.Module, shape: torch.Size) -> int:
        """How long that vector is, for a matrix of `shape`."""
        return shape[-1]

    def gain(self, module: nn.Module) -> Any:
        """What the layer multiplies its linear map by (scaled embeddings); 1 for the others."""
        return 1

    def pack(self, module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A pair `a: (*batch, r, in)`, `b: (*batch, out, r)` as it is kept and saved (what peft's files hold)."""
        return a, b

    def unpack(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`: the pair as matrices."""
        return a, b


class TransposedOp(LinearOp):
    """A linear layer whose weight is stored as `(in, out)`: transformers' Conv1D (GPT-2)."""

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.mT

    def stored(self, w: Tensor, shape: torch.Size) -> Tensor:
        return w.mT


class EmbeddingOp(TransposedOp):
    """`y = W[x]`; the table `(V, d)` is the matrix `(d, V)` applied to one-hot inputs."""

    looks_up = True

    def _look_up(self, module: nn.Module, x: Tensor, table: Tensor) -> Tensor:
        out = F.embedding(x, table, getattr(module, "padding_idx", None), sparse=getattr(module, "sparse", False))
        return self._scaled(module, out)

    def _scaled(self, module: nn.Module, out: Tensor) -> Tensor:
        return out * self.gain(module) if hasattr(module, "embed_scale") else out

    def gain(self, module: nn.Module) -> Any:
        # transformers' scaled embeddings (Gemma, BART, …) multiply what they look up
        return getattr(module, "embed_scale", 1)

    def apply(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return self._look_up(module, x, w.mT)

    def factored(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor, d: Tensor | None = None) -> Tensor:
        h = self._look_up(module, x, a.mT)
        return F.linear(h if d is None else h * d, b)

    def factored_rows(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        n = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (x.ndim - 1))
        h = self._scaled(module, a.mT[n, x])  # (N, …, r)
        return torch.bmm(h.flatten(1, -2), b.mT).view(-1, *x.shape[2:], b.shape[-2])

    def kron(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        n = b.shape[1]
        left, right = a.mT[x // n], b.mT[x % n]  # column x of a ⊗ b is a[:, x // n] ⊗ b[:, x % n]
        return self._scaled(module, (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2))

    def kron_rows(self, module: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        rows, n = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (x.ndim - 1)), b.shape[2]
        left, right = a.mT[rows, x // n], b.mT[rows, x % n]
        return self._scaled(module, (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2))


class ConvOp(LinearOp):
    """Convolutions of 1, 2 or 3 dimensions; the matrix is `(out, in/groups · kernel)`."""

    def __init__(self, conv: Callable[..., Tensor]) -> None:
        self.conv = conv

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.flatten(1)

    def stored(self, w: Tensor, shape: torch.Size) -> Tensor:
        return w.reshape(shape)

    def _pad(self, module: Any, x: Tensor) -> tuple[Tensor, Any]:
        if module.padding_mode == "zeros":
            return x, module.padding
        pad = module._reversed_padding_repeated_twice
        return F.pad(x, pad, mode=module.padding_mode), 0

    def apply(self, module: Any, x: Tensor, w: Tensor) -> Tensor:
        x, padding = self._pad(module, x)
        kernel = w.view(-1, *module.weight.shape[1:])
        return self.conv(x, kernel, None, module.stride, padding, module.dilation, module.groups)

    def factored(self, module: Any, x: Tensor, a: Tensor, b: Tensor, d: Tensor | None = None) -> Tensor:
        g, kernel = module.groups, module.weight.shape[1:]
        # every group sees its own input channels through the same A, then its own rows of B
        a = a.view(-1, *kernel).repeat(g, *[1] * len(kernel))
        x, padding = self._pad(module, x)
        h = self.conv(x, a, None, module.stride, padding, module.dilation, g)
        h = h if d is None else h * self.align(d.repeat(g), h)
        return self.conv(h, b.view(*b.shape, *[1] * (len(kernel) - 1)), groups=g)

    def factored_rows(self, module: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([self.factored(module, x[i], a[i], b[i]) for i in range(x.shape[0])])

    def kron(self, module: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        g, kernel, axis = module.groups, module.weight.shape[2:], 1 - module.weight.ndim  # axis: the channels
        rows, m = a.shape
        if rows % g:  # a group's output rows would cut through a block of a ⊗ b
            return self.apply(module, x, kronecker(a, b))
        x, padding = self._pad(module, x)
        h = torch.unflatten(x, axis, (g, m, -1))  # (…, g, m, n, *S)
        lead = h.shape[:axis]
        weight = b.view(b.shape[0], -1, *kernel)
        h = self.conv(h.flatten(0, axis - 1), weight, None, module.stride, padding, module.dilation)
        size = h.shape[axis:]  # (k, *S')
        h = torch.einsum("glm,...gmz->...glz", a.view(g, rows // g, m), h.reshape(*lead, -1))
        return h.reshape(*lead[:-2], rows * size[0], *size[1:])

    def kron_rows(self, module: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([self.kron(module, x[i : i + 1], a[i], b[i]) for i in range(x.shape[0])])

    def align(self, v: Tensor, y: Tensor) -> Tensor:
        return v.view(-1, *[1] * (y.ndim - 2))

    def columns(self, module: Any, v: Tensor) -> Tensor:
        kernel = module.weight.shape[2:].numel()
        rows = v.view(module.groups, -1).repeat_interleave(kernel, -1)  # (groups, in)
        return rows.repeat_interleave(module.out_channels // module.groups, 0)

    def align_input(self, v: Tensor, x: Tensor) -> Tensor:
        return self.align(v, x)

    def inputs(self, module: Any, shape: torch.Size) -> int:
        return int(module.in_channels)

    def pack(self, module: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kernel = module.weight.shape[1:]
        return a.reshape(-1, *kernel), b.reshape(*b.shape, *[1] * (len(kernel) - 1))

    def unpack(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(1), b.flatten(1)


class VectorOp(LinearOp):
    """A bias or a norm's scale `(n,)`, seen as the matrix `(n, 1)`; `layer` places it in the output."""

    def __init__(self, layer: LinearOp | None = None) -> None:
        self.layer = layer or LinearOp()

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.unsqueeze(-1)

    def stored(self, w: Tensor, shape: torch.Size) -> Tensor:
        return w.reshape(shape)

    def apply(self, module: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return w.squeeze(-1)  # an additive vector does not read the input

    def align(self, v: Tensor, y: Tensor) -> Tensor:
        return self.layer.align(v, y)


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """`a ⊗ b`: `(*batch, l, m)` and `(*batch, k, n)` -> `(*batch, l·k, m·n)`."""
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2)


class ExpertsOp(LinearOp):
    """The fused parameter of a mixture of experts, `(E, out, in)`, or `(E, in, out)` where `transposed`.

    Pairs are kept as peft has them: A `(E·r, in)` with an expert's rows together, B `(out, r·E)` with the
    expert as the fastest axis.
    """

    def __init__(self, experts: int, transposed: bool = False) -> None:
        self.experts, self.transposed = experts, transposed

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.mT if self.transposed else raw

    def stored(self, w: Tensor, shape: torch.Size) -> Tensor:
        return w.transpose(-2, -1) if self.transposed else w

    def pack(self, module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    def unpack(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        e = self.experts
        return a.view(e, -1, a.shape[-1]), b.view(b.shape[0], -1, e).permute(2, 0, 1)


LINEAR = LinearOp()
#: layer class (qualified name) -> how its `weight` maps. Subclasses inherit the entry.
OPS: dict[str, LinearOp] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "deltatune.stores.nf4_layer.Nf4Linear": LINEAR,
    "hqq.core.quantize.HQQLinear": LINEAR,
    "gptqmodel.nn_modules.qlinear.BaseQuantLinear": LINEAR,
    "transformers.pytorch_utils.Conv1D": TransposedOp(),
    "torch.nn.modules.sparse.Embedding": EmbeddingOp(),
    "torch.nn.modules.conv.Conv1d": ConvOp(F.conv1d),
    "torch.nn.modules.conv.Conv2d": ConvOp(F.conv2d),
    "torch.nn.modules.conv.Conv3d": ConvOp(F.conv3d),
}
#: layer class -> where the output axis lies, for modules whose additive bias can be bypassed
BIASED: dict[str, LinearOp] = {
    **OPS,
    "torch.nn.modules.normalization.LayerNorm": LINEAR,
    "torch.nn.modules.normalization.GroupNorm": OPS["torch.nn.modules.conv.Conv1d"],
    "torch.nn.modules.batchnorm._BatchNorm": OPS["torch.nn.modules.conv.Conv1d"],
}
#: classes that override a listed forward and still mean the same map
SAME_MAP: set[str] = {
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
}


def register_op(class_name: str, op: LinearOp) -> None:
    """Teach the core a layer kind: `class_name` is the qualified name of the module class."""
    OPS[class_name] = BIASED[class_name] = op


_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()


def class_names(cls: type) -> tuple[str, ...]:
    """Qualified names along the method resolution order."""
    names = _NAMES.get(cls)
    if names is None:
        names = _NAMES[cls] = tuple(f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__)
    return names


def find_op(module: nn.Module, table: dict[str, LinearOp] | None = None) -> LinearOp | None:
    """The op for a module's class, or None where the kind is unknown."""
    table = OPS if table is None else table
    return next((table[name] for name in class_names(type(module)) if name in table), None)


def can_bypass(module: nn.Module, table: dict[str, LinearOp] | None = None) -> bool:
    """Whether `base(x) + update(x)` is this module's output under a changed weight.

    True where the class runs the forward of the class the op was written for. A subclass with a forward of
    its own may do anything with its weight, so it is rebuilt instead (slower, always right).
    """
    table = OPS if table is None else table
    for cls in type(module).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in SAME_MAP:
            return True
        if name in table:
            return True
        own = cls.__dict__.get("forward")
        if own is not None and not getattr(own, "_deltatune_host", False):
            # scaled embeddings are understood by EmbeddingOp through their `embed_scale`
            return hasattr(module, "embed_scale") and isinstance(find_op(module, table), EmbeddingOp)
    return False


def runs_linear(module: nn.Module) -> bool:
    """Whether the module's class runs `nn.Linear`'s own forward."""
    return runs(module).__dict__.get("forward") is nn.Linear.forward


def runs(module: nn.Module) -> type:
    """The class whose forward the module's class runs."""
    for cls in type(module).__mro__:
        own = cls.__dict__.get("forward")
        if own is not None and not getattr(own, "_deltatune_host", False):
            return cls
    return nn.Module


def maps_last_axis(op: LinearOp) -> bool:
    """Whether a factored product is two plain products on the last axis."""
    return type(op).factored is LinearOp.factored and not isinstance(op, (VectorOp, ExpertsOp))
