"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (arXiv 2404.02948).

    W = U S Vᵀ:  B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_rᵀ,  y = W x + s · (B A - B0 A0) x

so s · B0 A0 is the best rank-r approximation of W, and training moves its principal directions. `"pissa"` takes
the exact SVD; `"pissa_niter_N"` a randomised one with N subspace iterations (16 is close to exact).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltatune.errors import ConfigError
from deltatune.inits import Request, Start, register_init


def split(u: Tensor, s: Tensor, vt: Tensor, scale: float) -> Start:
    """The pair whose product is `u diag(s) vt / scale`, sqrt(s) in each factor; `u: (…, out, r)`."""
    root = (s / scale).sqrt()
    return Start(root.unsqueeze(-1) * vt, u * root.unsqueeze(-2), offset=True)


def principal(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular triplets of `w: (…, out, in)`: `(…, out, r)`, `(…, r)`, `(…, r, in)`."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[..., :r], s[..., :r], vt[..., :r, :]


def principal_fast(w: Tensor, r: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `principal`, by randomised subspace iteration (arXiv 0909.4061)."""
    u, s, v = torch.svd_lowrank(w, q=r, niter=iterations)
    return u, s, v.mT


@register_init("pissa", offset=True)
def pissa(request: Request) -> Start:
    """The principal part of the weight, exact."""
    return split(*principal(request.weight(), request.r), request.scale)


def _check_iterations(config: Any, argument: str) -> None:
    if not argument.isdecimal():
        raise ConfigError(
            f"init_lora_weights {config.init_lora_weights!r} has no number of iterations; write 'pissa_niter_16'"
        )


# a randomised start comes out differently when it is computed again, so files must hold it
@register_init("pissa_niter", check=_check_iterations, offset=True, derivable=False)
def pissa_niter(request: Request) -> Start:
    """The principal part of the weight, by a randomised SVD."""
    return split(*principal_fast(request.weight(), request.r, int(request.argument)), request.scale)
