"""MiCA: Minor Component Adaptation (arXiv 2604.01694).

    W = U S Vᵀ:  B = the r columns of U with the smallest singular values, frozen;  A = 0

Only A trains, so the update stays in the directions that the weight uses least. A = 0, so the model starts as the
base.
"""

from __future__ import annotations

import torch

from deltatune.inits import Request, Start, register_init


@register_init("mica", freezes_b=True)
def mica(request: Request) -> Start:
    """The minor left singular vectors, orthonormal."""
    w = request.weight()
    u, _, _ = torch.linalg.svd(w, full_matrices=False)
    a = torch.zeros(*w.shape[:-2], request.r, w.shape[-1], device=w.device)
    return Start(a, u[..., -request.r :].contiguous(), freezes_b=True)
