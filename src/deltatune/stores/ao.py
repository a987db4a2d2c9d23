"""torchao: weights that are tensor subclasses in an ordinary linear layer (int8, int4, intx, NF4, float8).

Reading asks the tensor to unpack itself. Writing quantises again with the settings that the tensor carries; a kind that
is not in `MAKERS` trains and merges into dense weights, and only writing back is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltatune.errors import CannotMergeError
from deltatune.stores import register_store
from deltatune.stores.grid import in_blocks, in_units, moved, stepped
from deltatune.stores.nf4 import pack, unpack


def _granularity(param: Any) -> Any:
    """What torchao calls the blocks of a tensor: whole, by row or by group."""
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

    block, shape = list(param.block_size), list(param.shape)
    if block == shape:
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def _int8(param: Any, value: Tensor) -> Tensor:
    made: Tensor = type(param).from_hp(
        value, granularity=_granularity(param), act_quant_kwargs=param.act_quant_kwargs, reduce_range=param.reduce_range
    )
    return made


def _intx(param: Any, value: Tensor) -> Tensor:
    """Groups that still fit their grid keep it, since torchao's own choice does not give a grid back."""
    from torchao.quantization.quant_primitives import MappingType

    kind = MappingType.ASYMMETRIC if bool(param.zero_point.any()) else MappingType.SYMMETRIC
    block, same = tuple(param.block_size), {"activation_quantization": param.activation_quantization}
    new: Any = type(param).from_hp(value, block, param.target_dtype, mapping_type=kind, **same)
    half = 2 ** (int(str(param.target_dtype).removeprefix("torch.int")) - 1)
    groups = value.float().view(*value.shape[:-1], -1, block[-1])  # (out, groups, n)
    at = groups / param.scale.float().unsqueeze(-1) + param.zero_point.float().unsqueeze(-1)
    fits = ((at > -half - 0.5) & (at < half - 0.5)).all(-1)
    made: Tensor = type(param).from_hp(
        value,
        block,
        param.target_dtype,
        intx_choose_qparams_algorithm=None,
        custom_scale=torch.where(fits, param.scale, new.scale),
        custom_zero_point=torch.where(fits, param.zero_point, new.zero_point),
        **same,
    )
    return made


def _int4(param: Any, value: Tensor) -> Tensor:
    made: Tensor = type(param).from_hp(value.to(torch.bfloat16), list(param.block_size))
    return made


def _float8(param: Any, value: Tensor) -> Tensor:
    made: Tensor = type(param).from_hp(
        value,
        float8_dtype=param.qdata.dtype,
        granularity=_granularity(param),
        mm_config=param.mm_config,
        kernel_preference=param.kernel_preference,
        act_quant_kwargs=param.act_quant_kwargs,
    )
    return made


def _nf4(param: Any, value: Tensor) -> Tensor:
    made: Tensor = type(param).from_tensor(value.contiguous(), param.block_size, param.scaler_block_size)
    return made


def _with(param: Any, **tensors: Tensor) -> Tensor:
    """The tensor with others of its parts in their places."""
    names, about = param.__tensor_flatten__()
    parts = {name: getattr(param, name) for name in names} | tensors
    made: Tensor = type(param).__tensor_unflatten__(parts, about, param.shape, param.stride())
    return made


