"""LoHa: what the laws do not cover."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import LoHaConfig, LoraConfig, get_peft_model
from deltatune.errors import ConfigError
from tiny import ids, llama, shake


def adapted(layer: nn.Module, **options):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), LoHaConfig(target_modules=["0"], **options)).eval()
    shake(model)
    return model, model.adapters.edits["default"][0]


def test_is_the_hadamard_product_of_two_pairs():
    _model, delta = adapted(nn.Linear(24, 36), r=2, alpha=6)
    (b1, a1), (b2, a2) = [(b.weight, a.weight) for b, a in delta.pairs]
    change = 3 * (b1 @ a1) * (b2 @ a2)
    assert torch.linalg.matrix_rank(change) == 4  # r²
    assert torch.allclose(delta.change(), change, atol=1e-5)
    a, b = delta.factors()
    assert (a.shape, b.shape) == ((4, 24), (36, 4))
    assert torch.allclose(b @ a, change, atol=1e-5)


@pytest.mark.parametrize(("r", "wide"), [(2, False), (5, True)])
def test_wide_and_narrow_runs_agree(r, wide):
    """Where r² ranks cost more than the matrix, dW is formed instead."""
    model, delta = adapted(nn.Linear(24, 36), r=r)
    assert delta.wide is wide
    x = torch.randn(2, 3, 24)
    base = model.get_base_model()[0]
    with torch.no_grad():
        wanted = x @ (base.weight + delta.change()).T + base.bias
        assert torch.allclose(model(x), wanted, atol=1e-4)
        delta.wide = not wide
        assert torch.allclose(model(x), wanted, atol=1e-4)


def test_scaled_embedding():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model, delta = adapted(Gemma3TextScaledWordEmbedding(20, 16, 0, embed_scale=3.0), r=2)
    x = torch.randint(0, 20, (4, 3))
    with torch.no_grad():
        wanted = 3 * (model.get_base_model()[0].weight + delta.change().T)[x]
        assert torch.allclose(model(x), wanted, atol=1e-5)


def test_only_one_factor_has_a_gradient_at_the_start():
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16)), LoHaConfig(target_modules=["0"], r=2))
    model(torch.randn(3, 12)).square().sum().backward()
    live = {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and p.grad.abs().sum() > 0}
    assert live == {"hada_w2_b"}


def test_patterns():
    config = LoHaConfig(
        target_modules=["q_proj", "v_proj"], r=3, alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 8}
    )
    model = get_peft_model(llama(), config)
    q, v = model.adapters.edits["default"][:2]
    assert (q.scale, v.scale) == (2, 4)
    assert model.get_base_model().model.layers[0].self_attn.v_proj.hada_w1_b.default.shape == (2, 32)
    # 2 r (in + out) numbers per layer
    assert model.get_nb_trainable_parameters()[0] == 2 * (2 * 3 * (32 + 32) + 2 * 2 * (32 + 16))


def test_rank_dropout_leaves_out_output_units_and_rescales_the_rest():
    model, _delta = adapted(nn.Linear(24, 200), r=2, rank_dropout=0.25)
    x = torch.randn(7, 24)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        full = model(x) - base
        model.train()
        part = model(x) - base
    kept = (part != 0).all(0)
    assert torch.equal(kept, (part != 0).any(0))  # a unit is there for every row, or for none
    assert 0.55 < kept.float().mean() < 0.92
    assert torch.allclose(part[:, kept] * kept.float().mean(), full[:, kept], atol=1e-5)
    with torch.no_grad():
        assert not torch.equal(model(x) - base, part)


def test_module_dropout_leaves_out_everything_or_nothing():
    model, _ = adapted(nn.Linear(24, 20), r=2, module_dropout=0.5)
    x = torch.randn(7, 24)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        full = model(x)
        model.train()
        draws = [model(x) for _ in range(30)]
    seen = {"base" if torch.equal(d, base) else "full" if torch.equal(d, full) else "other" for d in draws}
    assert seen == {"base", "full"}


@pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
def test_dropout_is_drawn_in_mixed_batches_too(option):
    model = get_peft_model(nn.Sequential(nn.Linear(24, 50)), LoHaConfig(target_modules=["0"], r=2, **{option: 0.5}))
    model.add_adapter("other", LoHaConfig(target_modules=["0"], r=2))
    for name in ("default", "other"):
        model.set_adapter(name)
        shake(model)
    x, names = torch.randn(4, 24), ["default", "other", "default", "__base__"]
    model.eval()
    with torch.no_grad():
        calm = model(x, adapter_names=names)
        model.train()
        draws = torch.stack([model(x, adapter_names=names) for _ in range(8)])
    assert torch.allclose(draws[:, [1, 3]], calm[[1, 3]].expand(8, -1, -1), atol=1e-5)
    assert not torch.allclose(draws[:, [0, 2]], calm[[0, 2]].expand(8, -1, -1), atol=1e-3)


def test_shares_a_product_with_lora_in_a_mixed_batch():
    model = get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    model.add_adapter("lora", LoraConfig(target_modules=["q_proj"], r=3, task_type="CAUSAL_LM"))
    edits = [model.adapters.edits[n][0] for n in ("default", "lora")]
    assert edits[0].group() == edits[1].group() is not None
    with torch.no_grad():
        for edit in edits:
            for p in edit.trainable():
                p.add_(torch.randn(p.shape) * 0.3)
        wanted = []
        for name in ("default", "lora"):
            model.set_adapter(name)
            wanted.append(model(input_ids=ids()).logits)
        mixed = model(input_ids=ids(), adapter_names=["lora", "default", "lora"]).logits
    assert torch.allclose(mixed[1], wanted[0][1], atol=1e-5)
    assert torch.allclose(mixed[[0, 2]], wanted[1][[0, 2]], atol=1e-5)


def test_merging_in_training_mode_draws_nothing():
    model, _delta = adapted(nn.Linear(24, 36), r=2, rank_dropout=0.5, module_dropout=0.5)
    x = torch.randn(5, 24)
    with torch.no_grad():
        wanted = model(x)
        model.train()
        model.merge_adapter()
        assert torch.allclose(model(x), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "at least 1, not 0"),
        ({"rank_pattern": {"0": 0}}, "at least 1, not 0"),
        ({"rank_dropout": 1.0}, r"rank_dropout must be in \[0, 1\)"),
        ({"module_dropout": -0.1}, r"module_dropout must be in \[0, 1\)"),
        ({"init_weights": "lycoris"}, "init_weights must be True or False"),
        ({"rank_pattern": {"nothing": 2}}, "nothing"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ValueError, match=words):
        adapted(nn.Linear(4, 4), **options)


def test_dropout_on_a_weight_that_the_module_reads_itself():
    with pytest.raises(ConfigError, match="'0' reads its weight itself, so rank_dropout cannot act"):
        adapted(nn.MultiheadAttention(16, 4), rank_dropout=0.1)
