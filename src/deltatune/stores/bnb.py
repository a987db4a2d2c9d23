"""bitsandbytes: 4-bit (NF4, FP4, double quantisation, any block size) and 8-bit weights.

Reading unpacks to the type the layer computes in. Writing quantises again with the weight's own settings, which rounds.
The library is imported only where one of its weights is met.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn

from deltatune.kernels.gpu import nf4_product
from deltatune.kernels.low_rank import Product
from deltatune.stores import Packed, register_layer, register_store
from deltatune.stores.grid import in_blocks, in_units, moved, stepped
from deltatune.stores.nf4 import ABSMAX_BLOCK, Nf4, from_codes, pack, unpack


class Bnb4Store:
    """`Params4bit`: two numbers a byte, with one scale per block."""

    exact = False
    dense_layer: ClassVar[type[nn.Module]] = nn.Linear
    leftovers = ("quant_state", "_may_repack")
    products = ("bitsandbytes.nn.modules.Linear4bit",)

    def shape(self, param: Any) -> torch.Size:
        state = param.quant_state
        return torch.Size(state.shape) if state is not None else torch.Size(param.shape)

    def dtype(self, param: Any) -> torch.dtype:
        state = param.quant_state
        dtype: torch.dtype = param.dtype if state is None else getattr(state, "original_dtype", state.dtype)
        return dtype

    def load(self, param: Any) -> Tensor:
        if param.quant_state is None:  # not moved to its device yet, so not packed
            return param.data.detach()  # type: ignore[no-any-return]
        data, state = _plain(param)
        shape = self.shape(param)
        if data.device.type == "cpu" and (shape[-1] % state.blocksize or state.blocksize > 4096):
            return _by_hand(data, state, shape).to(self.dtype(param))
        return functional.dequantize_4bit(data, state).view(shape).to(self.dtype(param))  # type: ignore[no-any-return]

    def product(self, layer: Any, x: Tensor) -> Product | None:
        """For NF4 that the layer multiplies in the dtype of `x`."""
        param = layer.weight
        state = param.quant_state
        if state is None or state.quant_type != "nf4" or _is_repacked(param):
            return None
        if layer.compute_dtype not in (None, x.dtype) or (state.nested and state.state2.blocksize != ABSMAX_BLOCK):
            return None
        return nf4_product(nf4_of(param))

    def save(self, param: Any, value: Tensor) -> nn.Parameter:
        packed, state = functional.quantize_4bit(
            value.to(param.device, self.dtype(param)).contiguous(),
            blocksize=param.blocksize,
            compress_statistics=param.compress_statistics,
            quant_type=param.quant_type,
            quant_storage=param.quant_storage,
        )
        return self._made(param, packed, state)

    def move(self, param: Any, change: Tensor, draw: Tensor, *, clip: bool = False) -> nn.Parameter:
        data, state = _plain(param)
        by = in_blocks(change.float(), _scales(state), state.blocksize)
        packed = data.view(torch.uint8)
        codes = unpack(packed, 2 * packed.numel())  # what fills the last byte stays
        new = moved(codes[: by.numel()], by, draw.reshape(-1), state.code.float(), clip=clip)
        words = pack(torch.cat([new, codes[by.numel() :]]))
        return self._made(param, words.view(-1).view(data.dtype).view(data.shape), _copy(state))

    def settle(self, layer: Any, still: bool) -> None:
        """At its first call outside training the layer repacks its weight for a CPU kernel of its own.

        The scales are rounded to bfloat16 for good, and no gradient passes the layer ever after.
        """
        if still:
            layer.__dict__.setdefault("_may_repack", getattr(layer, "support_avx512bf16_for_cpu", False))
            layer.support_avx512bf16_for_cpu = False
            if _is_repacked(layer.weight):
                layer.weight.data, _ = _put_back(layer.weight.data, layer.weight.quant_state)
        elif "_may_repack" in layer.__dict__:
            layer.support_avx512bf16_for_cpu = layer.__dict__.pop("_may_repack")

    def _made(self, param: Any, packed: Tensor, state: Any) -> nn.Parameter:
        made: nn.Parameter = Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=param.blocksize,
            compress_statistics=param.compress_statistics,
            quant_type=param.quant_type,
            quant_storage=param.quant_storage,
            module=param.module,
            bnb_quantized=True,
        )
        return made


def nf4_of(param: Any) -> Nf4:
    """A weight in NF4 as ours is kept; the tensors are the parameter's own."""
    state = param.quant_state
    double = (state.offset, state.state2.absmax) if state.nested else (None, None)
    packed = param.data.view(torch.uint8).reshape(-1, 1)
    return Nf4(packed, state.absmax, torch.Size(state.shape), state.dtype, state.blocksize, *double)


