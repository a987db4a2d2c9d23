"""Procedures on a base that bitsandbytes has quantised: those that leave it alone run, the others say why not."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from deltatune import AdaLoraConfig, ConfigError, LoraConfig, get_peft_model
from deltatune.schedules import (
    Cola,
    DeltaLora,
    FullThenLora,
    Lisa,
    LoraPlus,
    LoraPro,
    PeriodicLora,
    ReLora,
    Riemannian,
    attach,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4") for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def run(config, *procedures):
    torch.manual_seed(0)
    base = Net().to("cpu")
    model = base if config is None else get_peft_model(base, config)
    params = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    optimizer = torch.optim.AdamW(params, lr=0.01)
    schedule = attach(model, optimizer, *procedures, total_steps=8)
    x, y = torch.randn(16, 64), torch.randint(0, 5, (16,))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    schedule.finish()
    return losses


def lora():
    return LoraConfig(r=4, target_modules=["0", "1"])


RULES = {"lora_plus": LoraPlus(ratio=4), "lora_pro": LoraPro(), "riemannian": Riemannian()}


@pytest.mark.parametrize("which", ["adalora", *RULES])
def test_what_leaves_the_base_alone_runs(which):
    if which == "adalora":
        losses = run(AdaLoraConfig(init_r=4, target_r=2, target_modules=["0", "1"], lora_alpha=16))
    else:
        losses = run(lora(), RULES[which])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "procedure", "says"),
    [
        (lora(), ReLora(cycle=2, restart_warmup=1), "is stored quantised.*load the base in 16 or 32 bits"),
        (lora(), PeriodicLora(stage=2), "PeriodicLoRA folds .* is stored quantised"),
        (lora(), Cola(links=2), "COLA folds .* is stored quantised"),
        (lora(), DeltaLora(after=2), "Delta-LoRA folds .* is stored quantised"),
        (lora(), FullThenLora(warmup=1), "trains the base's own weights, and .* is stored quantised"),
        (None, Lisa(layers=1, every=2), "LISA trains the base's own weights, and .* is stored quantised"),
    ],
)
def test_what_would_round_the_base_away_is_refused(config, procedure, says):
    with pytest.raises(ConfigError, match=says):
        run(config, procedure)
