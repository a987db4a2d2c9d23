"""KronA: the card's tests beyond the laws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import KronaConfig, PeftModel, get_peft_model
from deltatune.core.ops import kronecker
from deltatune.errors import ConfigError, TargetError
from deltatune.methods.krona import smallest
from tiny import ids, llama, shake


def adapted(**options) -> tuple[PeftModel, nn.Module]:
    model = get_peft_model(nn.Sequential(nn.Linear(24, 36)), KronaConfig(target_modules=["0"], **options))
    return model, model.adapters.edits["default"][0]


def test_rank_and_norm_multiply():
    model, delta = adapted(a_shape=(6, 4))
    shake(model)
    a, b = delta.factors()
    assert (a.shape, b.shape) == ((6, 4), (6, 6))
    product = kronecker(a, b)
    rank = torch.linalg.matrix_rank
    assert rank(product) == rank(a) * rank(b) == 24
    assert torch.allclose(product.norm(), a.norm() * b.norm())


def test_scale_and_formula():
    model, delta = adapted(scale=3.0, a_shape=(2, 3))
    shake(model)
    x = torch.randn(5, 24)
    change = 3 * torch.kron(delta.a.weight, delta.b.weight)
    with torch.no_grad():
        wanted = model.get_base_model()[0].weight @ x.T + change @ x.T + model.get_base_model()[0].bias[:, None]
        assert torch.allclose(model(x), wanted.T, atol=1e-5)


def test_only_b_has_a_gradient_at_the_start():
    model, delta = adapted()
    model(torch.randn(3, 24)).square().sum().backward()
    assert delta.b.weight.grad.abs().sum() > 0
    assert delta.a.weight.grad.abs().sum() == 0


@pytest.mark.parametrize(("out", "inp"), [(576, 576), (36, 24), (7, 5), (1, 1)])
def test_fewest_numbers(out, inp):
    a1, a2 = smallest(out, inp)
    every = [p * q for p in range(1, out + 1) for q in range(1, inp + 1) if out % p == 0 and inp % q == 0]
    assert a1 * a2 in every
    assert a1 * a2 + out * inp // (a1 * a2) == min(n + out * inp // n for n in every)


def test_of_equally_small_shapes_the_squarest():
    assert smallest(576, 576) == (24, 24)


def test_count():
    model = get_peft_model(llama(), KronaConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    # q (32, 32): 32 + 32; v (16, 32): 16 · 32 splits best into 16 + 32 or 32 + 16
    assert model.get_nb_trainable_parameters()[0] == 2 * (64 + 48)
    with torch.no_grad():
        before = model(input_ids=ids()).logits
        shake(model)
        assert not torch.allclose(model(input_ids=ids()).logits, before, atol=1e-3)


def test_shapes_by_pattern():
    config = KronaConfig(target_modules=["q_proj", "v_proj"], a_shape=[4, 4], a_shape_pattern={"v_proj": [2, 8]})
    model = get_peft_model(llama(), config)
    layer = model.get_base_model().model.layers[0].self_attn
    assert layer.q_proj.krona_A.default.shape == (4, 4)
    assert layer.v_proj.krona_A.default.shape == (2, 8)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"a_shape": [5, 4]}, ConfigError, "5 does not divide its output size 36; the nearest that do are 4, 6"),
        ({"a_shape": [4, 7]}, ConfigError, "7 does not divide its input size 24"),
        ({"a_shape": [4]}, ConfigError, "two whole numbers"),
        ({"a_shape": [0, 4]}, ConfigError, "two whole numbers"),
        ({"scale": 0}, ConfigError, "scale must not be 0"),
        ({"a_shape_pattern": {"nothing": [2, 2]}}, (ConfigError, TargetError), "a_shape_pattern"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        adapted(**options)
