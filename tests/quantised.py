"""The quantised storages that tests run over: how a linear layer is put into each, and what of it is stored."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltatune.core.ops import LINEAR, register_op
from deltatune.stores import Packed, quantised, register_layer
from deltatune.stores.gptq import AwqStore, GptqStore, pack_columns, pack_rows
from deltatune.stores.nf4_layer import Nf4Linear


class GridLinear(nn.Module):
    """A layer with the tensors of gptqmodel's, which does not install beside every torch."""

    bits, group_size, awq = 4, 16, False

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        group = torch.arange(self.in_features) // self.group_size
        w = layer.weight.detach().mT  # (in, out)
        parts = w.unflatten(0, (-1, self.group_size))
        low, high = parts.amin(1), parts.amax(1)
        scale = ((high - low) / (2**self.bits - 1)).half()
        zero = (-low / scale.float()).round().clamp(0, 2**self.bits - 1)
        q = (w / scale.float()[group] + zero[group]).round().clamp(0, 2**self.bits - 1).int()
        words = pack_columns(q, self.bits, awq=True) if self.awq else pack_rows(q, self.bits)
        self.register_buffer("qweight", words)
        self.register_buffer("qzeros", pack_columns(zero.int() - self.shift, self.bits, awq=self.awq))
        self.register_buffer("scales", scale)
        if not self.awq:
            self.register_buffer("g_idx", group.int())
        self.register_buffer("bias", layer.bias.detach().clone())

    @property
    def shift(self) -> int:
        return 0 if self.awq else 1

    def qzero_format(self) -> int:
        return 1

    def forward(self, x: Tensor) -> Tensor:
        store = quantised(self).store
        return nn.functional.linear(x, store.load(quantised(self)).to(x.dtype), self.bias.to(x.dtype))


class AwqGridLinear(GridLinear):
    awq = True


for _cls, _store in ((GridLinear, GptqStore()), (AwqGridLinear, AwqStore())):
    register_layer(f"{_cls.__module__}.{_cls.__qualname__}", _store)
    register_op(f"{_cls.__module__}.{_cls.__qualname__}", LINEAR)


def bnb4(kind: str, block: int = 64, double: bool = True) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb

        out, inp = layer.weight.shape
        made = bnb.nn.Linear4bit(inp, out, compute_dtype=torch.float32, quant_type=kind, compress_statistics=double)
        made.weight = bnb.nn.Params4bit(
            layer.weight.data,
            requires_grad=False,
            blocksize=block,
            quant_type=kind,
            compress_statistics=double,
            module=made,
        )
        made.bias = layer.bias
        return made.to("cpu")

    return make


def bnb8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    out, inp = layer.weight.shape
    made = bnb.nn.Linear8bitLt(inp, out, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


def ao(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        config = {
            "int8": lambda: Int8WeightOnlyConfig(version=2),
            "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
            "float8": lambda: Float8WeightOnlyConfig(),
        }[kind]()
        holder = nn.Sequential(layer)
        quantize_(holder, config)
        return holder[0]

    return make


def ao_nf4(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import NF4Tensor

    layer.weight = nn.Parameter(NF4Tensor.from_tensor(layer.weight.data, 64, 16), requires_grad=False)
    return layer


def hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def make(layer: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        options = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        layer.requires_grad_(False)
        return HQQLinear(layer, options, compute_dtype=torch.float32, device="cpu")

    return make


def native(double: bool) -> Callable[[nn.Linear], nn.Module]:
    return lambda layer: Nf4Linear.of(layer, double=double)


#: name -> (package it needs, how a linear layer gets it)
ALL: dict[str, tuple[str, Callable[[nn.Linear], nn.Module]]] = {
    "nf4": ("torch", native(True)),
    "nf4_single": ("torch", native(False)),
    "bnb_nf4": ("bitsandbytes", bnb4("nf4")),
    "bnb_nf4_128_single": ("bitsandbytes", bnb4("nf4", 128, double=False)),
    "bnb_fp4": ("bitsandbytes", bnb4("fp4")),
    "bnb_int8": ("bitsandbytes", bnb8),
    "ao_int8": ("torchao", ao("int8")),
    "ao_int4": ("torchao", ao("int4")),
    "ao_float8": ("torchao", ao("float8")),
    "ao_nf4": ("torchao", ao_nf4),
    "hqq_4": ("hqq", hqq(4)),
    "hqq_8": ("hqq", hqq(8)),
    "gptq": ("torch", GridLinear),
    "awq": ("torch", AwqGridLinear),
}
HERE = {name: make for name, (package, make) in ALL.items() if importlib.util.find_spec(package) is not None}


def stored(layer: nn.Module) -> list[Tensor]:
    """Copies of everything a quantised layer stores of its weight."""
    weight = quantised(layer)
    if isinstance(weight, Packed):
        extra = [v for v in weight.about.values() if isinstance(v, Tensor)]
        return [t.detach().clone() for t in [*weight.tensors.values(), *extra]]
    if hasattr(weight.data, "__tensor_flatten__"):
        names, _ = weight.data.__tensor_flatten__()
        return [getattr(weight.data, name).clone() for name in names]
    state = weight.quant_state
    return [weight.data.clone(), state.absmax.clone()]
