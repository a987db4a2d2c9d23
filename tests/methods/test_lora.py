"""LoRA: the card's tests that the laws do not cover; a bias on B; scaling; mixed batches with dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltatune import (
    CannotMergeError,
    ConfigError,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from laws import Net
from tiny import ids, llama, shake

QV = {"target_modules": ["q_proj", "v_proj"]}


def base(bias: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(12, 16, bias=bias), 16).eval()


def linear(r: int = 4, bias: bool = True, **fields):
    return get_peft_model(base(bias), LoraConfig(r=r, target_modules=["layer"], **fields))


def test_first_gradients():
    """B = 0, so only B moves at first; an embedding has it the other way round."""
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    model(ids(), labels=ids()).loss.backward()
    grads = {n: float(p.grad.abs().sum()) for n, p in model.named_parameters() if p.requires_grad}
    for name, size in grads.items():
        still = ".lora_A." in name or ".lora_embedding_B." in name
        assert (size == 0) == still, name


def test_change_has_rank_r():
    model = linear(r=3)
    shake(model)
    layer = model.get_base_model().layer
    before = layer.weight.detach().clone()
    model.merge_adapter()
    assert torch.linalg.matrix_rank(layer.weight.detach() - before, atol=1e-5) == 3


def test_base_is_bitwise_unchanged_by_training():
    untouched = llama()
    before = {n: p.clone() for n, p in untouched.named_parameters()}
    model = get_peft_model(untouched, LoraConfig(**QV, lora_dropout=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = dict(model.unload().named_parameters())
    assert list(plain) == list(before)
    assert all(torch.equal(plain[n], p) for n, p in before.items())


@pytest.mark.parametrize(("rslora", "power"), [(True, 0.0), (False, -0.5)])
def test_size_of_the_change_as_r_grows(rslora, power):
    """With entries of equal variance, rsLoRA's update keeps its size and LoRA's falls as r^-1/2."""
    x = torch.randn(64, 256)
    sizes = []
    for r in (16, 256):
        model = get_peft_model(
            nn.Sequential(nn.Linear(256, 256, bias=False)),
            LoraConfig(r=r, lora_alpha=4, use_rslora=rslora, target_modules=["0"]),
        )
        delta = model.adapters.deltas("default")[0]
        with torch.no_grad():
            for slot in delta.slots:
                slot.weight.normal_()
            sizes.append(float(delta.update(x, x).square().mean().sqrt()))
    assert sizes[1] / sizes[0] == pytest.approx((256 / 16) ** power, rel=0.15)


def test_only_factors_are_saved():
    keys = {"base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight"}
    assert set(get_peft_model_state_dict(linear())) == keys


# ---------------------------------------------------------------------- a bias on B
def test_bias_on_b_joins_the_layers_bias():
    model = linear(r=4, lora_alpha=8, lora_bias=True)
    shake(model)
    layer = model.get_base_model().layer
    x = torch.randn(5, 12)
    beta, b = layer.lora_B.default.bias.detach(), layer.bias.detach().clone()
    a, up = layer.lora_A.default.weight, layer.lora_B.default.weight
    wanted = F.linear(x, layer.weight, b) + 2 * (F.linear(F.linear(x, a), up) + beta)
    assert torch.allclose(layer(x), wanted, atol=1e-6)
    model.merge_adapter()
    assert torch.allclose(layer.bias, b + 2 * beta)
    model.unmerge_adapter()
    assert torch.equal(layer.bias, b)


def test_bias_on_b_without_a_bias_runs_but_does_not_merge(tmp_path):
    model = linear(bias=False, lora_bias=True)
    shake(model)
    x = torch.randn(6, 3, 12)
    live = model(x)
    layer = model.get_base_model().layer
    assert torch.allclose(layer(torch.zeros(1, 12)), 2 * layer.lora_B.default.bias, atol=1e-6)
    with pytest.raises(CannotMergeError, match="'layer' adds a bias to a layer that has none"):
        model.merge_adapter()
    assert torch.equal(model(x), live)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base(bias=False), tmp_path)(x), live)
    mixed = model(x, adapter_names=["default", "__base__"] * 3)
    with model.disable_adapter():
        plain = model(x)
    assert torch.allclose(mixed, torch.where(torch.tensor([True, False] * 3)[:, None], live, plain), atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(20, 16), "Embedding has no bias that B's could join"),
        (nn.MultiheadAttention(16, 4, bias=False), "MultiheadAttention has no bias"),
    ],
)
def test_bias_on_b_is_refused(layer, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(Net(layer, 16), LoraConfig(target_modules=["layer"], lora_bias=True))


def test_bias_on_b_and_dora_exclude_each_other():
    with pytest.raises(ConfigError, match="lora_bias=True is not possible with use_dora=True"):
        LoraConfig(lora_bias=True, use_dora=True)


def test_two_biases_on_one_layer_add_up():
    """bias="lora_only" trains the layer's own bias, lora_bias the one on B."""
    model = linear(lora_bias=True, bias="lora_only")
    shake(model)
    x = torch.randn(6, 3, 12)
    live = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), live, atol=1e-5)


# ---------------------------------------------------------------------- mixed batches
@pytest.mark.parametrize("option", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_every_row_has_its_own_adapters_dropout(option):
    model = linear(r=4, lora_dropout=0.0, **option)
    model.add_adapter("dropped", LoraConfig(r=2, target_modules=["layer"], lora_dropout=0.9, **option))
    shake(model)
    model.train()
    names = ["default", "dropped"] * 3
    x = torch.randn(1, 3, 12).expand(6, -1, -1)
    one, two = model(x, adapter_names=names), model(x, adapter_names=names)
    assert torch.equal(one[::2], two[::2])
    assert not torch.allclose(one[1::2], two[1::2], atol=1e-4)
    model.set_adapter("default")
    assert torch.allclose(one[::2], model(x)[::2], atol=1e-6)


class OwnForward(nn.Linear):
    """Reads its weight itself, so nothing can be added to its output."""

    def forward(self, x):
        return torch.tanh(F.linear(x, self.weight)) + self.bias


def test_rows_of_a_rebuilt_module_get_all_its_edits():
    torch.manual_seed(0)
    net = Net(OwnForward(12, 16), 16).eval()
    config = LoraConfig(r=4, target_modules=["layer"], bias="lora_only")
    model = get_peft_model(net, config)
    model.add_adapter("other", config)
    shake(model)
    x = torch.randn(6, 3, 12)
    apart = []
    for name in ("default", "other"):
        model.set_adapter(name)
        apart.append(model(x))
    names = ["default", "other", "other", "default", "other", "default"]
    wanted = torch.stack([apart[n == "other"][i] for i, n in enumerate(names)])
    assert torch.allclose(model(x, adapter_names=names), wanted, atol=1e-6)
