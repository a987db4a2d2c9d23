"""DoRA: the card's tests; the path without V against the definition; dropout, several adapters, generation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltatune import LoraConfig, get_peft_model
from deltatune.methods.dora import DoraDelta
from laws import MATRICES, Net, make, shake
from tiny import gpt2, ids, llama
from tiny import shake as shake_all

BYPASSED = [k for k in MATRICES if k.name != "multihead"]


def linear(dropout: float = 0.0, **fields):
    torch.manual_seed(0)
    net = Net(nn.Linear(12, 16), 16).eval()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["layer"], use_dora=True, lora_dropout=dropout, **fields)
    return get_peft_model(net, config)


def delta_of(model, adapter: str = "default") -> DoraDelta:
    (delta,) = model.adapters.deltas(adapter)
    assert isinstance(delta, DoraDelta)
    return delta


def test_row_norms_of_the_merged_weight_are_the_magnitudes():
    model = linear()
    shake(model)
    layer = model.get_base_model().layer
    model.merge_adapter()
    m = layer.lora_magnitude_vector.default.weight
    assert torch.allclose(layer.weight.norm(dim=1), m.abs(), atol=1e-5)


def test_with_magnitudes_at_the_norms_it_is_lora():
    model = linear()
    shake(model)
    delta, x = delta_of(model), torch.randn(5, 12)
    with torch.no_grad():
        delta.magnitude.weight.copy_(delta.pair.merged(delta.ref.load()).norm(dim=1))
    layer = model.get_base_model().layer
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias) + delta.pair.update(x, x), atol=1e-5)


def test_scaling_the_factors_against_each_other_changes_nothing():
    model = linear()
    shake(model)
    x = torch.randn(6, 3, 12)
    before = model(x)
    delta = delta_of(model)
    with torch.no_grad():
        delta.pair.lora_A.weight.mul_(3)
        delta.pair.lora_B.weight.div_(3)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_first_gradients():
    model = linear()
    model(torch.randn(6, 3, 12)).square().sum().backward()
    delta = delta_of(model)
    assert delta.magnitude.weight.grad.abs().sum() > 0
    assert delta.pair.lora_B.weight.grad.abs().sum() > 0
    assert delta.pair.lora_A.weight.grad.abs().sum() == 0


def test_norm_is_a_constant_for_the_gradient():
    """Gradients of the call equal those of (m / const) · V, written out."""
    model = linear()
    shake(model)
    x = torch.randn(5, 12)
    delta = delta_of(model)
    layer = model.get_base_model().layer
    w, b = layer.weight, layer.bias
    m, down, up = (s.weight for s in (delta.magnitude, delta.pair.lora_A, delta.pair.lora_B))
    v = w + 2 * up @ down
    formed = F.linear(x, (m / v.norm(dim=1).detach())[:, None] * v, b)
    weights = torch.randn(5, 16)
    wanted = torch.autograd.grad((formed * weights).sum(), (m, down, up))
    found = torch.autograd.grad((layer(x) * weights).sum(), (m, down, up))
    for a, c in zip(wanted, found, strict=True):
        assert torch.allclose(a, c, atol=1e-4)


@pytest.mark.parametrize("kind", BYPASSED, ids=lambda k: k.name)
def test_norm_from_pieces_is_the_norm(kind):
    model, _ = make("LORA+dora", kind)
    shake(model, scale=1.0)
    delta = delta_of(model)
    norm = delta.pair.merged(delta.ref.load()).norm(dim=-1)
    assert torch.allclose(delta._norm(), norm, rtol=1e-5)


def test_a_zero_row_stays_finite_and_learns():
    net = Net(nn.Linear(12, 16), 16).eval()
    with torch.no_grad():
        net.layer.weight[3] = 0
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["layer"], use_dora=True))
    x = torch.randn(6, 3, 12)
    model(x).square().sum().backward()
    delta = delta_of(model)
    grads = [s.weight.grad for s in delta.slots]
    assert all(torch.isfinite(g).all() for g in grads)
    assert delta.pair.lora_B.weight.grad[3].abs().sum() > 0
    model.merge_adapter(safe_merge=True)


def test_dropout_reaches_both_added_terms():
    """y + (c - 1) W dropout(x) + c s B A dropout(x), with one mask."""
    model = linear(dropout=0.5)
    shake(model)
    model.train()
    layer, delta, x = model.get_base_model().layer, delta_of(model), torch.randn(5, 12)
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    w, c = layer.weight, delta.ratio()
    a, b = delta.pair.factors()
    wanted = F.linear(x, w, layer.bias) + (c - 1) * F.linear(dropped, w) + c * F.linear(F.linear(dropped, a), b)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_beside_a_merged_adapter(training):
    """While another adapter is merged the output is not the plain base's; the sum must be the same."""
    model = linear()
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["layer"], lora_dropout=0.0))
    for name, seed in (("default", 1), ("plain", 2)):
        shake(model, name, seed=seed)
    model.train(training)
    model.set_adapter(["default", "plain"])
    x = torch.randn(6, 3, 12)
    both = model(x)
    model.merge_adapter(["plain"])
    assert torch.allclose(model(x), both, atol=1e-5)


