"""One autograd node for several linear layers that read the same input (query, key and value; gate and up):

    u_i = W_i x + s_i · B_i A_i x        y_i = c_i ∘ u_i + b_i

A_i x of all layers is one product with the stacked A, and so are its two gradients; the gradient of x is summed inside
the products, where autograd would add up one tensor a layer. Kept for backward is what `low_rank_linear` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltatune import kernels
from deltatune.kernels.low_rank import grad_of_c, keep, kept, own_shape, without_autocast


@dataclass
class Layer:
    """One of the layers: `w: (out, in)`, `bias: (out,)`, `a: (r, in)`, `b: (out, r)`, scale s, `c: (out,)`."""

    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    c: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.w, self.bias, self.a, self.b, self.c


def low_rank_linears(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """The outputs of all layers for `x: (…, in)`; there must be no dropout."""
    numbers = (tuple(layer.scale for layer in layers), kernels.mode() == "lean")
    flat = [t for layer in layers for t in layer.tensors]
    return list(cast(Any, _LowRankLinears.apply)(x, numbers, *flat))


def _layers(tensors: Sequence[Any], scales: Sequence[float]) -> list[Layer]:
    return [
        Layer(w, bias, a, b, s, c)
        for w, bias, a, b, c, s in zip(*(tensors[i::5] for i in range(5)), scales, strict=True)
    ]


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: tuple[tuple[float, ...], bool], *tensors: Any) -> tuple[Tensor, ...]:
        scales, lean = numbers
        layers = _layers(tensors, scales)
        rows = x.reshape(-1, x.shape[-1])
        h = F.linear(rows, torch.cat([layer.a.to(x.dtype) for layer in layers]))  # (T, Σ r)
        outs = [_output(rows, layer, part) for layer, part in zip(layers, _parts(h, layers), strict=True)]
        need_c = [ctx.needs_input_grad[6 + 5 * i] for i in range(len(layers))]
        need_x = any(need_c) or any(ctx.needs_input_grad[4 + 5 * i] for i in range(len(layers)))
        outs = [own_shape(out, x) for out in outs]
        ctx.save_for_backward(x if need_x else None, h, *tensors)
        anchor = next((layer.c for layer, need in zip(layers, need_c, strict=True) if need), None)
        ctx.kept = None if anchor is None or lean else keep(anchor, outs)
        ctx.scales, ctx.like = scales, (x.shape, x.dtype)
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        x, h, *tensors = ctx.saved_tensors
        n = len(dys)
        layers, outs = _layers(tensors, ctx.scales), kept(ctx) or [None] * n
        shape, dtype = ctx.like
        needs = [ctx.needs_input_grad[2 + 5 * i : 7 + 5 * i] for i in range(n)]
        need_x, need_a = ctx.needs_input_grad[0], any(need[2] for need in needs)
        x = None if x is None else x.reshape(-1, shape[-1])
        grads: list[list[Tensor | None]] = []
        dhs: list[Tensor] = []
        dx: Tensor | None = None
        for dy, layer, hi, out, need in zip(dys, layers, _parts(h, layers), outs, needs, strict=True):
            if dy is None:
                grads.append([None] * 5)
                dhs.append(torch.zeros_like(hi))
                continue
            g = dy.reshape(-1, dy.shape[-1])
            d_bias = g.sum(0) if need[1] else None
            dc = None
            if layer.c is not None:
                if need[4]:
                    c, s = layer.c, layer.scale
                    dc = grad_of_c(g, x, layer.w, layer.a, layer.b, c, hi, out, layer.bias, s)
                g = g * layer.c.to(dtype)
            db = torch.empty_like(layer.b).copy_((hi.mT @ g).mT).mul_(layer.scale) if need[3] else None
            dhs.append(g @ layer.b.to(dtype) * layer.scale)  # (T, r)
            if need_x:
                dx = torch.mm(g, layer.w) if dx is None else dx.addmm_(g, layer.w)
            grads.append([None, d_bias, None, db, dc])
        dh = torch.cat(dhs, -1)
        if need_a:
            assert x is not None
            for grad, layer, dy, da in zip(grads, layers, dys, _parts(dh.mT @ x, layers, 0), strict=True):
                grad[2] = None if dy is None else da.to(layer.a.dtype)
        if dx is not None:
            dx = dx.addmm_(dh, torch.cat([layer.a.to(dtype) for layer in layers])).view(shape)
        return dx, None, *(t for grad in grads for t in grad)


def _parts(h: Tensor, layers: Sequence[Layer], axis: int = -1) -> tuple[Tensor, ...]:
    return torch.split(h, [len(layer.a) for layer in layers], axis)


def _output(rows: Tensor, layer: Layer, h: Tensor) -> Tensor:
    out = F.linear(rows, layer.w, layer.bias if layer.c is None else None)
    out.addmm_(h, layer.b.to(rows.dtype).mT, alpha=layer.scale)
    if layer.c is not None:
        out.mul_(layer.c.to(rows.dtype))
        if layer.bias is not None:
            out.add_(layer.bias)
    return out
