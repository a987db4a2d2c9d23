"""Intrinsic SAID: the card's tests beyond the laws."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltatune import PeftModel, SaidConfig, get_peft_model
from deltatune.errors import ConfigError
from deltatune.methods.said import BITS, hadamard, hadamard_matrix, power_of_two
from tiny import ids, llama, shake


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 9))


def adapted(**options) -> PeftModel:
    return get_peft_model(net(), SaidConfig(**{"target_modules": ["0", "2"], "d": 40, **options}))


def deltas(model):
    return model.adapters.deltas("default")


def vector(model) -> torch.nn.Parameter:
    return model.get_base_model().said_v.default


def changes(model, v: torch.Tensor) -> torch.Tensor:
    """All sites' P(v), one after the other."""
    with torch.no_grad():
        vector(model).copy_(v)
        return torch.cat([d.change().flatten() for d in deltas(model)])


@pytest.mark.parametrize("bits", range(15))
def test_hadamard(bits):
    x = torch.randn(1 << bits)
    slow = x.clone()
    for i in range(bits):  # the textbook butterfly
        pairs = slow.view(-1, 2, 1 << i)
        slow = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).flatten()
    assert torch.allclose(hadamard(x, hadamard_matrix(BITS)), slow, atol=1e-3)


def test_fastfood_formula():
    """P v = (H G Π H S pad(v))[:D] / sqrt(L ΣG²) / sqrt(D / L), every factor a matrix."""
    model = adapted(structure_aware=False)
    (delta, _), v = deltas(model), torch.randn(40)
    size, length = 130, 256
    h = hadamard_matrix(8)
    signs = torch.diag(torch.cat([delta.signs.weight, torch.zeros(length - 40)]).float())
    gauss = torch.diag(delta.gauss.weight)  # divided by the norm
    places = delta.places.weight.long()
    # 64 columns of H S pad(v) repeat four times: any permutation with these places modulo 64
    choice = torch.zeros(length, length)
    for start in range(64):
        rows = (places == start).nonzero().flatten()
        assert len(rows) == 4
        choice[rows, start + 64 * torch.arange(4)] = 1
    assert torch.equal(choice.sum(0), torch.ones(length))
    wanted = (h @ gauss @ choice @ h @ signs @ torch.nn.functional.pad(v, (0, length - 40)))[:size]
    assert torch.allclose(changes(model, v)[:size], wanted, atol=1e-5)
    # 1 / (sqrt(L ΣG²) sqrt(D / L)) is already in G
    assert torch.allclose(delta.gauss.weight.norm(), torch.tensor(size**-0.5))


def test_linear_and_adjoint():
    model = adapted(structure_aware=False)
    a, b = torch.randn(40), torch.randn(40)
    pa, pb = changes(model, a), changes(model, b)
    assert torch.allclose(changes(model, 2 * a - 3 * b), 2 * pa - 3 * pb, atol=1e-5)
    u = torch.randn_like(pa)
    together = torch.cat([d.change().flatten() for d in deltas(model)])
    (back,) = torch.autograd.grad((together * u).sum(), vector(model))
    assert torch.allclose(pb @ u, b @ back, atol=1e-4)


def test_norm_is_kept_in_the_mean():
    ratios = []
    for key in range(40):
        model = adapted(structure_aware=False, projection_prng_key=key)
        v = torch.randn(40)
        changes(model, v)
        ratios += [(d.change().detach().norm() ** 2 / v.norm() ** 2).item() for d in deltas(model)]
    assert abs(sum(ratios) / len(ratios) - 1) < 0.05


def test_all_updates_lie_in_d_dimensions():
    model = adapted(d=12, structure_aware=False)
    stacked = torch.stack([changes(model, torch.randn(12)) for _ in range(17)])
    assert torch.linalg.matrix_rank(stacked) == 12


def test_d_is_the_count():
    assert adapted(d=40).get_nb_trainable_parameters()[0] == 40
    assert len(vector(adapted(d=40))) == 38
    model = adapted(d=40, structure_aware=False)
    assert model.get_nb_trainable_parameters()[0] == 40
    assert not any("lambda" in n for n, _ in model.named_parameters())


def test_seed():
    v = torch.randn(38)
    assert torch.equal(changes(adapted(), v), changes(adapted(), v))
    assert not torch.allclose(changes(adapted(), v), changes(adapted(projection_prng_key=1), v), atol=1e-2)


def test_sites_have_projections_of_their_own():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), SaidConfig(target_modules=["0", "1"], d=20))
    changes(model, torch.randn(18))
    one, two = [d.change() for d in deltas(model)]
    assert not torch.allclose(one, two, atol=1e-2)


def test_at_the_start_the_vector_learns_and_the_scales_do_not():
    model = adapted()
    model(torch.randn(5, 10)).square().sum().backward()
    assert vector(model).grad.abs().sum() > 0
    assert all(d.scale.weight.grad.abs().sum() == 0 for d in deltas(model))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_file_holds_vector_and_scales_only(tmp_path, low_cpu_mem_usage):
    model = get_peft_model(llama(), SaidConfig(d=100, task_type="CAUSAL_LM", projection_prng_key=3))
    shake(model, scale=1.0)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in state.values()) == 100
    assert "base_model.said_v" in state
    again = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
        assert not torch.allclose(model(input_ids=ids()).logits, llama()(input_ids=ids()).logits, atol=1e-3)


def test_nothing_of_the_weights_size_is_kept_for_v():
    """Only dW itself is kept (for the gradient of x), and x (for that of dW)."""
    layer = nn.Linear(64, 64)
    model = get_peft_model(nn.Sequential(layer), SaidConfig(target_modules=["0"], d=16))
    x = torch.randn(2, 64)  # no gradient asked: dW is not kept either
    kept: list[torch.Tensor] = []
    buffers = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert sum(t.numel() for t in kept if t.untyped_storage().data_ptr() not in buffers) < 64


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d": 0}, "d must be at least 1"),
        ({"d": 2}, "leaves no vector beside one λ for each of 2 weights"),
        ({"d": 1000}, "more than the 247 numbers"),
        ({"d": 2.5}, "whole number"),
        ({"projection_prng_key": "x"}, "whole number"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(ConfigError, match=words):
        adapted(**options)
