"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models (arXiv 2406.01775).

    W = Q R (QR decomposition):  B0 = Q_r,  A0 = R_r,  y = W x + s · (B A - B0 A0) x

B starts with orthonormal columns.
"""

from __future__ import annotations

import torch

from deltatune.inits import Request, Start, register_init


@register_init("olora", offset=True)
def olora(request: Request) -> Start:
    """The first r columns of Q and rows of R; the scale is not divided out, as in the paper's code."""
    q, r = torch.linalg.qr(request.weight())
    return Start(r[..., : request.r, :].contiguous(), q[..., : request.r].contiguous(), offset=True)
