"""LoRA+: Efficient Low Rank Adaptation of Large Models (arXiv 2402.12354).

    η_B = λ · η_A        λ ≈ 16 in the paper's experiments

The same model as LoRA; B, which starts at zero, moves λ times as fast as A. The four groups of the authors' code: A and
everything else at η; B at λη; one-dimensional parts of the B side at λη without weight decay; LoRA on embeddings at a
rate of its own. The ratio holds at every step, whatever scheduler the optimiser has.

`lora_plus_groups` gives the same as ordinary parameter groups, for code that builds its own optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.errors import ConfigError
from deltatune.schedules.base import Procedure, Rate, Run, Schedule, check_number, procedure

#: names of tensors on the B side, and of LoRA's pair on embeddings
B_SIDE, EMBEDDING = ("lora_B", "lora_embedding_B"), "lora_embedding_"


@procedure
@dataclass
class LoraPlus(Procedure):
    """Learning rates of A and B apart.

    Args:
        ratio: λ, B's learning rate over A's.
        embedding_lr: learning rate of LoRA on embeddings; None leaves it with the others.
        weight_decay_on_vectors: keep the weight decay on one-dimensional parts of the B side.
    """

    ratio: float = 16.0
    embedding_lr: float | None = 1e-6
    weight_decay_on_vectors: bool = False

    name: ClassVar[str] = "lora_plus"
    summary: ClassVar[str] = "B moves faster than A by a fixed ratio"
    paper: ClassVar[str] = "arXiv 2402.12354"

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0)
        if not self.ratio:
            raise ConfigError("ratio=0 would freeze B, which starts at zero; the paper advises 16")
        if self.embedding_lr is not None:
            check_number("embedding_lr", self.embedding_lr, 0)

    def start(self, run: Run) -> Schedule:
        return LoraPlusSchedule(run, self)

    def rates(self, edits: list[Any]) -> dict[int, Rate]:
        """id of a parameter -> its rate, where that is not the group's own.

        Raises:
            ConfigError: the adapter has no B, or no A that trains beside it.
        """
        sides: dict[str, list[tuple[str, Tensor]]] = {"A": [], "B": []}
        for slot in (slot for edit in edits for slot in edit.slots if slot.trainable):
            sides["B" if slot.name.startswith(B_SIDE) else "A"].append((slot.name, slot.weight))
        if not sides["B"]:
            raise ConfigError("LoRA+ sets the rate of lora_B, and this adapter has none; use it with LoRA or its kin")
        if not any(name.startswith("lora_") for name, _ in sides["A"]):
            raise ConfigError("LoRA+ is a ratio between A and B, and A does not train here; raise the learning rate")
        rates = {}
        for side, tensors in sides.items():
            for name, p in tensors:
                rates[id(p)] = self._rate(side, name, p)
        return {key: rate for key, rate in rates.items() if rate != Rate()}

    def _rate(self, side: str, name: str, param: Tensor) -> Rate:
        if name.startswith(EMBEDDING) and self.embedding_lr is not None:
            return Rate(lr=self.embedding_lr)
        if side == "A":
            return Rate()
        return Rate(self.ratio, decay=param.ndim > 1 or self.weight_decay_on_vectors)


class LoraPlusSchedule(Schedule):
    def __init__(self, run: Run, options: LoraPlus) -> None:
        super().__init__(run)
        self.options = options
        self.rates = options.rates(run.edits())
        #: kept, so that no other tensor gets one of these ids
        self._params = [s.weight for e in run.edits() for s in e.slots]

    def rate(self, param: Tensor) -> Rate | None:
        return self.rates.get(id(param))


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float | None = 1e-6,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: every parameter that trains is in exactly one.

    Args:
        lr: of A. ratio: λ. weight_decay: of all but the one-dimensional parts of the B side.
    """
    from deltatune.schedules.attach import _find

    root, adapters, name = _find(model, adapter_name)
    options = LoraPlus(ratio, embedding_lr)
    edits: list[Any] = adapters.edits[name] if adapters is not None else []
    rates = options.rates(edits)
    groups: dict[Rate, list[Tensor]] = {}
    for p in root.parameters():
        if p.requires_grad:
            groups.setdefault(rates.get(id(p), Rate()), []).append(p)
    return [
        {
            "params": params,
            "lr": (lr if rate.lr is None else rate.lr) * rate.factor,
            "weight_decay": weight_decay if rate.decay else 0.0,
        }
        for rate, params in groups.items()
    ]
