"""bitsandbytes: 4-bit (NF4, FP4, double quantisation) and 8-bit weights.

Reading unpacks to the type the layer computes in. Writing back would round the change away, so `save` is refused; the
library is imported only where one of its weights is met.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.errors import CannotMergeError
from deltatune.stores import register_store


def _refuse() -> CannotMergeError:
    return CannotMergeError(
        "this base is stored in few bits, and merging into them would round the adapter away; load the base in 16 bits "
        "and merge there (deltatune merge does so)"
    )


class Bnb4Store:
    """`Params4bit`: two numbers a byte, with one scale per block."""

    exact = False

    def shape(self, param: Any) -> torch.Size:
        state = param.quant_state
        return torch.Size(state.shape) if state is not None else torch.Size(param.shape)

    def dtype(self, param: Any) -> torch.dtype:
        dtype: torch.dtype = param.quant_state.dtype if param.quant_state is not None else param.dtype
        return dtype

    def load(self, param: Any) -> Tensor:
        if param.quant_state is None:  # not moved to its device yet, so not packed
            return param.data.detach()  # type: ignore[no-any-return]
        from bitsandbytes import functional

        data, state = param.data, param.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # the layer repacked itself for its CPU kernel at the first inference, scales rounded to bfloat16; reading
            # wants the usual order, and the function that gives it writes into the state it is given
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        return functional.dequantize_4bit(data, state).view(self.shape(param))  # type: ignore[no-any-return]

    def save(self, param: Tensor, value: Tensor) -> nn.Parameter:
        raise _refuse()


class Bnb8Store:
    """`Int8Params`: one byte a number, with one scale per output row."""

    exact = False

    def shape(self, param: Tensor) -> torch.Size:
        return param.shape

    def dtype(self, param: Tensor) -> torch.dtype:
        return torch.float16

    def load(self, param: Any) -> Tensor:
        if param.SCB is None:
            return param.data.detach()  # type: ignore[no-any-return]
        return (param.data.float() * param.SCB.float().unsqueeze(1) / 127).to(torch.float16)  # type: ignore[no-any-return]

    def save(self, param: Tensor, value: Tensor) -> nn.Parameter:
        raise _refuse()


register_store("bitsandbytes.nn.modules.Params4bit", Bnb4Store())
register_store("bitsandbytes.nn.modules.Int8Params", Bnb8Store())
