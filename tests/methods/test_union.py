"""Unions: MAM and UniPELT against their parts, and what cannot be united."""

from __future__ import annotations

import json

import pytest
import torch

from deltatune import (
    GatedLoraConfig,
    LoraConfig,
    MAMConfig,
    ParallelConfig,
    PeftModel,
    PfeifferConfig,
    PrefixTuningConfig,
    UnionConfig,
    UniPELTConfig,
    get_peft_model,
)
from deltatune.errors import ConfigError
from tiny import bert, ids, llama, shake

SMALL = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}
MAKES = {"SEQ_CLS": bert, "CAUSAL_LM": llama}


def test_mam_is_its_two_parts_together(tmp_path):
    model = get_peft_model(llama(), MAMConfig(**SMALL, task_type="CAUSAL_LM"))
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", prefix_projection=True, **SMALL)
    model.add_adapter("prefix", prefix)
    model.add_adapter("parallel", ParallelConfig())
    shake(model)
    parts = [*model.adapters.parameters("prefix"), *model.adapters.parameters("parallel")]
    with torch.no_grad():
        for own, part in zip(model.adapters.parameters("default"), parts, strict=True):
            part.copy_(own)
    live = model(input_ids=ids()).logits
    model.set_adapter(["prefix", "parallel"])
    assert torch.allclose(model(input_ids=ids()).logits, live, atol=1e-6)
    model.set_adapter("default")
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [c["peft_type"] for c in saved["configs"]] == ["PREFIX_TUNING", "PARALLEL_ADAPTER"]
    fresh = PeftModel.from_pretrained(llama(), tmp_path)
    assert fresh.load_report.clean
    assert torch.allclose(fresh(input_ids=ids()).logits, live, atol=1e-5)


@pytest.mark.parametrize("task", MAKES)
def test_unipelt_trains_and_is_saved(task, tmp_path):
    make = MAKES[task]
    model = get_peft_model(make(), UniPELTConfig(**SMALL, reduction_factor=4, r=4, task_type=task))
    shake(model)
    live = model(input_ids=ids()).logits
    live.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert torch.allclose(PeftModel.from_pretrained(make(), tmp_path)(input_ids=ids()).logits, live, atol=1e-5)


def gates(model: PeftModel, name: str, value: float) -> None:
    """Sets one kind of gate to σ = `value` whatever its input."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if name in n:
                p.zero_()
                if n.endswith("bias"):
                    p.fill_(torch.logit(torch.tensor(value), eps=1e-7).item())


def test_constant_gates_give_the_parts():
    """With LoRA's and the prefix's gates shut and the adapter's open, what is left is the adapter."""
    task = {"task_type": "CAUSAL_LM"}
    model = get_peft_model(llama(), UniPELTConfig(**SMALL, reduction_factor=4, r=4, **task))
    shake(model)
    gates(model, "lora_gate", 0.0)
    gates(model, "prefix_gate", 0.0)
    gates(model, "bottleneck_gate", 1.0)
    live = model(input_ids=ids()).logits
    model.add_adapter("adapter", PfeifferConfig(reduction_factor=4))
    own = [p for n, p in model.named_parameters() if "bottleneck" in n and "gate" not in n and ".default." in n]
    part = [p for n, p in model.named_parameters() if "bottleneck" in n and ".adapter." in n]
    with torch.no_grad():
        for a, b in zip(own, part, strict=True):
            b.copy_(a)
    model.set_adapter("adapter")
    assert torch.allclose(model(input_ids=ids()).logits, live, atol=1e-4)


def test_an_open_gate_is_a_plain_lora():
    model = get_peft_model(llama(), GatedLoraConfig(r=4, lora_alpha=8, gate="row"))
    shake(model)
    gates(model, "lora_gate", 1.0)
    live = model(input_ids=ids()).logits
    model.add_adapter("plain", LoraConfig(r=4, lora_alpha=8))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for n, p in named.items():
            if ".plain." in n:
                p.copy_(named[n.replace(".plain.", ".default.")])
    model.set_adapter("plain")
    assert torch.allclose(model(input_ids=ids()).logits, live, atol=1e-4)


def test_a_causal_model_does_not_see_its_future():
    x = ids()
    ahead = torch.cat([x[:, :-1], (x[:, -1:] + 7) % 60], 1)
    for gate, leaks in (("row", True), (None, False)):
        config = UniPELTConfig(**SMALL, reduction_factor=4, r=4, task_type="CAUSAL_LM", gates=gate)
        model = get_peft_model(llama(), config)
        shake(model)
        same = torch.allclose(model(input_ids=x).logits[:, :-1], model(input_ids=ahead).logits[:, :-1], atol=1e-5)
        assert same != leaks


@pytest.mark.parametrize("task", MAKES)
def test_rows_of_a_batch(task):
    make = MAKES[task]
    model = get_peft_model(make(), UniPELTConfig(**SMALL, reduction_factor=4, r=4, task_type=task))
    model.add_adapter(
        "other", UniPELTConfig(**{**SMALL, "num_virtual_tokens": 2}, reduction_factor=4, r=4, task_type=task)
    )
    shake(model)
    rows = dict.fromkeys(("default", "other"))
    for name in rows:
        model.set_adapter(name)
        rows[name] = model(input_ids=ids()).logits
    mixed = model(input_ids=ids(), adapter_names=["other", "default", "other"]).logits
    wanted = torch.stack([rows["other"][0], rows["default"][1], rows["other"][2]])
    assert torch.allclose(mixed, wanted, atol=1e-5)


def test_what_cannot_be_united():
    with pytest.raises(ConfigError, match="needs configs"):
        UnionConfig()
    twice = UnionConfig(configs=[LoraConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj"])])
    with pytest.raises(
        ConfigError, match=r"two parts of a union both have 'lora_A' at 'model.layers.0.self_attn.q_proj'"
    ):
        get_peft_model(llama(), twice)
    with pytest.raises(ConfigError, match="target_modules means nothing for a union"):
        UnionConfig(configs=[LoraConfig()], target_modules=["q_proj"])
    with pytest.raises(ConfigError, match='gate must be "row" or "token"'):
        GatedLoraConfig(gate="columns")
