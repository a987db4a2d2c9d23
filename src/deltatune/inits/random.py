"""Starts that need nothing but random numbers: LoRA's own, gaussian, orthogonal, and both factors random."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from deltatune.errors import ConfigError
from deltatune.inits import Request, Start, register_init


def _empty(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    *batch, out, inp = request.ref.shape
    device = request.ref.device
    return torch.empty(*batch, request.r, inp, device=device), torch.zeros(*batch, out, request.r, device=device)


@register_init("default")
def default(request: Request) -> Start:
    """A uniform in ±1/sqrt(in), B zero (loralib); embeddings: A zero, B standard normal."""
    a, b = _empty(request)
    if request.ref.op.looks_up:  # the factor that is indexed starts at zero
        nn.init.normal_(b)
        return Start(nn.init.zeros_(a), b)
    bound = 1 / math.sqrt(a.shape[-1])  # kaiming-uniform with a = sqrt 5
    return Start(nn.init.uniform_(a, -bound, bound), b)


@register_init("gaussian")
def gaussian(request: Request) -> Start:
    """A normal with standard deviation 1/r, B zero."""
    a, b = _empty(request)
    return Start(nn.init.normal_(a, std=1 / request.r), b)


def _even(config: Any, argument: str) -> None:
    if argument:
        raise ConfigError(f"init_lora_weights {config.init_lora_weights!r} is unknown; did you mean 'orthogonal'?")
    for r in (config.r, *(config.rank_pattern or {}).values()):
        if r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' splits r directions in two halves; r={r} is odd")


@register_init("orthogonal", check=_even)
def orthogonal(request: Request) -> Start:
    """Both factors non-zero with B A = 0: they use complementary halves of a random orthonormal basis of R^r.

    With Q (r, r) orthogonal, A = (N_in Q_odd)ᵀ / 10 and B = N_out Q_even / 10 for normal N (…, r/2); then
    B A ∝ N_out (Q_even Q_oddᵀ) N_inᵀ = 0. From https://datta0.github.io/posts/rethink-lora-init/, as in peft.
    """
    a, b = _empty(request)
    if a.is_meta:
        return Start(a, b)
    *batch, out, inp = request.ref.shape
    half = request.r // 2
    q, _ = torch.linalg.qr(torch.randn(*batch, request.r, request.r, device=a.device, dtype=torch.float64))
    odd, even = q[..., 0::2, :], q[..., 1::2, :]  # (…, r/2, r)
    a = (torch.randn(*batch, inp, half, device=a.device).double() @ odd).mT / 10
    b = torch.randn(*batch, out, half, device=a.device).double() @ even / 10
    return Start(a.float().contiguous(), b.float())


@register_init("random")
def random(request: Request) -> Start:
    """Both factors random (`init_lora_weights=False`): the model does not start as the base; for tests."""
    a, b = _empty(request)
    if request.ref.op.looks_up:
        return Start(nn.init.normal_(a), nn.init.normal_(b))
    bound = 1 / math.sqrt(a.shape[-1])
    return Start(
        nn.init.uniform_(a, -bound, bound), nn.init.uniform_(b, -1 / math.sqrt(request.r), 1 / math.sqrt(request.r))
    )
