"""QPiSSA (arXiv 2404.02948) and LoftQ (arXiv 2310.08659) with the base they belong to: quantise and start together.

    QPiSSA  (B, A) = the r principal directions of W;  Q = NF4(W - s B A); again from W - Q, T rounds
    LoftQ   Q = NF4(W);  (B, A) = the r principal directions of W - Q;  again from W - s B A, T rounds

The model starts as Q + s B A, which is nearer to W than NF4(W) is. Q belongs to this adapter alone: save the base too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltatune.config import TargetedConfig
from deltatune.core.edits import Edit, LowRank
from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.mapping import get_peft_model
from deltatune.peft_model import PeftModel
from deltatune.stores.nf4 import BLOCK, dequantize_nf4, quantize_nf4
from deltatune.stores.nf4_layer import Nf4Linear, linear_layers, quantize_model


@torch.no_grad()
def quantize_and_adapt(
    model: nn.Module,
    config: TargetedConfig,
    start: str = "qpissa",
    *,
    rounds: int = 5,
    block: int = BLOCK,
    double: bool = False,
    adapter_name: str = "default",
) -> PeftModel:
    """Puts a dense model into NF4, its adapted layers so that Q and the adapter's start make up the weight.

    Args:
        config: of LoRA, or of another method with a plain pair of factors, as if it started by default.
        start: `"qpissa"` or `"loftq"`. rounds: T; the best round of each layer is kept.
        double: quantise the scales too, which the paper's code does not.

    Raises:
        ConfigError: an unknown start, an init of the configuration's own, or a layer that is no dense linear one.
    """
    from deltatune.inits.loftq import alternate
    from deltatune.inits.pissa import split

    if start not in ("qpissa", "loftq"):
        raise ConfigError(f'start must be "qpissa" or "loftq", not {start!r}')
    settings: Any = config
    if getattr(settings, "init_lora_weights", None) is not True:
        raise ConfigError(f"{start} is the start here, so init_lora_weights must be True, the default")

    def there_and_back(w: torch.Tensor) -> torch.Tensor:
        return dequantize_nf4(quantize_nf4(w, block, double=double))

    starts: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    sites = config.sites(model)
    for site in sites:  # the model is as it was if one is refused
        _check(config, model, site, start)
    for site in sites:
        layer: Any = model.get_submodule(site.path)
        r, scale = settings.pair(site.name)
        w = layer.weight.detach().float()
        low, q = alternate(w, r, rounds, there_and_back, principal_first=start == "qpissa")
        made = split(*low, scale)
        starts[site.path] = made.a, made.b
        parent, _, name = site.path.rpartition(".")
        quantised = quantize_nf4(q.to(layer.weight.dtype), block, double=double)
        setattr(model.get_submodule(parent), name, Nf4Linear(quantised, layer.bias))
    if any(True for _ in linear_layers(model)):
        quantize_model(model, block, double=double)
    adapted: PeftModel = get_peft_model(model, config, adapter_name=adapter_name)
    for edit in adapted.adapters.edits[adapter_name]:
        pair: Any = edit
        a, b = starts[str(edit.host.path)]
        pair.lora_A.fill(a)
        pair.lora_B.fill(b)
    return adapted


def _check(config: TargetedConfig, model: nn.Module, site: Site, start: str) -> None:
    """Raises ConfigError for a layer or an adapter of it that cannot start so."""
    layer = model.get_submodule(site.path)
    if type(layer) is not nn.Linear or site.parameter != "weight" or site.rows is not None:
        raise ConfigError(f"{start} needs dense linear layers, and {site.name!r} is a {type(layer).__name__}")
    with torch.device("meta"):
        made = config.build(WeightRef(layer), site)
    for edit in [made] if isinstance(made, Edit) else made:
        if not isinstance(edit, LowRank) or not hasattr(edit, "lora_A"):
            raise ConfigError(f"{start} fills a plain pair of factors, which {type(edit).__name__} does not have")
