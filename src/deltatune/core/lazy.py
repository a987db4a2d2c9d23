"""A weight `base + b @ a` that is never formed: for modules that read single rows or experts of their weight.

Fused mixture-of-experts layers index, transpose and multiply their `(experts, out, in)` parameter. Given this
tensor in its place they do so with the base and the factors apart, so that only what is routed is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

#: grouped products want inner sizes of whole 16-byte blocks
ALIGN = 8


class LowRankWeight(torch.Tensor):
    """Stands for `base + b @ a`; `base: (*batch, out, in)`, `a: (*batch, r, in)`, `b: (*batch, out, r)`.

    Operations it does not know work on the formed sum.
    """

    base: Tensor
    a: Tensor
    b: Tensor

    @staticmethod
    def of(base: Tensor, a: Tensor, b: Tensor) -> LowRankWeight:
        made = torch.Tensor._make_subclass(LowRankWeight, base.detach(), a.requires_grad or b.requires_grad)
        made.base, made.a, made.b = base, a.to(base.dtype), b.to(base.dtype)
        return made

    def dense(self) -> Tensor:
        return self.base + self.b @ self.a

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(getattr(func, "__name__", ""))
        if rule is not None:
            done = rule(*args, **kwargs)
            if done is not NotImplemented:
                return done
        if getattr(func, "__name__", "") in PLAIN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        plain = [arg.dense() if isinstance(arg, LowRankWeight) else arg for arg in args]
        return func(*plain, **{k: v.dense() if isinstance(v, LowRankWeight) else v for k, v in kwargs.items()})


#: properties and queries that the base's own shape and type answer
PLAIN = {"__get__", "size", "dim", "stride", "numel", "is_floating_point", "is_contiguous", "__len__", "data_ptr"}


def _take(w: LowRankWeight, index: Any) -> Any:
    if isinstance(index, tuple):
        return NotImplemented
    return LowRankWeight.of(w.base[index], w.a[index], w.b[index])


def _transpose(w: LowRankWeight, i: int, j: int) -> Any:
    n = w.base.ndim
    if {i % n, j % n} != {n - 2, n - 1}:
        return NotImplemented
    return LowRankWeight.of(w.base.mT, w.b.mT, w.a.mT)  # (b a)ᵀ = aᵀ bᵀ


def _linear(x: Tensor, w: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(w, LowRankWeight) or isinstance(x, LowRankWeight):
        return NotImplemented
    return F.linear(x, w.base, bias) + F.linear(F.linear(x, w.a), w.b)


def _matmul(x: Tensor, w: Any) -> Any:
    if isinstance(w, LowRankWeight) and not isinstance(x, LowRankWeight):
        return x @ w.base + (x @ w.b) @ w.a
    if isinstance(x, LowRankWeight) and not isinstance(w, LowRankWeight):
        return x.base @ w + x.b @ (x.a @ w)
    return NotImplemented


def _grouped(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def rule(x: Tensor, w: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(w, LowRankWeight) or isinstance(x, LowRankWeight):
            return NotImplemented
        pad = -w.a.shape[-2] % ALIGN
        # contiguous in the layout that the base has, which grouped kernels check
        b, a = F.pad(w.b, (0, pad)), F.pad(w.a, (0, 0, 0, pad))
        inner = function(x, b.contiguous(), *args, **kwargs)
        return function(x, w.base, *args, **kwargs) + function(inner, a.contiguous(), *args, **kwargs)

    return rule


def _fallback(*args: Any, **kwargs: Any) -> Tensor:
    return cast(Tensor, torch.ops.transformers.grouped_mm_fallback(*args, **kwargs))


def _grouped_mm(*args: Any, **kwargs: Any) -> Tensor:
    run = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return cast(Tensor, run(*args, **kwargs))


#: name of a torch function -> how it works on factors
RULES: dict[str, Callable[..., Any]] = {
    "__getitem__": _take,
    "transpose": _transpose,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": lambda w, x: _matmul(x, w),
    "bmm": _matmul,
    "grouped_mm": _grouped(_grouped_mm),
    "_grouped_mm": _grouped(_grouped_mm),
    "transformers::grouped_mm_fallback": _grouped(_fallback),
    "grouped_mm_fallback": _grouped(_fallback),
}
