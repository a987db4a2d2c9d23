"""The small networks that the laws run on: one per kind of layer, each with a `layer` to adapt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltatune import PeftModel, get_peft_model
from deltatune.config import TargetedConfig, known_methods
from deltatune.errors import DeltatuneError
from quantised import HERE


class Net(nn.Module):
    """`layer`, a non-linearity and a `head`; the output is `(B, n)`."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, 5)

    def hidden(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        h = h.flatten(2).mean(-1) if h.ndim > 3 or isinstance(self.layer, nn.Conv1d) else h
        h = h.mean(1) if h.ndim == 3 else h
        return self.head(torch.tanh(self.norm(h)))


class AttentionNet(Net):
    def hidden(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how to make its network, and an input of 6 rows.

    Attributes:
        loose: what the layer's own arithmetic adds to a tolerance (int8 multiplication).
        pickles: False for layers whose library cannot pickle them.
        casts: False for layers that stay in the type they were quantised from.
    """

    name: str
    net: Callable[[], Net]
    x: Callable[[], Tensor]
    loose: float = 0.0
    pickles: bool = True
    casts: bool = True


def _conv1d_transposed() -> Net:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(16, 12)
    nn.init.normal_(layer.weight, std=0.2)
    nn.init.normal_(layer.bias)
    return Net(layer, 16)


def _norm() -> nn.Module:
    layer = nn.LayerNorm(16)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


KINDS = [
    Kind("linear", lambda: Net(nn.Linear(12, 16), 16), lambda: torch.randn(6, 3, 12)),
    Kind("conv1d_hf", _conv1d_transposed, lambda: torch.randn(6, 3, 12)),
    Kind("embedding", lambda: Net(nn.Embedding(20, 16), 16), lambda: torch.randint(0, 20, (6, 3))),
    Kind("conv1d", lambda: Net(nn.Conv1d(8, 16, 3, padding=1), 16), lambda: torch.randn(6, 8, 5)),
    Kind("conv2d", lambda: Net(nn.Conv2d(8, 16, 3, stride=2, dilation=1), 16), lambda: torch.randn(6, 8, 7, 7)),
    Kind("conv2d_groups", lambda: Net(nn.Conv2d(8, 16, 3, groups=2), 16), lambda: torch.randn(6, 8, 5, 5)),
    Kind("conv3d", lambda: Net(nn.Conv3d(4, 16, 2, padding=1), 16), lambda: torch.randn(6, 4, 3, 3, 3)),
    Kind(
        "multihead",
        lambda: AttentionNet(nn.MultiheadAttention(16, 4, batch_first=True), 16),
        lambda: torch.randn(6, 3, 16),
    ),
    Kind("layernorm", lambda: Net(_norm(), 16), lambda: torch.randn(6, 3, 16)),
]

#: those whose weight is a matrix
MATRICES = [kind for kind in KINDS if kind.name != "layernorm"]


def _quantised(name: str) -> Kind:
    def net() -> Net:
        made = Net(nn.Linear(64, 32), 32)
        made.layer = HERE[name](made.layer)
        made.layer.support_avx512bf16_for_cpu = False  # bitsandbytes would repack the bytes in inference
        return made

    loose, library = 2e-2 * (name == "bnb_int8"), name.partition("_")[0]
    return Kind(f"linear_{name}", net, lambda: torch.randn(6, 3, 64), loose, library != "ao", library != "hqq")


#: linear layers in the quantised storages that are installed: each stands for its family
QUANTISED = [_quantised(n) for n in ("nf4", "bnb_nf4", "bnb_int8", "ao_int8", "hqq_4", "gptq") if n in HERE]
STORES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
METHOD_NAMES = sorted(
    name
    for method, cls in known_methods().items()
    if cls.__module__.startswith("deltatune.")
    for name in (method, *(f"{method}+{variant}" for variant in cls.variants if "variants" in vars(cls)))
)


def config_for(method: str, **options: object) -> TargetedConfig:
    """A small configuration of a method that adapts `layer`."""
    method, _, variant = method.partition("+")
    cls = known_methods()[method]
    if variant:
        options = {**cls.variants[variant], **options}
    assert issubclass(cls, TargetedConfig)
    return cls.example(target_modules=["layer"], **options)


def make(method: str, kind: Kind, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[PeftModel, Tensor]:
    """A fresh adapted network and its input; raises `DeltatuneError` where the method refuses the layer."""
    torch.manual_seed(seed)
    net, x = kind.net().to(dtype).eval(), kind.x()
    x = x.to(dtype) if x.is_floating_point() else x
    return get_peft_model(net, config_for(method)), x


def shake(model: PeftModel, adapter: str = "default", scale: float = 0.2, seed: int = 1) -> None:
    """Moves every trained tensor of an adapter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for edit in model.adapters.edits[adapter]:
            for p in edit.trainable():
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * scale)


def refusal(method: str, kind: Kind) -> str | None:
    """Why a method does not take this kind of layer; None if it does."""
    try:
        make(method, kind)
    except DeltatuneError as error:
        return str(error)
    return None
