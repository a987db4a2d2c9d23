"""LN tuning: the card's tests beyond the laws."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from deltatune import LNTuningConfig, get_peft_model
from deltatune.errors import TargetError
from tiny import bert, gpt2, ids, llama, shake, t5

#: model -> what its norms hold: two per block and a last one (BERT: one of its embeddings), gains, and biases or not
COUNTS = {"llama": (llama, 5 * 32), "gpt2": (gpt2, 5 * 2 * 32), "bert": (bert, 5 * 2 * 32), "t5": (t5, 12 * 32)}


@pytest.mark.parametrize("name", COUNTS)
def test_only_norms_train(name):
    make, count = COUNTS[name]
    model = get_peft_model(make(), LNTuningConfig())
    assert model.get_nb_trainable_parameters()[0] == count
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        out = model(input_ids=ids(), labels=ids() if name != "bert" else torch.tensor([0, 1, 0]))
        out.loss.backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert all(p.grad is not None for n, p in after.items() if p.requires_grad)
    assert all("ln_tuning_layers" in n for n, p in after.items() if p.requires_grad)
    assert len(optimizer.state) == sum(p.requires_grad for p in after.values())


def test_disabling_gives_the_original_gains():
    model = get_peft_model(llama(), LNTuningConfig())
    shake(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids()).logits, llama()(input_ids=ids()).logits)


def test_count_of_llama_7b():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    model = get_peft_model(model, LNTuningConfig())
    assert model.get_nb_trainable_parameters()[0] == 65 * 4096 == 266_240


def test_any_norm_of_any_network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.LayerNorm(8 * 16))
    model = get_peft_model(net.eval(), LNTuningConfig())
    x = torch.randn(2, 3, 6, 6)
    base = model(x)
    shake(model)
    live = model(x)
    assert not torch.allclose(live, base, atol=1e-3)
    assert model.get_nb_trainable_parameters()[0] == 2 * (8 + 8 + 128)
    assert torch.allclose(model.merge_and_unload()(x), live, atol=1e-5)


def test_chosen_layers():
    model = get_peft_model(llama(), LNTuningConfig(target_modules=["input_layernorm"], layers_to_transform=[1]))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == ["base_model.model.model.layers.1.input_layernorm.ln_tuning_layers.default.weight"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj"]}, "which has no normalisation gain, as .* has"),
        ({"target_modules": ["layer_norm"]}, "matches no module of this model; did you mean"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(TargetError, match=message):
        get_peft_model(llama(), LNTuningConfig(**fields))


def test_a_model_without_norms():
    with pytest.raises(TargetError, match="has a normalisation gain, so nothing would train"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), LNTuningConfig())
