"""Compiles the kernels as they are launched, for GPUs that need not be here; `test_triton.py` runs it."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltatune.kernels import triton_lora, triton_nf4

TYPES = {
    **dict.fromkeys(("tiles", "offsets", "ranks"), "*i32"),
    **dict.fromkeys(("x", "w", "out", "p", "q", "bias", "h", "y"), "*bf16"),
    **dict.fromkeys(("absmax2", "offset", "codes", "codes8"), "*fp32"),
    "packed": "*u8",
    "absmax": "*u8",
    "s": "fp32",
}
ROWS = {"LIMIT_J": False, "LIMIT_L": True, "X_PARTS": 8, "PARTS": 1, "M": 16, "BJ": 64, "BL": 16}
OUTER = {"LIMIT_I": True, "LIMIT_J": False, "BT": 32, "BI": 16, "BJ": 64}
NF4 = {
    "BACK": False,
    "DOUBLE": True,
    "BIAS": True,
    "PAIR": True,
    "BLOCK": 64,
    "BLOCK2": 256,
    "BY_ROW": True,
    "INDEX": tl.int32,
    "DTYPE": tl.bfloat16,
    "M": 64,
    "BJ": 64,
    "BL": 32,
    "BR": 16,
}


def compiled(kernel: Any, numbers: dict[str, Any], capability: int, **types: str) -> None:
    numbers = {**numbers, "PRECISION": "ieee"}
    kinds = {**TYPES, **types}
    signature = {n: "constexpr" if n in numbers else kinds.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in numbers.items()})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"])
    print(f"{kernel.__name__}, sm_{capability}: {made.metadata.shared} bytes of shared memory")


for capability in (80, 90):
    compiled(triton_lora._rows, ROWS, capability, x="*fp32")
    compiled(triton_lora._outer, OUTER, capability)
    compiled(triton_nf4._product, NF4, capability)
