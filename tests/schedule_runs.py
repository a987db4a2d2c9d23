"""Runs of a dozen steps with a procedure: a plain loop, any Trainer, a recipe; the same data in the same order."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import deltatune.schedules as schedules
from deltatune import get_peft_config, get_peft_model
from tiny import llama

STEPS = 12
#: every registered procedure, those of other files included: a new one joins the tests by itself
PROCEDURES = {name: kind for name, kind in sorted(schedules.PROCEDURES.items()) if kind.example_method()}


@cache
def batches(rows: int = 4) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(3)
    made = (torch.randint(2, 60, (rows, 9), generator=generator) for _ in range(STEPS))
    return tuple({"input_ids": x, "labels": x} for x in made)


def options_of(name: str) -> list[schedules.Procedure]:
    """The procedure to give to `attach`; none where the method brings it."""
    config = get_peft_config(PROCEDURES[name].example_method())
    implied = [p.name for p in config.procedures()]
    return [] if name in implied else [PROCEDURES[name].example()]


def model_for(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = get_peft_config({"task_type": "CAUSAL_LM", **PROCEDURES[name].example_method()})
    return get_peft_model(llama(num_hidden_layers=4, initializer_range=0.1, **options), config).train()


class Loop:
    """The plain loop, which can be stopped, saved and gone on with."""

    def __init__(self, name: str, model: nn.Module | None = None, lr: float = 0.02, optimizer: Any = None) -> None:
        self.model = model or model_for(name)
        given = options_of(name)
        schedules.mark(self.model, *given)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = (optimizer or torch.optim.AdamW)(trained, lr=lr, eps=1e-3)
        self.schedule = schedules.attach(self.model, self.optimizer, *given, total_steps=STEPS, seed=5)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: 1 - t / (2 * STEPS))
        self.losses: list[float] = []

    def run(self, stop: int = STEPS, parts: int = 1, clip: float | None = None, autocast: bool = False) -> Loop:
        for step in range(self.schedule.run.step, stop):
            batch = batches()[step]
            total = 0.0
            for part in range(parts):
                rows = slice(part * 4 // parts, (part + 1) * 4 // parts)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = self.model(**{k: v[rows] for k, v in batch.items()}).loss / parts
                loss.backward()
                total += float(loss.detach())
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(total)
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the adapter, the optimiser, the procedure; no tensor of the base by itself."""
        from deltatune import get_peft_model_state_dict

        adapter = {k: v.detach().clone() for k, v in get_peft_model_state_dict(self.model).items()}
        parts = {"adapter": adapter, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        return {**parts, "schedule": self.schedule.state_dict()}

    def load(self, state: dict[str, Any]) -> Loop:
        from deltatune import set_peft_model_state_dict

        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.schedule.load_state_dict(state["schedule"])
        return self


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) if a[k].numel() else 0.0 for k in a)
