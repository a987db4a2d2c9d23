"""LoftQ: LoRA-Fine-Tuning-Aware Quantization (arXiv 2310.08659); QPiSSA's alternation (arXiv 2404.02948) beside it.

    Q_0 = q(W);  s · B_t A_t = SVD_r(W - Q_{t-1}),  Q_t = q(W - s · B_t A_t)      q: normal floats, blocks of 64
    B0, A0: the round that leaves the least of W - Q - s · B A

On a dense base the base is not quantised: the adapter applies s · (B A - B0 A0) to W, so the model starts as the
base, and what it trains fits a base in few bits. There, without A0 and B0, Q + s · B A = (W + s · (B A - B0 A0)) - E
with E = W - Q - s · B0 A0 the error LoftQ has made small; `loftq_weights` gives the Q of every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import Request, Start, options_of, register_init
from deltatune.inits.pissa import principal, split
from deltatune.stores.nf4 import round_trip

BITS = (2, 4, 8)


@dataclass
class LoftQConfig:
    """Options of `init_lora_weights="loftq"`.

    Args:
        loftq_bits: of the quantised base that the adapter is for: 2, 4 or 8.
        loftq_iter: rounds of the alternation; the best round is kept.

    Raises:
        ConfigError: other bits, or no round.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in BITS:
            raise ConfigError(f"loftq_config: loftq_bits must be 2, 4 or 8, not {self.loftq_bits!r}")
        if not isinstance(self.loftq_iter, int) or self.loftq_iter < 1:
            raise ConfigError(f"loftq_config: loftq_iter must be a whole number of at least 1, not {self.loftq_iter!r}")


Triplets = tuple[Tensor, Tensor, Tensor]


def alternate(
    w: Tensor, r: int, rounds: int, quantise: Callable[[Tensor], Tensor], *, principal_first: bool = False
) -> tuple[Triplets, Tensor]:
    """((u, s, vt) of rank r, Q) such that `Q + u diag(s) vt` is close to `w: (…, out, in)`; the best round's.

    Args:
        quantise: to a storage format and back.
        principal_first: QPiSSA: the pair starts as the principal part of `w` and Q is what is left of it, quantised.
    """
    q = ba = torch.zeros_like(w)
    best: tuple[float, Triplets, Tensor] | None = None
    for _ in range(rounds):
        if principal_first:
            low = principal(w - q, r)
            q = quantise(w - product(low))
        else:
            q = quantise(w - ba)
            low = principal(w - q, r)
        ba = product(low)
        error = float((w - q - ba).norm())
        if best is None or error < best[0]:
            best = (error, low, q)
    assert best is not None
    return best[1], best[2]


def product(low: Triplets) -> Tensor:
    u, s, vt = low
    return u * s.unsqueeze(-2) @ vt


@register_init("loftq", option="loftq_config", options=LoftQConfig, offset=True)
def loftq(request: Request) -> Start:
    """The pair that makes up for the quantisation of the weight."""
    if not request.ref.store.exact:
        raise ConfigError(
            f"init 'loftq' starts from the weight in full precision, and {request.site!r} is quantised already; start "
            "from a base in full precision, or use another init"
        )
    low, _ = _decompose(request.ref, request.weight(), request.r, request.config)
    return split(*low, request.scale)


def _decompose(ref: WeightRef, w: Tensor, r: int, config: Any) -> tuple[Triplets, Tensor]:
    options: LoftQConfig = options_of(config, "loftq_config", LoftQConfig)

    def quantise(x: Tensor) -> Tensor:
        # blocks run through the numbers in the order in which the parameter holds them
        stored = ref.op.stored(x, ref.raw_shape) if ref.rows is None else x
        back = round_trip(stored.contiguous(), options.loftq_bits)
        return ref.op.matrix(back) if ref.rows is None else back

    return alternate(w, r, options.loftq_iter, quantise)


@torch.no_grad()
def loftq_weights(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """name of a parameter -> its Q, dequantised: the base's weights under which A and B run alone.

    Exact in `loftq_bits` (quantising it again gives the same codes); save it for a base that is loaded in few bits.

    Raises:
        ConfigError: the adapter does not start by LoftQ.
    """
    from deltatune.inits.data import base_of, spots_of

    root, adapters = base_of(model)
    if adapters is None:
        raise ConfigError("loftq_weights needs a model with an adapter")
    adapters.check(adapter_name)
    config: Any = adapters.configs[adapter_name]
    if getattr(config, "init_name", "") != "loftq":
        raise ConfigError(f'adapter {adapter_name!r} does not start by LoftQ; use init_lora_weights="loftq"')
    names = {id(module): path for path, module in root.named_modules()}
    found: dict[str, Tensor] = {}
    for spot in spots_of(model, config):
        ref = spot.ref
        name = f"{names[id(ref.owner)]}.{ref.leaf}".lstrip(".")
        _, q = _decompose(ref, ref.load(), spot.r, config)
        full = found.get(name)
        whole = ref.load_full() if full is None else ref.op.matrix(full.float())
        found[name] = ref.stored(ref.put(whole, q)).to(ref.dtype).contiguous()
    return found