def _by_hand(data: Tensor, state: Any, shape: torch.Size) -> Tensor:
    """bitsandbytes' CPU kernel misreads blocks that do not end where rows do."""
    index = unpack(data.view(torch.uint8), shape.numel())
    return from_codes(index, _scales(state), state.code, state.blocksize).view(shape)


def _plain(param: Any) -> tuple[Tensor, Any]:
    """Bytes and state in the usual order; the parameter stays as it is."""
    if _is_repacked(param):
        return _put_back(param.data, _copy(param.quant_state))
    return param.data, param.quant_state


def _copy(state: Any) -> Any:
    """A state that may go to another device without the first."""
    made = copy.copy(state)
    if made.nested:
        made.state2 = copy.copy(made.state2)
    return made


def _is_repacked(param: Any) -> bool:
    return getattr(param.quant_state, "packing_format_for_cpu", False)


def _put_back(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Bytes in the usual order, and the state, changed to that: the scales have lost bits."""
    data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
    if not state.nested:  # those of double quantisation are in order
        state.absmax = state.absmax.mT.reshape(-1).float()
    return data, state


def _scales(state: Any) -> Tensor:
    """The float32 scale of each block."""
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax.float()  # type: ignore[no-any-return]


class Bnb8Store:
    """`Linear8bitLt`: one byte a number and one scale per output row, which the layer takes over at its first call."""

    exact = False
    #: it computes in float16 whatever the rest of the model is in
    own_dtype = False
    leftovers = ("state",)
    dense_layer: ClassVar[type[nn.Module]] = nn.Linear

    def shape(self, packed: Packed) -> torch.Size:
        return packed.tensors["weight"].shape

    def dtype(self, packed: Packed) -> torch.dtype:
        return torch.float16

    def load(self, packed: Packed) -> Tensor:
        weight, scale = packed.tensors["weight"], packed.about["SCB"]
        if scale is None:  # not on its device yet, so not quantised
            return weight.data.detach()
        numbers: Tensor = weight.data.float() * scale.float().unsqueeze(1) / 127
        return numbers

    def save(self, packed: Packed, value: Tensor) -> Packed:
        old: Any = packed.tensors["weight"]
        codes, scale, _ = functional.int8_vectorwise_quant(value.to(old.device, torch.float16).contiguous())
        return self._made(old, codes, scale)

    def move(self, packed: Packed, change: Tensor, draw: Tensor, *, clip: bool = False) -> Packed:
        weight, scale = packed.tensors["weight"], packed.about["SCB"]
        by = in_units(change.float(), scale.float().unsqueeze(1) / 127)
        return self._made(weight, stepped(weight.data, by, draw, -127, 127, clip=clip).to(torch.int8), scale)

    def _made(self, old: Any, codes: Tensor, scale: Tensor) -> Packed:
        made: Any = Int8Params(codes, requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        return Packed(self, {"weight": made}, {"SCB": scale})

    def gather(self, layer: Any) -> Packed:
        weight = layer._parameters["weight"]
        scale = getattr(weight, "SCB", None)
        return Packed(self, {"weight": weight}, {"SCB": layer.state.SCB if scale is None else scale})

    def scatter(self, layer: Any, packed: Packed) -> None:
        weight: Any = packed.tensors["weight"]
        weight.CB, weight.SCB = weight.data, packed.about["SCB"]  # the layer takes them at its next call
        layer.state.CB = layer.state.SCB = None
        layer._parameters["weight"] = weight


register_store("bitsandbytes.nn.modules.Params4bit", Bnb4Store())
register_layer("bitsandbytes.nn.modules.Linear8bitLt", Bnb8Store())
