"""DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353).

    W' = m · V / ‖V‖        V = W + s · B A, norms over the input of every output row, m: (out)

m starts as those norms, so the model starts as the base; in the gradient ‖V‖ is a constant (section 4.3). With
c = m / ‖V‖ the call needs no V and no second pass through the layer:

    y' = y + (c - 1) · W x + c · s · B A x          W x = y - b, or W dropout(x) where dropout is on
    ‖V‖² = ‖W‖² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B      per row

One file for every kind of layer: a weight is its matrix (out, in), whatever holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune import kernels
from deltatune.core.edits import Delta
from deltatune.core.hosts import Host
from deltatune.core.ops import ConvOp
from deltatune.core.plan import Plan
from deltatune.core.weights import WeightRef
from deltatune.inits import Start
from deltatune.kernels.shared_input import Layer
from deltatune.methods.lora import LoraDelta


class DoraDelta(Delta):
    """LoRA's pair of factors and `lora_magnitude_vector`, one number per output row. Arguments as `LoraDelta`."""

    reads_output = True

    def __init__(self, ref: WeightRef, r: int, scale: float, dropout: float, start: Start) -> None:
        super().__init__(ref)
        self.pair = LoraDelta(ref, r, scale, dropout, start)
        self.slots = [*self.pair.slots]
        m = torch.linalg.vector_norm(self.pair.merged(ref.load()), dim=-1).detach()
        if isinstance(ref.op, ConvOp):  # peft keeps it in the shape that broadcasts against (N, out, *spatial)
            m = m.view(1, -1, *[1] * (len(ref.raw_shape) - 2))
        self._kept: tuple[Any, Tensor, Tensor] | None = None
        self.magnitude = self.tensor("lora_magnitude_vector", m, file_name="lora_magnitude_vector")

    def place(self, host: nn.Module, home: nn.Module, path: str, adapter: str, tag: str = "") -> None:
        super().place(host, home, path, adapter, tag)
        self.pair.host = host

    def merged(self, w: Tensor) -> Tensor:
        v = self.pair.merged(w)
        return self._ratio(torch.linalg.vector_norm(v, dim=-1))[..., None] * v

    def update(self, x: Tensor, y: Tensor) -> Tensor | None:
        dropped = self.pair.drop(x)
        return self._change(dropped, self.ref.no_bias(y) if dropped is x else self._plain(dropped))

    def whole(self, x: Tensor, base: Callable[[Tensor], Any]) -> Tensor | None:
        dropped = self.pair.dropout and self.host.training  # needs W dropout(x) beside W x
        if dropped or not self.ref.linear or not kernels.possible():
            return None
        weights = self.ref.plain_base(x) or self.pair.packed(x, base)
        return None if weights is None else self.pair.fused(x, weights, self.ratio())

    def layer(self, x: Tensor) -> Layer | None:
        pair = self.pair.layer(x)
        return None if pair is None else replace(pair, c=self.ratio())

    def apart(self, x: Tensor) -> Tensor:
        x = self.pair.drop(x)
        return self._change(x, self._plain(x))

    def _plain(self, x: Tensor) -> Tensor:
        return self.ref.apply(x, self.ref.load())

    def _change(self, x: Tensor, plain: Tensor) -> Tensor:
        """What is added to the output; `plain` is W x."""
        c = self.ratio()
        a, b = self.pair.factors()
        return self.ref.align((c - 1).to(plain.dtype), plain) * plain + self.ref.factored(x, a, c[..., None] * b)

    def group(self) -> Hashable | None:
        return (DoraDelta, self.ref.place) if self.ref.bypass else None

    def update_rows(self, edits: Sequence[DoraDelta], sizes: Sequence[int], x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        dropped = self.pair.drop_rows([e.pair for e in edits], sizes, x)
        plain = self.ref.no_bias(y) if dropped is x else self._plain(dropped)
        key = (DoraDelta, *map(id, edits), x.dtype, y.dtype, y.ndim)
        a, b, ranks, more = self._plan.remember(key, lambda: self._stack(edits, x.dtype, y))
        if len(set(sizes)) == 1:
            change = (plain.view(len(sizes), sizes[0], *plain.shape[1:]) * more.unsqueeze(1)).flatten(0, 1)
        else:
            rows = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)], device=x.device)
            change = plain * more[rows]
        return change + self.pair.grouped(a, b, sizes, dropped, ranks)

    def _stack(
        self, edits: Sequence[DoraDelta], dtype: torch.dtype, y: Tensor
    ) -> tuple[Tensor, Tensor, list[int], Tensor]:
        """Of n adapters: A `(n, r, in)`, c s B `(n, out, r)`, ranks, and c - 1 `(n, …)`, times which rows of `y` go."""
        ratios = [edit.ratio() for edit in edits]
        factors = [edit.pair.factors() for edit in edits]
        a, b = self.pair.stack([(a, c[..., None] * b) for c, (a, b) in zip(ratios, factors, strict=True)], dtype)
        more = [self.ref.align((c - 1).to(y.dtype), y) for c in ratios]
        ranks = [a.shape[-2] for a, _ in factors]
        return a, b, ranks, torch.stack([m.view(*[1] * (y.ndim - 1 - m.ndim), *m.shape) for m in more])

    def ratio(self) -> Tensor:
        """c = m / ‖V‖ per row, `(*batch, out)`."""
        return self._ratio(self._plan.remember(self, self._norm))

    @property
    def _plan(self) -> Plan:
        return cast(Host, self.host).plan

    def _ratio(self, norm: Tensor) -> Tensor:
        norm = norm.detach()
        none = norm == 0  # a row of zeros has no direction; its ratio is 1, so that B can still learn one
        m = self.magnitude.weight.reshape(norm.shape)
        return torch.addcmul(none.to(m.dtype), m, norm.reciprocal().masked_fill(none, 0).to(m.dtype))

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """‖V‖ per row from its pieces, in float32 (float64 stays); V itself is not formed."""
        w = self.ref.load()
        a, b = (t.to(w.dtype) for t in self.pair.factors())
        cross = torch.matmul(w, a.mT).mul_(2).add_(b @ (a @ a.mT))  # (*batch, out, r)
        square = self._square(w) + (cross * b).sum(-1)
        return square.clamp_min(0).sqrt()

    def _square(self, w: Tensor) -> Tensor:
        """‖W‖² per row. On a CPU, where reading W again costs most, it is kept while the parameter is the same tensor
        of the same version and a number of every row and column, too, is what it was (writing through `.data` counts
        as no version)."""
        if w.device.type != "cpu" or torch.compiler.is_compiling():
            return _square(w)
        param: Any = self.ref.param
        plain = type(param) is nn.Parameter and type(param.data) is Tensor and not param.is_inference()
        if not plain:
            return _square(w)
        key, i = (id(param), param._version, param.dtype), torch.arange(max(w.shape[-2:]), device=w.device)
        some = w[..., i % w.shape[-2], i % w.shape[-1]]
        if self._kept is None or self._kept[0] != key or not torch.equal(self._kept[1], some):
            self._kept = key, some, _square(w)
        return self._kept[2]


def _square(w: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(w, dim=-1)
    return norm.square()
