"""Chain of LoRA (COLA): Efficient Fine-tuning of Language Models via Residual Learning (arXiv 2401.04151).

    for each link i of M:    train (A_i, B_i);    W ← W + s B_i A_i;    A ← fresh, B ← 0, a new optimiser and course

What is learned is the sum of the links, W_0 + Σ s B_i A_i: one LoRA of rank Σ r_i, and that is what is saved. The
run's steps are split evenly over the links; one link is LoRA. Ranks may step down along the chain (`ranks`): rows of A
beyond a link's rank are zero, as B's columns are, so they have no gradient and stay zero. The scale stays that of the
adapter's own rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltatune.core import fingerprint
from deltatune.core.sharded import fill, whole
from deltatune.errors import ConfigError
from deltatune.methods.lora import LoraDelta
from deltatune.schedules._as_lora import lora_of, write_pairs
from deltatune.schedules._base import changed, fold_in, weights_of, write_changed
from deltatune.schedules._optimizer import check_forgets, forget
from deltatune.schedules._pairs import names_of
from deltatune.schedules._restart import Curve, check_curve, course, redraw, redrawable
from deltatune.schedules.base import Procedure, Rate, Run, Schedule, check_whole, procedure


@procedure
@dataclass
class Cola(Procedure):
    """A chain of pairs.

    Args:
        links: M, how many.
        ranks: rank of each link, at most the adapter's; None gives all the adapter's.
        curve: the rate's course in each link, times the caller's scheduler: down to 0 by a "linear" or a "cosine", or
            "given", which leaves it to the scheduler.
        warmup: steps at the beginning of a link over which the rate rises.
    """

    links: int = 3
    ranks: list[int] | None = None
    curve: Curve = "linear"
    warmup: int = 0

    name: ClassVar[str] = "cola"
    summary: ClassVar[str] = "a chain of pairs, each trained on top of the ones before"
    paper: ClassVar[str] = "arXiv 2401.04151"

    def __post_init__(self) -> None:
        check_whole("links", self.links, 1)
        check_whole("warmup", self.warmup)
        check_curve(self.curve)
        for rank in self.ranks or []:
            check_whole("a rank in ranks", rank, 1)
        if sorted(self.ranks or [], reverse=True) != (self.ranks or []):
            raise ConfigError(f"ranks={self.ranks} rises along the chain, and ranks step down; put the largest first")
        if self.ranks is not None and len(self.ranks) != self.links:
            raise ConfigError(f"ranks has {len(self.ranks)} values for links={self.links}; give one for each link")

    def check_total(self, total: int, config: Any = None) -> None:
        shortest = total // self.links
        if self.links > 1 and shortest <= max(self.warmup, 1):
            fits = max(total // max(2 * self.warmup, 2), 1)
            raise ConfigError(
                f"links={self.links} leaves {shortest} of {total} steps for a link, no more than its warm-up; use "
                f"links={min(fits, self.links - 1)}, or train longer"
            )

    def start(self, run: Run) -> Schedule:
        run.need_total("the split of a run into links")
        deltas = redrawable(run, "COLA")
        check_forgets(run.optimizer)
        least = min(d.r for d in deltas)
        if max(self.ranks or [0]) > least:
            raise ConfigError(f"ranks={self.ranks} goes above the adapter's r={least}; raise r or lower the ranks")
        return ColaSchedule(run, self, deltas)

    @classmethod
    def example(cls) -> Cola:
        return cls(links=3, ranks=[4, 3, 2])


class ColaSchedule(Schedule):
    """
    Attributes:
        tied: for every finished link, name of a pair -> (A, B).
    """

    def __init__(self, run: Run, options: Cola, deltas: list[LoraDelta]) -> None:
        super().__init__(run)
        self.options, self.deltas = options, dict(zip(names_of(deltas), deltas, strict=True))
        total = run.need_total("the split of a run into links")
        #: the step at which each link begins, and the run's end
        self.bounds = [round(i * total / options.links) for i in range(options.links + 1)]
        self.tied: list[dict[str, tuple[Tensor, Tensor]]] = []
        #: the fingerprint of the base that the chain stands on
        self.base = fingerprint.take(run.root, deltas)

    def begin(self) -> None:
        if self.tied:
            changed(self.run, "COLA")
        elif not self.run.step:
            self._cut(0)

    def link(self) -> int:
        """The number of the link that trains in the step under way, from 0."""
        return next((i for i, end in enumerate(self.bounds[1:]) if self.run.step < end), self.options.links - 1)

    def rate(self, param: Tensor) -> Rate | None:
        first, last = self.bounds[self.link() : self.link() + 2]
        return Rate(course(self.run.step - first, last - first, self.options.curve, self.options.warmup))

    def after_step(self) -> None:
        if self.run.step in self.bounds[1:-1]:
            self.tie(self.bounds.index(self.run.step))
        self.run.logs["links"] = len(self.tied) + 1

    @torch.no_grad()
    def tie(self, number: int) -> None:
        """Folds the pairs into the base, remembers them, and begins link `number`."""
        changed(self.run, "COLA")
        self.tied.append(
            {
                name: (whole(d.lora_A.weight).detach().clone(), whole(d.lora_B.weight).detach().clone())
                for name, d in self.deltas.items()
            }
        )
        deltas = list(self.deltas.values())
        fold_in(deltas)
        redraw(self.run, deltas, number)
        self._cut(number)
        forget(self.run.optimizer, [slot.weight for d in deltas for slot in (d.lora_A, d.lora_B)])

    @torch.no_grad()
    def _cut(self, number: int) -> None:
        """Zeroes the rows of A beyond a link's rank; B is zero there already."""
        for delta in self.deltas.values() if self.options.ranks else ():
            op = delta.ref.op
            a, b = op.unpack(whole(delta.lora_A.weight.detach()), whole(delta.lora_B.weight.detach()))
            rank = (self.options.ranks or [])[number]
            kept = torch.cat([a[..., :rank, :], torch.zeros_like(a[..., rank:, :])], -2)
            fill(delta.lora_A.weight, op.pack(delta.ref.module, kept, b)[0])

    # ------------------------------------------------------------------ checkpoints and the end
    def base_tensors(self) -> Mapping[str, Tensor]:
        return weights_of(self.run.root, self.deltas.values())

    def state_dict(self) -> dict[str, Any]:
        return {"tied": [{name: list(pair) for name, pair in link.items()} for link in self.tied], "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tied = [{name: (a, b) for name, (a, b) in link.items()} for link in state["tied"]]
        self.base = state["base"]
        self.begin()

    def report(self) -> dict[str, Any]:
        """`links`: how many there were; `max_rank`: what the rank of the whole change may be."""
        ranks = self.options.ranks or [max(d.r for d in self.deltas.values())] * self.options.links
        return {"links": len(self.tied) + 1, "max_rank": sum(ranks[: len(self.tied) + 1])}

    def save(self, folder: Path) -> bool:
        if not self.tied:
            return False
        config = lora_of(self.run)
        assert config is not None
        if config.lora_bias:  # a bias on B is folded as well, and a pair cannot say that
            write_changed(self.run.root, self.base_tensors().values(), folder, self.run.adapter)
            return True
        ranks, links = self.options.ranks, len(self.tied) + 1
        pattern = {} if ranks else {key: links * r for key, r in (config.rank_pattern or {}).items()}
        r = sum(ranks[:links]) if ranks else links * config.r
        write_pairs(self.run, self.summed(), r, pattern, folder, self.base)
        return True

    def summed(self) -> list[tuple[LoraDelta, Tensor, Tensor]]:
        """All links of each pair as one: s [B_1 B_2 …] and [A_1; A_2; …]."""
        live = {
            name: (whole(d.lora_A.weight).detach(), whole(d.lora_B.weight).detach()) for name, d in self.deltas.items()
        }
        found = []
        for name, delta in self.deltas.items():
            parts = [delta.ref.op.unpack(*link[name]) for link in (*self.tied, live)]
            ranks = self.options.ranks or [delta.r] * len(parts)
            a = torch.cat([part[..., :r, :] for (part, _), r in zip(parts, ranks, strict=False)], -2)
            b = torch.cat([part[..., :r] for (_, part), r in zip(parts, ranks, strict=False)], -1)
            found.append((delta, a, delta.scale * b))
        return found