def test_two_and_a_bias_in_one_batch():
    """The second edit of a module sees the base's output, not what the first has added."""
    model = linear(bias="lora_only")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], use_dora=True, bias="lora_only"))
    model.add_adapter("plain", LoraConfig(r=3, target_modules=["layer"]))
    apart, names = {}, ["default", "other", "plain", "other", "__base__", "default"]
    x = torch.randn(6, 3, 12)
    for i, name in enumerate(model.peft_config):
        shake(model, name, seed=i)
        model.set_adapter(name)
        apart[name] = model(x)
    with model.disable_adapter():
        apart["__base__"] = model(x)
    wanted = torch.stack([apart[n][i] for i, n in enumerate(names)])
    assert torch.allclose(model(x, adapter_names=names), wanted, atol=1e-5)


def test_parts_of_a_fused_projection():
    """DoRA on q and v of GPT-2's c_attn: live equals merged, k is the base's."""
    base = gpt2()
    k = base.transformer.h[0].attn.c_attn.weight[:, 32:64].clone()
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["c_attn"], enable_lora=[True, False, True], use_dora=True)
    )
    with model.disable_adapter():
        plain = model(ids()).logits
    assert torch.allclose(model(ids()).logits, plain, atol=1e-5)
    shake_all(model)
    live = model(ids()).logits
    assert not torch.allclose(live, plain, atol=1e-3)
    mixed = model(ids(), adapter_names=["default", "__base__", "default"]).logits
    assert torch.allclose(mixed[0], live[0], atol=1e-5)
    assert torch.allclose(mixed[1], plain[1], atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(ids()).logits, live, atol=1e-5)
    assert torch.equal(base.transformer.h[0].attn.c_attn.weight[:, 32:64], k)


def test_generation_works_out_each_norm_once(monkeypatch):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    shake(model)
    calls = []
    norm = DoraDelta._norm
    monkeypatch.setattr(DoraDelta, "_norm", lambda self: calls.append(self) or norm(self))
    x = ids(2, 4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=x, **options)
    assert len(calls) == len(model.adapters.deltas("default"))
    with torch.no_grad():  # what is kept ends with the generation
        for delta in model.adapters.deltas("default"):
            delta.pair.lora_B.weight.mul_(-3)
    logits = model(out).logits
    model.merge_adapter()
    assert torch.allclose(model(out).logits, logits, atol=1e-4)


def test_bytes_kept_for_backward_hold_no_second_weight():
    """Neither V nor the norm's inputs are kept: less than one copy of the weight beyond the activations."""
    n, positions = 512, 2
    model = get_peft_model(nn.Sequential(nn.Linear(n, n)), LoraConfig(r=4, target_modules=["0"], use_dora=True))
    shake(model)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = 0

    def pack(tensor):
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(positions, n))
    assert 0 < kept < 0.2 * n * n * 4


@pytest.mark.parametrize("how", ["copy", "data", "other"])
def test_the_norm_follows_the_base(how):
    """‖W‖² is kept between calls, and not longer than W stays what it is."""
    model = linear()
    shake(model)
    delta = delta_of(model)
    layer = model.get_base_model().layer
    x = torch.randn(3, 12)
    model(x)
    kept = delta._kept
    model(x)
    assert delta._kept is kept
    new = torch.randn_like(layer.weight)
    if how == "copy":
        with torch.no_grad():
            layer.weight.copy_(new)
    elif how == "data":
        layer.weight.data.copy_(new)
    else:
        layer.weight = nn.Parameter(new, requires_grad=False)
    expected = F.linear(x, delta.merged(layer.weight), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_in", "n_out"), [(2000, 6), (6, 2000)])
@pytest.mark.parametrize("axis", [0, 1], ids=["row", "column"])
def test_the_norm_follows_one_row_or_column_that_is_written_through_data(n_in, n_out, axis):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(n_in, n_out))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False))
    delta = model.adapters.edits["default"][0]
    weight = model.get_base_model()[0].weight
    for i in range(1, weight.shape[axis], max(1, weight.shape[axis] // 7)):
        delta._norm()
        weight.data.select(axis, i).fill_(3)
        expected = delta.pair.merged(weight).norm(dim=1)
        assert torch.allclose(delta._norm(), expected, rtol=1e-4)