def _scale(param: Any) -> Tensor:
    """The scale of every number."""
    scale: Tensor = param.scale.float()
    blocks = [n // b for n, b in zip(param.shape, param.block_size, strict=True)]
    for axis, (n, count) in enumerate(zip(param.shape, blocks, strict=True)):
        scale = scale.view(*scale.shape[:axis], count, *blocks[axis + 1 :]).repeat_interleave(n // count, axis)
    return scale


def _move_whole(param: Any, change: Tensor, draw: Tensor, clip: bool) -> Tensor:
    kind = torch.iinfo(param.qdata.dtype)
    low, high = kind.min, kind.max
    if hasattr(param, "target_dtype"):  # fewer bits than the type they are kept in
        high = 2 ** (int(str(param.target_dtype).removeprefix("torch.int")) - 1) - 1
        low = -high - 1
    by = in_units(change, _scale(param))
    return _with(param, qdata=stepped(param.qdata, by, draw, low, high, clip=clip).to(param.qdata.dtype))


def _move_float8(param: Any, change: Tensor, draw: Tensor, clip: bool) -> Tensor:
    every = torch.arange(256, dtype=torch.uint8, device=change.device).view(param.qdata.dtype).float()
    levels = torch.unique(every[every.isfinite()])  # sorted; one zero
    there = param.qdata.float().view(-1)
    code = torch.bucketize(there, levels).clamp_(max=len(levels) - 1)  # torchao gives rows of zeros no number
    new = moved(code, in_units(change, _scale(param)).view(-1), draw.reshape(-1), levels, clip=clip)
    numbers = torch.where(new == code, there, levels[new])  # also a zero keeps its sign
    return _with(param, qdata=numbers.to(param.qdata.dtype).view_as(param.qdata))


def _move_nf4(param: Any, change: Tensor, draw: Tensor, clip: bool) -> Tensor:
    scales = param.dequantize_scalers(param.quantized_scalers, param.quantization_factor, param.scaler_block_size)
    code = unpack(param.quantized_data, change.numel())
    by = in_blocks(change, scales.float(), param.block_size)
    new = moved(code, by, draw.reshape(-1), param.nf4.float(), clip=clip)
    made: Any = type(param).from_tensor(param.get_original_weight(), param.block_size, param.scaler_block_size)
    for name in ("quantized_scalers", "quantization_factor", "scaler_mean", "nf4"):
        setattr(made, name, getattr(param, name))
    made.quantized_data = pack(new).view_as(param.quantized_data)
    return made  # type: ignore[no-any-return]


#: name of a tensor class -> how its numbers move on the grid that is there
MOVERS: dict[str, Callable[[Any, Tensor, Tensor, bool], Tensor]] = {
    "Int8Tensor": _move_whole,
    "IntxUnpackedToInt8Tensor": _move_whole,
    "Float8Tensor": _move_float8,
    "NF4Tensor": _move_nf4,
}
#: name of a tensor class -> how a tensor with the same settings is made of other numbers
MAKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4,
    "Float8Tensor": _float8,
    "NF4Tensor": _nf4,
}


class TorchAoStore:
    """One of torchao's tensors."""

    exact = False
    dense_layer: ClassVar[type[nn.Module]] = nn.Linear

    def shape(self, param: Tensor) -> torch.Size:
        return param.shape

    def dtype(self, param: Tensor) -> torch.dtype:
        return param.dtype

    def load(self, param: Any) -> Tensor:
        with torch.no_grad():
            unpack = getattr(param, "get_original_weight", None) or param.dequantize
            return unpack().detach()  # type: ignore[no-any-return]

    def save(self, param: Any, value: Tensor) -> nn.Parameter:
        name = type(param.data).__name__
        if name not in MAKERS:
            raise CannotMergeError(
                f"torchao's {name} cannot be written back; merge into dense weights instead (the default)"
            )
        with torch.no_grad():
            made = MAKERS[name](param, value.to(param.device, param.dtype).contiguous())
        return nn.Parameter(made, requires_grad=False)

    def move(self, param: Any, change: Tensor, draw: Tensor, *, clip: bool = False) -> nn.Parameter:
        name = type(param.data).__name__
        if name not in MOVERS:
            raise CannotMergeError(
                f"torchao's {name} cannot be rounded with dither; merge into dense weights (the default), or ask for "
                'rounding="nearest"'
            )
        with torch.no_grad():
            made = MOVERS[name](param, change.to(param.device).float(), draw, clip)
        return nn.Parameter(made, requires_grad=False)


_STORE = TorchAoStore()
register_store("torchao.utils.TorchAOBaseTensor", _STORE)
for _place in ("dtypes.nf4tensor", "quantization.quantize_.workflows.nf4.nf4_tensor"):  # it moved between releases
    register_store(f"torchao.{_place}.NF4Tensor", _STORE)
