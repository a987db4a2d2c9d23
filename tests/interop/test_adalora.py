"""AdaLoRA's files move between Hugging Face peft and us, with ranks as they start and as they end."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from deltatune import AdaLoraConfig, PeftModel, get_peft_model
from deltatune.methods.adalora import shrink, triplets
from tiny import ids, llama, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # peft takes its own masks for patterns, and a rank of 0 for a shard
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match.*:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*have invalid shape.*"),
]
FIELDS = {"target_modules": ["q_proj", "v_proj"], "init_r": 4, "target_r": 2, "total_step": 50, "lora_alpha": 32}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def compare_files(ours, theirs) -> None:
    a, b = (json.loads((p / "adapter_config.json").read_text()) for p in (ours, theirs))
    for values in (a, b):
        values.pop("peft_version")
        values["target_modules"].sort()
    assert a == b
    x, y = (load_file(p / "adapter_model.safetensors") for p in (ours, theirs))
    assert {k: v.shape for k, v in x.items()} == {k: v.shape for k, v in y.items()}


def peft_trained(steps: int, **fields):
    """peft's own training with its own schedule."""
    model = peft.get_peft_model(llama(), peft.AdaLoraConfig(task_type="CAUSAL_LM", **{**FIELDS, **fields}))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(steps):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    return model.eval()


@pytest.mark.parametrize("bias", ["none", "all"])
def test_from_peft_and_back(tmp_path, bias):
    theirs = peft_trained(3, bias=bias, modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path / "peft")
    ours = PeftModel.from_pretrained(llama(), tmp_path / "peft")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(ours), logits(llama()), atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    compare_files(tmp_path / "ours", tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert torch.allclose(logits(again), logits(theirs), atol=1e-5)


def test_pruned_by_peft(tmp_path):
    theirs = peft_trained(12, total_step=12, tinit=1, tfinal=2, target_r=1)
    theirs.save_pretrained(tmp_path / "peft")
    ours = PeftModel.from_pretrained(llama(), tmp_path / "peft")
    ranks = [d.factors()[0].shape[0] for d in triplets(ours.adapters, "default").values()]
    assert sum(ranks) == 4
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    compare_files(tmp_path / "ours", tmp_path / "peft")


def test_shrunk_by_us(tmp_path):
    ours = get_peft_model(llama(), AdaLoraConfig(task_type="CAUSAL_LM", **FIELDS))
    shake(ours)
    keep = [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]
    deltas = triplets(ours.adapters, "default")
    for delta, row in zip(deltas.values(), keep, strict=True):
        delta.mask(torch.tensor(row, dtype=torch.bool))
    before = logits(ours)
    shrink(ours.adapters, "default")
    assert torch.allclose(logits(ours), before, atol=1e-6)
    assert [len(d.lora_E.weight) for d in deltas.values()] == [sum(row) for row in keep]
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(ours))
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(logits(theirs), before, atol=1e-5)
    shrink(ours.adapters, "default")  # once more changes nothing
    assert ours.peft_config["default"].rank_pattern == {
        k: [bool(v) for v in row] for k, row in zip(deltas, keep, strict=True)
    }
