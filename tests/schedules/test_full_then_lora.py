"""Full fine-tuning first, then LoRA."""

from __future__ import annotations

import pytest
import torch

from deltatune import ConfigError, FullConfig, LoraConfig, get_peft_model
from deltatune.schedules import FullThenLora, attach
from schedule_runs import STEPS, batches, largest_difference, weights
from tiny import llama


def start(total=STEPS, config=None, **options):
    torch.manual_seed(1)
    fields = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
    model = get_peft_model(llama(initializer_range=0.1), config or LoraConfig(**fields)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    options = {"share": 0.25, "warmup": 2, **options}
    return model, optimizer, attach(model, optimizer, FullThenLora(**options), total_steps=total)


def step(model, optimizer, i):
    model(**batches()[i]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_base_moves_first_and_only_then_the_adapter():
    model, optimizer, schedule = start()
    first = weights(model)
    for i in range(3):
        step(model, optimizer, i)
    middle = weights(model)
    assert all(("lora_" in n) == torch.equal(p, first[n]) for n, p in middle.items())
    assert not optimizer.state  # freed at the switch
    with torch.no_grad():
        before = model(**batches()[0]).logits
        schedule.schedules["full_then_lora"].first.choose()
        assert torch.equal(model(**batches()[0]).logits, before)
    rates = []
    b = next(p for n, p in model.named_parameters() if "lora_B" in n)
    for i in range(3, STEPS):
        rates.append(schedule.rate(b).factor)
        step(model, optimizer, i)
    assert rates[:4] == [0, 0.5, 1, 1]
    last = weights(model)
    assert all(torch.equal(p, middle[n]) for n, p in last.items() if "lora_" not in n)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    model.merge_adapter()
    change = model.base_model.model.model.layers[0].mlp.up_proj.weight.detach() - weight
    assert torch.linalg.matrix_rank(change, atol=1e-5) == 2


def test_no_share_is_lora_and_all_of_it_full_fine_tuning():
    model, optimizer, _ = start(share=0.0)
    torch.manual_seed(1)
    lora = get_peft_model(llama(initializer_range=0.1), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).train()
    other = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=0.02)
    for i in range(3):
        step(model, optimizer, i)
        step(lora, other, i)
    assert largest_difference(weights(model), weights(lora)) == 0
    model, optimizer, _ = start(share=1.0, full_rate=1.0)
    full = llama(initializer_range=0.1).train()
    other = torch.optim.AdamW(full.parameters(), lr=0.02)
    for i in range(STEPS):
        step(model, optimizer, i)
        step(full, other, i)
    found = {n.removeprefix("base_model.model."): p for n, p in weights(model).items() if "lora_" not in n}
    assert largest_difference(found, weights(full)) == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="warmup=9 fills the 9 steps that are left"):
        start(warmup=9)
    with pytest.raises(ConfigError, match="needs the number of optimiser steps"):
        start(total=None)
    with pytest.raises(ConfigError, match=r"share must be a number in \[0, 1\]"):
        start(share=1.5)
    with pytest.raises(ConfigError, match="nothing to switch to"):
        start(config=FullConfig(in_place=True))
