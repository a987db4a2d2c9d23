"""WeightRef = op × store × rows: one frozen weight seen as `(*batch, out, in)`.

All dispatch happens when the ref is made; `load`, `factored` and the rest are straight-line code that
`torch.compile(fullgraph=True)` accepts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.core.ops import (
    BIASED,
    LINEAR,
    ExpertsOp,
    LinearOp,
    VectorOp,
    can_bypass,
    find_op,
    maps_last_axis,
    runs,
    runs_linear,
)
from deltatune.kernels import gpu
from deltatune.kernels.low_rank import Product
from deltatune.stores import DenseStore, find_layer, find_store, product_of, table_of

Rows = slice | Tensor | None


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether a weight is no parameter of its own but made at every call, as `weight_norm` does."""
    owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    there = getattr(owner, leaf, None) is not None
    return there and table_of(owner, leaf).get(leaf) is None and find_layer(owner) is None


class WeightRef:
    """One frozen weight of one module.

    Args:
        module: the module whose call reads the weight (the host).
        name: the parameter, relative to `module` (`"weight"`, `"in_proj_weight"`, `"out_proj.weight"`).
        rows: the output rows this ref stands for: all (None), a slice, or an index `(n,)`.

    Attributes:
        shape: `(*batch, out, in)` of the rows.
        bypass: whether an update can be added to the module's output; otherwise the weight is rebuilt for
            the call.
    """

    def __init__(self, module: nn.Module, name: str = "weight", rows: Rows = None) -> None:
        self.module, self.name, self.rows = module, name, rows
        parent, _, self.leaf = name.rpartition(".")
        self.owner = module.get_submodule(parent)
        #: the base's own parameter while a merge has put another in its place
        self.original: Any = None
        self._layer = find_layer(self.owner) if self.leaf == "weight" else None
        self.store = find_store(self.param)
        raw_shape = self.store.shape(self.param)
        self.op, self.bypass = self._choose_op(len(raw_shape))
        self.raw_shape = raw_shape
        self.full_shape = self.op.shape(raw_shape)
        #: the module maps the last axis by all of this weight, and whether it does so by `nn.Linear`'s own forward
        self.linear = self.bypass and rows is None and maps_last_axis(self.op)
        self.own_forward = runs_linear(module)
        #: the storage's own product, where it has one and the module's forward is that product
        self.product = product_of(self.store, runs(module)) if self.linear else None
        #: equal for two adapters' refs of the same rows of the same parameter of one module
        self.place = (name, tuple(rows.tolist()) if isinstance(rows, Tensor) else str(rows))
        self.shape = torch.Size([*self.full_shape[:-2], self._count_rows(), self.full_shape[-1]])

    def _choose_op(self, ndim: int) -> tuple[LinearOp, bool]:
        if self._layer is not None:
            return LINEAR, True
        if self.name == "weight" and ndim > 1:
            op = find_op(self.module)
            return op or LINEAR, op is not None and can_bypass(self.module)
        if ndim == 1:
            layer = find_op(self.module, BIASED)
            additive = self.name == "bias" and layer is not None and can_bypass(self.module, BIASED)
            return VectorOp(layer), additive
        if ndim == 3:
            return ExpertsOp(len(self.param), getattr(self.module, "is_transposed", False)), False
        return LINEAR, False

    def _count_rows(self) -> int:
        if self.rows is None:
            return int(self.full_shape[-2])
        if isinstance(self.rows, slice):
            return len(range(*self.rows.indices(self.full_shape[-2])))
        return len(self.rows)

    # ------------------------------------------------------------------ the stored side
    @property
    def param(self) -> Any:
        """The base's own parameter (or `Packed` weight), also while something is merged."""
        if self.original is not None:
            return self.original
        if self._layer is not None:
            return self._layer.gather(self.owner)
        p: Any = table_of(self.owner, self.leaf).get(self.leaf)
        assert p is not None
        return p

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype(self.param)

    @property
    def device(self) -> torch.device:
        return self.param.device  # type: ignore[no-any-return]

    def load(self) -> Tensor:
        """Our rows of the base's weight, `(*batch, out, in)` in float32 (float64 stays)."""
        return self.take(self.load_full())

    def load_as(self, dtype: torch.dtype) -> Tensor:
        """Our rows in another precision; for dense weights of that dtype without a copy."""
        return self.take(self.op.matrix(self.store.load(self.param))).to(dtype)

    def load_full(self) -> Tensor:
        """The whole weight, `(*batch, out, in)` in float32 (float64 stays)."""
        w = self.op.matrix(self.store.load(self.param))
        return w if w.dtype == torch.float64 else w.float()

    def dense_matrix(self) -> Tensor | None:
        """The stored numbers themselves, if they are an ordinary matrix `(out, in)` and all of it is ours."""
        w: Any = self.param
        plain = type(self.store) is DenseStore and type(self.op) is LinearOp and self.rows is None
        ordinary = type(w) is nn.Parameter and type(w.data) is Tensor and w.ndim == 2 and w.is_floating_point()
        return w.detach() if plain and ordinary else None

    def take(self, full: Tensor) -> Tensor:
        """Our rows of a whole matrix."""
        return full if self.rows is None else full[..., self.rows, :]

    def put(self, full: Tensor, ours: Tensor) -> Tensor:
        """A whole matrix with `ours` in place of our rows; differentiable in both."""
        if self.rows is None:
            return ours
        index = torch.arange(full.shape[-2], device=full.device)[self.rows]
        return full.index_copy(-2, index, ours.to(full.dtype))

    @property
    def indexed(self) -> bool:
        """Whether the module reads parts of the weight (experts), so that all of it should never be formed."""
        return isinstance(self.op, ExpertsOp) and self.rows is None

    def stored(self, full: Tensor) -> Tensor:
        """A whole matrix in the layout of the parameter."""
        return self.op.stored(full, self.raw_shape)

    # ------------------------------------------------------------------ the activation side
    def apply(self, x: Tensor, w: Tensor) -> Tensor:
        """The module's linear map of `x` under our rows' matrix `w`, without bias; zero on other rows."""
        y = self.op.apply(self.module, x, self._cast(w, x))
        return self._spread(self.op.align(y, x) if isinstance(self.op, VectorOp) else y)

    def factored(self, x: Tensor, a: Tensor, b: Tensor, d: Tensor | None = None) -> Tensor:
        """`apply(x, b @ diag(d) @ a)` without forming the product; `a: (r, in)`, `b: (out, r)`, `d: (r,)`."""
        a, b, d = self._cast(a, x), self._cast(b, x), None if d is None else self._cast(d, x)
        return self._spread(self.op.factored(self.module, x, a, b, d))

    def factored_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """As `factored`, one pair per run: `x: (N, k, …)`, `a: (N, r, in)`, `b: (N, out, r)` -> `(N·k, …)`."""
        return self._spread(self.op.factored_rows(self.module, x, self._cast(a, x), self._cast(b, x)))

    def plain_base(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, if the module is now nothing but `x Wᵀ + b` on ordinary tensors; for `linear` refs."""
        module = self.module
        w, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if not self.own_forward or type(x) is not Tensor or "_inner_forward" in module.__dict__:
            return None
        if type(w) is not nn.Parameter or w.dtype != x.dtype or w.requires_grad:
            return None
        return None if torch.is_autocast_enabled(x.device.type) else (w, bias)

    def packed_base(self, x: Tensor) -> tuple[Product, Tensor | None] | None:
        """As `plain_base` for a packed weight, where a kernel reads it as it is stored; for `linear` refs."""
        module = self.module
        if self.product is None or not gpu.on(x) or "_inner_forward" in module.__dict__:
            return None
        product = self.product(module, x)
        return None if product is None else (product, module._parameters.get("bias"))

    def kron(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`apply(x, a ⊗ b)` without forming the product; `a: (l, m)`, `b: (out/l, in/m)`."""
        return self._spread(self.op.kron(self.module, x, self._cast(a, x), self._cast(b, x)))

    def kron_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """As `kron` with one pair per batch row; `a: (N, l, m)`, `b: (N, out/l, in/m)`."""
        return self._spread(self.op.kron_rows(self.module, x, self._cast(a, x), self._cast(b, x)))

    def _cast(self, w: Tensor, x: Tensor) -> Tensor:
        # the update runs in the activation's dtype, as the base layer does; indices keep the weight's
        return w.to(x.dtype) if x.is_floating_point() else w.to(self.dtype)

    def _spread(self, y: Tensor) -> Tensor:
        """Our rows' outputs placed in the whole output, zeros elsewhere."""
        if self.rows is None:
            return y
        n = self.full_shape[-2]
        axis = 1 if self.op.align(y.new_empty(n), y).ndim > 1 else y.ndim - 1
        if isinstance(self.rows, slice) and axis == y.ndim - 1:
            start, stop, _ = self.rows.indices(n)
            return F.pad(y, (start, n - stop))
        index = torch.arange(n, device=y.device)[self.rows]
        shape = list(y.shape)
        shape[axis] = n
        return y.new_zeros(shape).index_copy(axis, index, y)

    def no_bias(self, y: Tensor) -> Tensor:
        """The module's output without its bias, on our rows' outputs only (zero elsewhere)."""
        bias = getattr(self.module, "bias", None)
        y = y if bias is None else y - self.op.align(bias, y).to(y.dtype)
        if self.rows is None:
            return y
        mask = torch.zeros(self.full_shape[-2], device=y.device, dtype=y.dtype)
        mask[self.rows] = 1
        return y * self.op.align(mask, y)

    def align(self, v: Tensor, y: Tensor) -> Tensor:
        """A vector over our rows, spread over the whole output and shaped to broadcast against `y`."""
        if self.rows is not None:
            index = torch.arange(self.full_shape[-2], device=v.device)[self.rows]
            v = v.new_zeros(self.full_shape[-2]).index_copy(0, index, v)
        return self.op.align(v, y)
