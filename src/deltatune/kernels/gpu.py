"""Where Triton kernels can run, and whether they are the faster ones there: measured on the device, never assumed.

In mode "triton" they run wherever they can. In mode "measure" a call that could use one times both ways first, once per
kind, device, dtype and size (tokens and ranks in powers of two), and remembers which was faster; `measured()` shows it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltatune import kernels
from deltatune.errors import ConfigError

if TYPE_CHECKING:
    from deltatune.kernels.triton_nf4 import Nf4Product
    from deltatune.stores.nf4 import Nf4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: runs that a time is the best of, and how many are timed together
ROUNDS, TOGETHER = 5, 4

#: what was measured -> seconds of torch's way and of the kernel
_seconds: dict[Hashable, tuple[float, float]] = {}


def require(mode: str) -> None:
    """Sees that kernels can run here.

    Raises:
        ConfigError: Triton is not installed, or there is no device for it.
    """
    if find_spec("triton") is None:
        raise ConfigError(
            f'kernels.use("{mode}") needs Triton, which is not installed: pip install "deltatune[triton]" (on Linux), '
            'or stay with the default, "fused"'
        )
    if not torch.cuda.is_available():
        if mode == "measure":
            raise ConfigError(
                'kernels.use("measure") times both ways on a CUDA device, and none is here; stay with '
                'the default, "fused"'
            )
        if not INTERPRETED:
            raise ConfigError(
                'kernels.use("triton") needs a CUDA device, and none is here (TRITON_INTERPRET=1 before the start runs '
                'the kernels slowly on the CPU, for tests); stay with the default, "fused"'
            )
    elif torch.cuda.get_device_capability() < (8, 0):
        raise ConfigError(
            f'kernels.use("{mode}") needs a GPU of compute capability 8.0, and {torch.cuda.get_device_name()} is '
            f'{".".join(map(str, torch.cuda.get_device_capability()))}; stay with the default, "fused"'
        )


def on(x: Tensor) -> bool:
    """Whether a call with this input may run Triton kernels now."""
    if kernels.mode() not in kernels.TRITON or type(x) is not Tensor:
        return False
    if x.dtype not in DTYPES or not x.numel():
        return False
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:  # it would cast the input
        return False
    here = kind == "cuda" or (INTERPRETED and kind == "cpu")
    return here and not torch._C._are_functorch_transforms_active()


def faster(
    what: Sequence[Hashable], plain: Callable[..., Tensor], own: Callable[..., Tensor], *tensors: Tensor
) -> bool:
    """Whether to run `own(*tensors)` and not `plain(*tensors)`, which gives the same.

    Args:
        what: kind and sizes that the answer holds for; device, dtype and whether gradients follow are added.
    """
    if kernels.mode() == "triton":
        return True
    if torch.compiler.is_compiling():
        return False
    x, grads = tensors[0], torch.is_grad_enabled()
    key = (*what, str(x.device), str(x.dtype).removeprefix("torch."), "training" if grads else "inference")
    if key not in _seconds:
        if torch.cuda.is_current_stream_capturing():
            return False
        runs = (partial(_trial, way, tensors, grads) for way in (plain, own))
        first, second = (seconds(run, x.device) for run in runs)
        _seconds[key] = (first, second)
    first, second = _seconds[key]
    return second < first


def measured() -> dict[Hashable, tuple[float, float]]:
    """(kind, sizes, device, dtype, training or inference) -> seconds of torch's way and of the Triton kernel."""
    return dict(_seconds)


def bucket(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one run, launches included; the first ones, which may compile, do not count."""
    best = float("inf")
    for k in range(ROUNDS + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(TOGETHER):
            run()
        torch.cuda.synchronize(device)
        if k:
            best = min(best, (time.perf_counter() - start) / TOGETHER)
    return best


def _trial(way: Callable[..., Tensor], tensors: Sequence[Tensor], grads: bool) -> None:
    """One call, with its backward if gradients follow; hooks of a checkpoint around it see nothing of it."""
    leaves = [t.detach().requires_grad_(grads) for t in tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = way(*leaves)
        if grads:
            torch.autograd.grad(y, leaves, y.detach())


# ---------------------------------------------------------------------- the kernels, imported where one runs
def nf4_product(q: Nf4) -> Nf4Product:
    """The product of a weight in NF4; see `deltatune.kernels.triton_nf4`."""
    from deltatune.kernels.triton_nf4 import Nf4Product

    return Nf4Product(q)


def grouped(
    x: Tensor, a: Tensor, b: Tensor, sizes: Sequence[int], ranks: Sequence[int], plain: Callable[..., Tensor]
) -> Tensor | None:
    """`(rows, …, out)` for `x: (rows, …, in)` in runs of `sizes` rows; None where `plain(x, a, b)` is the way.

    See `deltatune.kernels.triton_lora`.
    """
    from deltatune.kernels.triton_lora import grouped_low_rank

    if type(a) is not Tensor or type(b) is not Tensor:  # held in parts by several processes
        return None
    each = x.shape[:-1].numel() // x.shape[0]
    tokens = [k * each for k in sizes]

    def own(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = grouped_low_rank(x.reshape(-1, x.shape[-1]), a, b, tokens, ranks)
        return y.view(*x.shape[:-1], b.shape[-2])

    n, r, inputs = a.shape
    what = ("grouped", bucket(sum(tokens)), bucket(n), bucket(r), b.shape[-2], inputs, len(set(sizes)) == 1)
    return own(x, a, b) if faster(what, plain, own, x, a, b) else None
