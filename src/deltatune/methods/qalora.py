"""QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models (arXiv 2309.14717).

    y = W x + s · B A pool(x)        pool: the sum over groups of g inputs, A: (r, in / g), B: (out, r)

So every output row of ΔW is constant within a group, and a group-wise integer weight s_q (q - z) takes it up in its
zero-points, z' = z - ΔW / s_q, without any rounding where these are real numbers (HQQ): the integers stay.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.edits import LowRank
from deltatune.core.ops import LINEAR
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError
from deltatune.inits import Start


class QaloraDelta(LowRank):
    """LoRA's pair with one column of A per group of inputs.

    Args:
        group: g, which must divide the inputs. Others as `LoraDelta`.
    """

    def __init__(self, ref: WeightRef, r: int, scale: float, dropout: float, start: Start, *, group: int) -> None:
        super().__init__(ref)
        inputs = ref.shape[-1]
        where = getattr(ref.module, "path", type(ref.module).__name__)
        if ref.op is not LINEAR:
            raise ConfigError(f"use_qalora groups the inputs of a linear layer, and {where!r} is none; leave it out")
        if inputs % group:
            raise ConfigError(f"qalora_group_size={group} does not divide the {inputs} inputs of {where!r}")
        if start.offset:
            raise ConfigError("use_qalora starts from a random A and a zero B: set init_lora_weights=True")
        self.group_size, self.scale, self.dropout = group, scale, dropout
        self.lora_A = self.tensor("lora_A", start.a[..., : inputs // group].clone())
        self.lora_B = self.tensor("lora_B", start.b, trainable=not start.freezes_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight.repeat_interleave(self.group_size, -1), self.scale * self.lora_B.weight

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.host.training else x
