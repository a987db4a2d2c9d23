"""HiRA: what the laws do not cover."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import HiraConfig, LoraConfig, get_peft_model
from deltatune.errors import ConfigError
from tiny import llama, shake


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), HiraConfig(**{"target_modules": ["0"], "r": 2, **options})).eval()
    shake(model)
    return model, model.adapters.edits["default"][0]


def test_multiplies_the_weight():
    model, delta = adapted(nn.Linear(24, 36))
    base, (a, b) = model.get_base_model()[0], delta.factors()
    x = torch.randn(5, 24)
    with torch.no_grad():
        change = base.weight * (b @ a)
        assert torch.linalg.matrix_rank(change) == 24  # full, from two ranks
        assert torch.allclose(model(x), x @ (base.weight + change).T + base.bias, atol=1e-4)


def test_a_zero_weight_stays_zero():
    layer = nn.Linear(24, 36)
    nn.init.zeros_(layer.weight)
    _model, delta = adapted(layer)
    assert not delta.merged(layer.weight).any()


def scaled() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(20, 16, 0, embed_scale=3.0)


@pytest.mark.parametrize("make", [lambda: nn.Embedding(20, 16), scaled], ids=["plain", "scaled"])
def test_embedding(make):
    model, delta = adapted(make())
    base, (a, b) = model.get_base_model()[0], delta.factors()
    x = torch.randint(0, 20, (4, 3))
    with torch.no_grad():
        wanted = (base.weight * (1 + (b @ a).T))[x] * getattr(base, "embed_scale", 1)
        assert torch.allclose(model(x), wanted, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Embedding(20, 16), scaled, lambda: nn.Linear(24, 16)])
def test_beside_a_merged_adapter_it_still_multiplies_the_base(make):
    layer = make()
    x = torch.randint(0, 20, (4, 3)) if isinstance(layer, nn.Embedding) else torch.randn(4, 24)
    model, _ = adapted(layer)
    model.add_adapter("lora", LoraConfig(target_modules=["0"], r=2))
    model.set_adapter("lora")
    shake(model)
    with torch.no_grad():
        model.base_model.set_adapter(["default", "lora"])
        both = model(x)
        model.merge_adapter(["lora"])
        assert torch.allclose(model(x), both, atol=1e-4)


def test_a_16_bit_base_is_not_copied_to_float32():
    model, _ = adapted(nn.Linear(64, 64, bias=False).to(torch.bfloat16))
    kept: list[torch.Tensor] = []
    x = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert all(t.dtype == torch.bfloat16 for t in kept if t.numel() == 64 * 64)


def test_dropout_acts_on_the_change_only_and_in_training_only():
    model, _ = adapted(nn.Linear(24, 36), hira_dropout=0.5)
    x = torch.randn(5, 24)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        with model.disable_adapter():
            assert torch.equal(model(x), model(x))


def test_patterns_and_count():
    config = HiraConfig(target_modules=["q_proj", "v_proj"], r=3, rank_pattern={"v_proj": 1})
    model = get_peft_model(llama(), config)
    layer = model.get_base_model().model.layers[0].self_attn
    assert layer.v_proj.hira_A.default.shape == (1, 32)
    assert model.get_nb_trainable_parameters()[0] == 2 * (3 * (32 + 32) + (32 + 16))


@pytest.mark.parametrize(("init", "std"), [(True, 1 / 3**0.5 / 400**0.5), ("gaussian", 1 / 8)])
def test_inits(init, std):
    config = HiraConfig(target_modules=["0"], r=8, init_weights=init)
    model = get_peft_model(nn.Sequential(nn.Linear(400, 36)), config)
    delta = model.adapters.edits["default"][0]
    assert not delta.b.weight.any()
    assert delta.a.weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "at least 1"),
        ({"hira_dropout": 1.0}, r"hira_dropout must be in \[0, 1\)"),
        ({"init_weights": "pissa"}, 'init_weights must be True, False or "gaussian"'),
        ({"rank_pattern": {"nothing": 2}}, "nothing"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        adapted(nn.Linear(4, 4), **options)


def test_dropout_on_a_weight_that_the_module_reads_itself():
    with pytest.raises(ConfigError, match="'0' reads its weight itself, so hira_dropout cannot reach"):
        adapted(nn.MultiheadAttention(16, 4), hira_dropout=0.1)
