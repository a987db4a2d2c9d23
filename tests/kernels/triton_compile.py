"""Compiles the kernels as they are launched, for GPUs that need not be here; `test_triton.py` runs it.

Triton makes a constant of every number that is 1, here of strides and of a single row.
"""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltatune.kernels import triton_lora, triton_nf4

POINTERS = {
    **dict.fromkeys(("tiles", "offsets", "ranks"), "*i32"),
    **dict.fromkeys(("x", "w", "out", "p", "q", "bias", "h", "y"), "*bf16"),
    **dict.fromkeys(("absmax2", "offset", "codes", "codes8"), "*fp32"),
    "packed": "*u8",
    "absmax": "*u8",
    "s": "fp32",
}
SHRINK = {"LIMIT_J": True, "LIMIT_L": False, "X_PARTS": 1, "PARTS": 8, "M": 16, "BJ": 16, "BL": 64}
EXPAND = {"LIMIT_J": False, "LIMIT_L": True, "X_PARTS": 8, "PARTS": 1, "M": 64, "BJ": 64, "BL": 16}
OF_A = {"LIMIT_I": True, "LIMIT_J": False, "BT": 32, "BI": 16, "BJ": 64}
OF_B = {"LIMIT_I": False, "LIMIT_J": True, "BT": 32, "BI": 64, "BJ": 16}
ONE_ROW = {"BACK": False, "DOUBLE": True, "BIAS": True, "PAIR": True, "BLOCK": 64, "BLOCK2": 256, "BY_ROW": True}
ONE_ROW |= {"INDEX": tl.int32, "DTYPE": tl.bfloat16, "M": 16, "BJ": 32, "BL": 32, "BR": 16}
BACK = {**ONE_ROW, "BACK": True, "DOUBLE": False, "BIAS": False, "BY_ROW": False, "INDEX": tl.int64, "M": 64, "BJ": 64}


def compiled(kernel: Any, numbers: dict[str, Any], capability: int, **types: str) -> None:
    numbers = {**numbers, "PRECISION": "ieee"}
    kinds = {**POINTERS, **types}
    signature = {n: "constexpr" if n in numbers else kinds.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in numbers.items()})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"])
    print(f"{kernel.__name__}, sm_{capability}: {made.metadata.shared} bytes of shared memory")


compiled(triton_lora._rows, SHRINK | {"w_l": 1, "n_tiles": 1}, 80, out="*fp32")
compiled(triton_lora._rows, EXPAND | {"w_j": 1}, 90, x="*fp32")
compiled(triton_lora._outer, OF_A | {"out_j": 1}, 80)
compiled(triton_lora._outer, OF_B | {"out_i": 1}, 90)
compiled(triton_nf4._product, ONE_ROW | {"T": 1, "p_j": 1}, 80)
compiled(triton_nf4._product, BACK | {"p_j": 1}, 90, absmax="*fp32")
