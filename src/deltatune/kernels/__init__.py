"""Faster ways to the same numbers, for training in eager mode. The plain path is the definition and stays.

    with kernels.use("plain"): ...        or DELTATUNE_KERNELS=plain in the environment

- `"fused"` (the default): one autograd node for an adapted linear layer, or for several that read one input, the base's
  products included. The input is kept once, in its own dtype, for all layers that read it; casts and dropout are made
  again in backward.
- `"lean"`: as `"fused"`, but what magnitudes need of a layer's output is computed again in backward, too, instead of
  kept: less memory for one more product of the base.
- `"plain"`: ordinary autograd of what the methods write.
- `"triton"`: as `"fused"`, and Triton's kernels for mixed batches and for NF4 weights with their low-rank change, where
  tensors are on a GPU, in 32 or 16 bits, and autocast would not cast them.
- `"measure"`: as `"triton"`, but each of those is timed against torch's way first, once per size, on the GPU that is
  there, and the faster one is kept (`deltatune.kernels.gpu.measured()` shows the times).

Compiled code, `torch.func` transforms, sharded tensors and layers that are no plain linear maps always take the plain
path; the compiler fuses and recomputes by itself. Only in mode `"triton"` compiled code runs those two kernels, as
operators that the compiler does not look into.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from deltatune.errors import ConfigError

MODES = ("fused", "lean", "plain", "triton", "measure")
#: modes with Triton's kernels
TRITON = ("triton", "measure")


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise ConfigError(f"kernels are {', '.join(MODES)}, not {mode!r}")
    if mode in TRITON:
        from deltatune.kernels.gpu import require

        require(mode)
    return mode


_mode = _checked(os.environ.get("DELTATUNE_KERNELS", "fused"))


def mode() -> str:
    """The mode that calls run in now."""
    return _mode


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Runs the body in another mode. Backward follows what its forward did.

    Raises:
        ConfigError: there is no such mode, or no GPU or no Triton for it.
    """
    global _mode
    before, _mode = _mode, _checked(name)
    try:
        yield
    finally:
        _mode = before


def possible() -> bool:
    """Whether kernels may run in this call at all."""
    return _mode != "plain" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
