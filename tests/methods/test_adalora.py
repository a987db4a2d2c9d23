"""AdaLoRA: what the laws do not cover (arXiv 2303.10512)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import AdaLoraConfig, ConfigError, PeftModel, get_peft_model
from deltatune.methods.adalora import orthogonality, triplets
from tiny import bert, ids, llama, shake


def adapted(**fields):
    options = {"init_r": 4, "target_r": 2, "total_step": 20, "target_modules": ["q_proj", "v_proj"], **fields}
    return get_peft_model(llama(), AdaLoraConfig(**options))


def deltas(model):
    return list(triplets(model.adapters, "default").values())


def test_names_and_shapes_as_published():
    model = bert(kind="BertModel", hidden_size=768, num_attention_heads=12, num_hidden_layers=1)
    model = get_peft_model(model, AdaLoraConfig(target_modules=["query"], total_step=100))
    named = {n.rpartition("query.")[2]: list(p.shape) for n, p in model.named_parameters() if "query." in n}
    assert named["lora_A.default"] == [12, 768]
    assert named["lora_E.default"] == [12, 1]
    assert named["lora_B.default"] == [768, 12]
    assert named["ranknum.default"] == [1]
    assert model.get_nb_trainable_parameters()[0] == 12 * (768 + 768 + 1)


def test_only_E_has_a_gradient_at_the_start():
    model = adapted()
    model(input_ids=ids(), labels=ids()).loss.backward()
    for delta in deltas(model):
        assert delta.lora_A.weight.grad.abs().sum() == 0
        assert delta.lora_B.weight.grad.abs().sum() == 0
        assert delta.lora_E.weight.grad.abs().sum() > 0
        assert delta.ranknum.weight.grad is None


def test_rank_is_the_number_of_unmasked_triplets():
    model = adapted()
    shake(model)
    delta = deltas(model)[0]
    w = delta.ref.load()
    for kept in (4, 3, 2, 1, 0):
        delta.mask(torch.arange(4) < kept)
        change = (delta.merged(w) - w).detach()
        assert torch.linalg.matrix_rank(change, atol=1e-5) == kept


def test_a_masked_triplet_may_come_back_and_the_scale_stays():
    model = adapted(lora_alpha=8)
    shake(model)
    delta = deltas(model)[0]
    before = list(delta.trainable())
    delta.mask(torch.tensor([True, False, True, False]))
    assert [id(p) for p in delta.trainable()] == [id(p) for p in before]  # an optimiser's state survives
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert delta.lora_E.weight.grad[1].abs() > 0
    assert delta.scale == pytest.approx(8 / (4 + 1e-5))


def test_orthogonality_is_the_mean_norm_over_all_factors():
    model = adapted()
    shake(model)
    norms = []
    for d in deltas(model):
        a, b = d.lora_A.weight, d.lora_B.weight
        norms += [(a @ a.T - torch.eye(4)).norm(), (b.T @ b - torch.eye(4)).norm()]
    penalty = orthogonality(deltas(model))
    assert torch.allclose(penalty, torch.stack(norms).mean())
    penalty.backward()
    assert deltas(model)[0].lora_A.weight.grad.abs().sum() > 0
    for d in deltas(model):
        for slot in (d.lora_A, d.lora_B):
            nn.init.orthogonal_(slot.weight)
    assert orthogonality(deltas(model)) < 1e-5


def test_loads_without_memory(tmp_path):
    model = adapted()
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(loaded(input_ids=ids()).logits, model(input_ids=ids()).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total_step": 0}, "total_step must be"),
        ({"total_step": 10, "tinit": 6, "tfinal": 4}, "leave no step"),
        ({"tinit": -1}, "tinit must not be negative"),
        ({"init_r": 0}, "init_r must be"),
        ({"target_r": 5}, "nothing to prune"),
        ({"deltaT": 0}, "deltaT must be"),
        ({"use_rslora": True}, "no use_rslora"),
        ({"alpha_pattern": {"q_proj": 4}}, "no alpha_pattern"),
        ({"init_lora_weights": "gaussian"}, "own random triplets"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "each of 4 triplets"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        adapted(**fields)


def test_r_is_not_adaloras_rank():
    with pytest.warns(UserWarning, match="init_r"):
        AdaLoraConfig(r=4, total_step=10)
