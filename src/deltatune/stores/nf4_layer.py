"""`Nf4Linear`: a linear layer in NF4 in plain PyTorch, for any device; files are those of bitsandbytes.

    y = x dequant(W4)ᵀ + b        backward: dx = dy dequant(W4), unpacked again, so that nothing but x's shape is kept

The bytes and scales are buffers; `.to(dtype)` changes the type the layer computes in and never casts a scale.
`quantize_model` turns a model's linear layers into these in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune.errors import ConfigError
from deltatune.kernels.gpu import nf4_product
from deltatune.kernels.low_rank import Product
from deltatune.stores import Packed, register_layer
from deltatune.stores.nf4 import ABSMAX_BLOCK, BLOCK, NF4, Nf4, dequantize_nf4, dynamic_map, move_nf4, quantize_nf4

SCALES = ("absmax", "absmax2", "offset")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: Nf4Linear) -> Tensor:
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Nf4Linear], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


class Nf4Linear(nn.Module):
    """A frozen linear layer in 4 bits.

    Attributes:
        packed, absmax, absmax2, offset: as in `Nf4`; the last two None without double quantisation.
        block: numbers per block. dtype: the type the weight had and reads as.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    offset: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, q: Nf4, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.block, self.dtype = q.block, q.dtype
        own = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", own)
        for name in ("packed", *SCALES):
            self.register_buffer(name, getattr(q, name))

    @classmethod
    def of(cls, layer: nn.Linear, block: int = BLOCK, *, double: bool = True) -> Nf4Linear:
        """A layer in 4 bits with the weight and the bias of an ordinary one."""
        made = cls(quantize_nf4(layer.weight.detach(), block, double=double), layer.bias)
        made.training = layer.training
        return made

    @property
    def numbers(self) -> Nf4:
        """The weight as it is stored; its tensors are the layer's own."""
        shape = torch.Size([self.out_features, self.in_features])
        return Nf4(self.packed, self.absmax, shape, self.dtype, self.block, self.offset, self.absmax2)

    @property
    def weight(self) -> Tensor:
        """The unpacked weight, `(out, in)`, made anew at every look."""
        return dequantize_nf4(self.numbers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Nf4Linear:
        before = {name: self._buffers[name] for name in SCALES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, own in before.items():
            here = self._buffers[name]
            if own is not None and here is not None and here.dtype != own.dtype:
                self._buffers[name] = own.to(here.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return self

    # ------------------------------------------------------------------ files, as bitsandbytes writes them
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        for name, tensor in to_file(self.numbers).items():
            destination[f"{prefix}weight{name}"] = tensor

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        _, _, missing, unexpected, _ = rest
        own = {k: state[k] for k in state if k.startswith(f"{prefix}weight")}
        if f"{prefix}weight.absmax" not in own:
            missing.append(f"{prefix}weight.absmax")
            return
        q = from_file({k.removeprefix(f"{prefix}weight"): v for k, v in own.items()}, self.packed.device)
        self.block, self.dtype = q.block, q.dtype
        for name in ("packed", *SCALES):
            self._buffers[name] = getattr(q, name)
        if self.bias is not None:
            if f"{prefix}bias" not in state:
                missing.append(f"{prefix}bias")
                return
            bias = state[f"{prefix}bias"]
            self.bias = nn.Parameter(bias.to(self.packed.device), requires_grad=False)
        known = {f"{prefix}bias", *own}
        unexpected += [k for k in state if k.startswith(prefix) and k not in known]

    def extra_repr(self) -> str:
        double = self.offset is not None
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, block={self.block}, {double=}"


def to_file(q: Nf4) -> dict[str, Tensor]:
    """The tensors of a weight in a checkpoint of bitsandbytes, by what follows the weight's name."""
    about: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": q.block,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    found = {"": q.packed, ".absmax": q.absmax, ".quant_map": NF4.to(q.packed.device, copy=True)}
    if q.offset is not None and q.absmax2 is not None:
        about |= {"nested_blocksize": ABSMAX_BLOCK, "nested_dtype": "float32", "nested_offset": float(q.offset)}
        found |= {".nested_absmax": q.absmax2, ".nested_quant_map": dynamic_map().to(q.packed.device, copy=True)}
    text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8).clone()
    return {**found, ".quant_state.bitsandbytes__nf4": text.to(q.packed.device)}


def from_file(tensors: dict[str, Tensor], device: torch.device) -> Nf4:
    """The weight behind such tensors.

    Raises:
        ConfigError: it is not NF4.
    """
    state = tensors.get(".quant_state.bitsandbytes__nf4")
    if state is None:
        kinds = ", ".join(k.rpartition("__")[2] for k in tensors if "bitsandbytes__" in k) or "no quantisation state"
        raise ConfigError(f"a 4-bit weight in this file is not NF4 but {kinds}; load it with bitsandbytes instead")
    about = json.loads(bytes(state.cpu().tolist()))
    nested = "nested_offset" in about
    if nested and about["nested_blocksize"] != ABSMAX_BLOCK:
        raise ConfigError(f"scales in blocks of {about['nested_blocksize']} are not supported, only of {ABSMAX_BLOCK}")
    return Nf4(
        tensors[""].view(torch.uint8).reshape(-1, 1).to(device),
        tensors[".absmax"].to(device),
        torch.Size(about["shape"]),
        getattr(torch, about["dtype"]),
        about["blocksize"],
        torch.tensor(about["nested_offset"], device=device) if nested else None,
        tensors[".nested_absmax"].to(device) if nested else None,
    )


class Nf4Store:
    """The weight of an `Nf4Linear`."""

    exact = False
    dense_layer: ClassVar[type[nn.Module]] = nn.Linear
    products = ("deltatune.stores.nf4_layer.Nf4Linear",)

    def product(self, layer: Any, x: Tensor) -> Product | None:
        return nf4_product(layer.numbers)

    def shape(self, packed: Packed) -> torch.Size:
        shape: torch.Size = packed.about["shape"]
        return shape

    def dtype(self, packed: Packed) -> torch.dtype:
        dtype: torch.dtype = packed.about["dtype"]
        return dtype

    def load(self, packed: Packed) -> Tensor:
        about: dict[str, Any] = {**packed.tensors, **packed.about}
        return dequantize_nf4(Nf4(**about))

    def save(self, packed: Packed, value: Tensor) -> Packed:
        q = quantize_nf4(value.to(self.dtype(packed)), packed.about["block"], double="offset" in packed.tensors)
        return as_packed(q)

    def move(self, packed: Packed, change: Tensor, draw: Tensor, *, clip: bool = False) -> Packed:
        about: dict[str, Any] = {**packed.tensors, **packed.about}
        return as_packed(move_nf4(Nf4(**about), change, draw, clip=clip))

    def gather(self, layer: Any) -> Packed:
        return as_packed(layer.numbers)

    def scatter(self, layer: Any, packed: Packed) -> None:
        layer.block, layer.dtype = packed.about["block"], packed.about["dtype"]
        for name in ("packed", *SCALES):
            layer._buffers[name] = packed.tensors.get(name)


def as_packed(q: Nf4) -> Packed:
    tensors = {n: t for n in ("packed", *SCALES) if (t := getattr(q, n)) is not None}
    return Packed(STORE, tensors, {"shape": q.shape, "dtype": q.dtype, "block": q.block})


STORE = Nf4Store()
register_layer("deltatune.stores.nf4_layer.Nf4Linear", STORE)


def bitsandbytes_config(model: nn.Module) -> dict[str, Any]:
    """What a configuration says of a model that `quantize_model` has made, so that transformers reads its files."""
    layers = [m for m in model.modules() if isinstance(m, Nf4Linear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": layers[0].offset is not None,
        "bnb_4bit_compute_dtype": str(layers[0].dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [n for n, m in model.named_modules() if type(m) is nn.Linear] or None,
    }


def linear_layers(model: nn.Module, skip: Sequence[str] | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """(path, layer) of what is quantised: every linear layer but the output layers, or those not in `skip`.

    Args:
        skip: names of modules (or endings of their paths) that stay as they are; None leaves out the output layer, or
            the head of a classifier.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body: Any = getattr(model, "base_model", model) if head is None else model
    inside = set(body.modules()) if isinstance(body, nn.Module) else set(model.modules())
    for path, module in model.named_modules():
        if type(module) is not nn.Linear or (skip is None and (module is head or module not in inside)):
            continue
        if not any(path == s or path.endswith(f".{s}") or f".{s}." in f".{path}." for s in skip or ()):
            yield path, module


@torch.no_grad()
def quantize_model(
    model: nn.Module, block: int = BLOCK, *, double: bool = True, skip: Sequence[str] | None = None
) -> list[str]:
    """Puts the linear layers of a model into NF4, in place and one by one; gives their paths.

    Raises:
        ConfigError: there is nothing to quantise, or a block that is no positive even number.
    """
    if block < 2 or block % 2:
        raise ConfigError(f"block must be an even number of at least 2, not {block!r}")
    found = list(linear_layers(model, skip))
    if not found:
        raise ConfigError(f"{type(model).__name__} has no linear layer to put into 4 bits")
    for path, layer in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Nf4Linear.of(layer, block, double=double))
    return [path for path, _ in found]
