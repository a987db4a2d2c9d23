"""Every method of docs/selective.md learns: a tiny Llama is taught four sequences."""

from __future__ import annotations

import pytest
import torch

import deltatune
from deltatune import get_peft_model, prepare_init
from deltatune.methods.diff_pruning import diff_groups, expected_l0, prune
from deltatune.methods.far import reconfigure
from tiny import llama

#: configuration -> (options, learning rate, share of the loss that must go)
METHODS = {
    "IA3Config": ({}, 0.1, 0.1),
    "LNTuningConfig": ({}, 0.1, 0.1),
    "BitFitConfig": ({"added_modules": ["o_proj", "down_proj"]}, 0.05, 0.03),
    "ShiraConfig": ({"r": 4, "target_modules": "all-linear"}, 0.05, 0.1),
    "FishMaskConfig": ({"keep_ratio": 0.1}, 0.05, 0.1),
    "DiffPruningConfig": ({}, 0.02, 0.1),
    "FarConfig": ({}, 0.02, 0.1),
    "LoReftConfig": ({"prefix_positions": 4, "suffix_positions": 4}, 0.05, 0.05),
    "DiReftConfig": ({"prefix_positions": 4, "suffix_positions": 4}, 0.05, 0.05),
    "LadderConfig": ({"reduction_factor": 2, "residual": True}, 0.02, 0.1),
}


def groups(model, config, lr: float):
    if getattr(config, "stage", "") == "search":
        return diff_groups(model, lr=lr)
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr}]


@pytest.mark.parametrize("name", METHODS)
def test_learns(name):
    options, lr, share = METHODS[name]
    x = torch.randint(2, 60, (4, 8), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": x, "labels": x}
    base = llama(initializer_range=0.2)
    config = getattr(deltatune, name)(**options)
    if name == "FishMaskConfig":
        prepare_init(base, config, [batch], progress=False)
    model = get_peft_model(base, config)
    with torch.no_grad():
        before = model(**batch).loss.item()
    model.train()
    optimizer = torch.optim.AdamW(groups(model, config, lr), weight_decay=0.0)
    for k in range(24):
        if (name == "DiffPruningConfig" and k == 12 and prune(model, 0.1)) or (
            name == "FarConfig" and k == 4 and reconfigure(model, 0.3)
        ):
            optimizer = torch.optim.AdamW(groups(model, config, lr), weight_decay=0.0)
        loss = model(**batch).loss
        if getattr(config, "stage", "") == "search":
            loss = loss + 1e-6 * expected_l0(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        after = model(**batch).loss.item()
    assert after < (1 - share) * before, (before, after)
