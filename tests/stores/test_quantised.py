"""What holds for every quantised storage: reading, writing back, merging three ways, and unmerging to the bit."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.core.rounding import TABLE, draws
from deltatune.errors import CannotMergeError, ConfigError
from deltatune.stores import find_store, quantised
from deltatune.stores.dense import dequantize_model
from deltatune.stores.grid import BeyondGridError
from quantised import HERE, stored
from tiny import ids, shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
each = pytest.mark.parametrize("kind", HERE)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(x)))


def net_of(kind: str) -> Net:
    torch.manual_seed(0)
    net = Net(nn.Linear(128, 128))
    net.layer = HERE[kind](net.layer)
    return net.train()  # in inference bitsandbytes multiplies in bfloat16 on some processors


def adapted(kind: str, strength: float = 0.1, **options) -> PeftModel:
    model = get_peft_model(net_of(kind), LoraConfig(r=4, target_modules=["layer"], **options))
    shake(model, strength)
    return model


@each
def test_reading_and_writing_back(kind):
    torch.manual_seed(0)
    layer = nn.Linear(128, 128)
    w = layer.weight.detach().clone()
    made = HERE[kind](layer)
    weight = quantised(made)
    store = find_store(weight)
    read = store.load(weight)
    assert store.shape(weight) == read.shape == w.shape
    assert float((read.float() - w).norm() / w.norm()) < 0.15
    before = stored(made)
    again = store.load(store.save(weight, read.float()))
    grid = 0.03 if "hqq" in kind else 0.01  # numbers on the grid stay there; HQQ looks for a better grid
    assert float((again.float() - read.float()).norm() / w.norm()) < grid
    assert all(torch.equal(a, b) for a, b in zip(before, stored(made), strict=True))


@each
def test_merging_three_ways_and_unmerging_to_the_bit(kind):
    model, x = adapted(kind), torch.randn(2, 3, 128)
    net = model.get_base_model()
    layer, names, before = net.layer, [n for n, _ in net.named_parameters()], stored(net.layer)
    own, live = type(layer), model(x)
    with model.disable_adapter():
        base = model(x)
    effect = float((live - base).abs().mean().detach())
    tolerance = 2e-3 if "int8" in kind else 1e-5  # bitsandbytes' int8 layer multiplies in 8 bits
    model.merge_adapter()
    assert torch.allclose(model(x), live, atol=tolerance)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    assert torch.allclose(model(x), live, atol=tolerance)
    model.unmerge_adapter()
    model.merge_adapter(into="same")
    assert type(net.layer) is own
    rounded = model(x)
    assert 1e-6 < float((rounded - live).abs().mean().detach()) < effect
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, stored(net.layer), strict=True))
    assert [n for n, _ in net.named_parameters()] == names
    assert torch.equal(model(x), live)
    model.set_merge_aware()
    aware = model(x)
    assert torch.allclose(aware, rounded, atol=5e-3 if kind == "bnb_int8" else 1e-5)
    aware.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.set_merge_aware(False)
    assert torch.equal(model(x), live)


@each
def test_dither_keeps_small_changes_in_the_mean_and_nothing_else(kind):
    torch.manual_seed(0)
    layer = nn.Linear(128, 128)
    layer.weight.data = torch.randn(128, 128) * 0.04
    layer = HERE[kind](layer)
    weight, before = quantised(layer), stored(layer)
    store = find_store(weight)
    base = store.load(weight).float()
    draw = draws("layer.weight", base.numel(), 0, base.device).view(base.shape)
    same = store.move(weight, torch.zeros_like(base), draw)
    assert torch.equal(store.load(same).float(), base)
    change = 1e-3 * (1 + torch.rand_like(base))  # a twentieth of a step of 4 bits
    change[::2] *= -1
    got = store.load(store.move(weight, change, draw)).float() - base
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        assert float(got[rows].mean() / change[rows].mean()) == pytest.approx(1, abs=0.15)
    assert bool((got * change >= 0).all())  # every number stays or goes the way of its change
    assert torch.equal(store.load(store.move(weight, change, draw)).float() - base, got)
    assert all(torch.equal(a, b) for a, b in zip(before, stored(layer), strict=True))
    mid = torch.where(base.abs() < 0.03, -base, 0.0)  # steps across the middle of the grid
    assert float((store.load(store.move(weight, mid, draw)).float() - base - mid).abs().max()) < 0.06
    own = kind in ("gptq", "awq")  # their grid stays, so numbers are cut back to it
    with contextlib.nullcontext() if own else pytest.raises(BeyondGridError):
        store.move(weight, torch.randn_like(base) * 50, draw)
    assert all(torch.equal(a, b) for a, b in zip(before, stored(layer), strict=True))


@each
def test_a_change_beyond_the_grid_quantises_anew(kind):
    model = adapted(kind)
    shake(model, 1.0)
    layer = model.get_base_model().layer
    model.merge_adapter()
    wanted = layer.weight.detach().clone()
    model.unmerge_adapter()
    model.merge_adapter(into="same")
    weight = quantised(layer)
    got = find_store(weight).load(weight).float()
    if kind not in ("gptq", "awq"):  # which keep their grid whatever happens
        assert float((got - wanted).norm() / wanted.norm()) < 0.2


@each
@pytest.mark.parametrize("rounding", ["dithered", "nearest"])
def test_a_merge_is_what_ran_merge_aware(kind, rounding):
    model, x = adapted(kind, 0.01), torch.randn(2, 3, 128)  # no change leads beyond the grid
    model.set_merge_aware(rounding=rounding, seed=3)
    aware = model(x)
    model.merge_adapter(into="same")  # rounds as the model is set to
    tolerance = 5e-3 if kind == "bnb_int8" else 1e-5
    assert torch.allclose(model(x), aware, atol=tolerance)
    model.unmerge_adapter()
    model.merge_adapter()  # dense weights hold the numbers that ran
    assert type(model.get_base_model().layer.weight) is nn.Parameter
    assert torch.allclose(model(x), aware, atol=tolerance)
    model.unmerge_adapter()
    if rounding == "dithered":
        model.set_merge_aware(seed=4)
        assert not torch.equal(model(x), aware)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_gradients_pass_straight_through(options):
    torch.manual_seed(0)
    net = nn.Sequential(HERE["nf4"](nn.Linear(128, 128)))
    model = get_peft_model(net, LoraConfig(r=4, target_modules=["0"], **options))
    shake(model, 0.01)
    x, weights = torch.randn(6, 128, requires_grad=True), torch.randn(6, 128)
    params = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad((model(x) * weights).sum(), params)
    model.set_merge_aware()
    *through, dx = torch.autograd.grad((model(x) * weights).sum(), [*params, x])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, through, strict=True))
    with torch.no_grad():
        model.merge_adapter()
        assert torch.allclose(dx, weights @ net[0].weight, atol=1e-5)


def test_draws():
    draw = draws("a.weight", 5000, 0, torch.device("cpu"))
    assert 0 < float(draw.min()) < 1e-3 < 0.999 < float(draw.max()) < 1
    assert float(draw.mean()) == pytest.approx(0.5, abs=0.02)
    assert torch.equal(draws("a.weight", 100, 0, torch.device("cpu")), draw[:100])
    assert not torch.equal(draws("b.weight", 5000, 0, torch.device("cpu")), draw)
    assert not torch.equal(draws("a.weight", 5000, 1, torch.device("cpu")), draw)
    many = draws("a.weight", 2 * TABLE + 5, 0, torch.device("cpu"))
    assert len(many) == 2 * TABLE + 5
    assert torch.equal(many[:TABLE], many[TABLE : 2 * TABLE])


def test_a_store_without_a_grid_says_so(monkeypatch):
    from deltatune.stores.nf4_layer import Nf4Store

    model = adapted("nf4")
    monkeypatch.delattr(Nf4Store, "move")
    with pytest.raises(CannotMergeError, match=r"the weight of 'layer' cannot be rounded with dither; ask for"):
        model.merge_adapter(into="same")
    model.merge_adapter(into="same", rounding="nearest")


@each
def test_unloaded_is_an_ordinary_model(kind):
    model, x = adapted(kind), torch.randn(2, 3, 128)
    live = model(x)
    plain = model.merge_and_unload()
    assert type(plain.layer) is nn.Linear
    assert torch.allclose(plain(x), live, atol=2e-3 if "int8" in kind else 1e-5)
    assert sorted(plain.state_dict()) == ["head.bias", "head.weight", "layer.bias", "layer.weight"]
    fresh = Net(nn.Linear(128, 128))
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh(x), plain(x))


@each
def test_two_adapters_one_merged(kind):
    model, x = adapted(kind), torch.randn(2, 3, 128)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    both = model(x)
    model.merge_adapter(["default"])
    tolerance = 2e-3 if "int8" in kind else 1e-5
    assert torch.allclose(model(x), both, atol=tolerance)
    model.add_adapter("third", LoraConfig(r=2, target_modules=["layer"]))  # made while the layer is another
    model.unmerge_adapter()
    model.set_adapter(["default", "other", "third"])
    assert torch.allclose(model(x), both, atol=tolerance)


@each
def test_dequantised_in_place(kind):
    net, x = net_of(kind), torch.randn(2, 3, 128)
    before = net(x)
    assert torch.allclose(dequantize_model(net)(x), before, atol=2e-3 if "int8" in kind else 1e-5)
    assert type(net.layer) is nn.Linear


def test_eight_bits_read_right_after_the_first_call():
    net = net_of("bnb_int8") if "bnb_int8" in HERE else pytest.skip("bitsandbytes is not installed")
    before = find_store(quantised(net.layer)).load(quantised(net.layer))
    net(torch.randn(2, 3, 128))  # the layer takes the scales out of the parameter
    assert torch.equal(find_store(quantised(net.layer)).load(quantised(net.layer)), before)


def test_merge_aware_rounds_the_sum_of_adapters_and_rows_of_a_batch():
    model, x = adapted("nf4"), torch.randn(4, 3, 128)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    model.set_merge_aware()
    aware = model(x)
    rows = model(x, adapter_names=["default", "other", "__base__", "default"])
    for i, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        assert torch.allclose(model(x)[i], rows[i], atol=1e-5)
    model.set_adapter(["default", "other"])
    model.set_merge_aware(False)
    model.merge_adapter(into="same")
    assert torch.allclose(model(x), aware, atol=1e-5)


def test_what_merge_aware_refuses():
    model = get_peft_model(Net(nn.Linear(128, 128)), LoraConfig(target_modules=["layer"]))
    with pytest.raises(ConfigError, match="stored in few bits, and this base has none"):
        model.set_merge_aware()
    model = get_peft_model(net_of("nf4"), LoraConfig(target_modules=["layer"], lora_dropout=0.1))
    with pytest.raises(ConfigError, match=r"lora_dropout=0.1 has no input to act on; set lora_dropout=0"):
        model.set_merge_aware()
    with pytest.raises(ConfigError, match='into must be "dense" or "same"'):
        model.merge_adapter(into="4bit")
    with pytest.raises(ConfigError, match='rounding must be "dithered" or "nearest"'):
        model.merge_adapter(into="same", rounding="up")
    with pytest.raises(ConfigError, match='is for into="same": dense weights are not rounded'):
        model.merge_adapter(rounding="nearest")
    with pytest.raises(ConfigError, match='rounding must be "dithered" or "nearest"'):
        model.set_merge_aware(rounding="up")


def test_a_storage_that_cannot_be_written_back(monkeypatch):
    if "ao_int8" not in HERE:
        pytest.skip("torchao is not installed")
    from deltatune.stores import ao

    monkeypatch.setattr(ao, "MAKERS", {})
    monkeypatch.setattr(ao, "MOVERS", {})
    model, x = adapted("ao_int8"), torch.randn(2, 3, 128)
    live, before = model(x), stored(model.get_base_model().layer)
    with pytest.raises(CannotMergeError, match="cannot be written back; merge into dense weights"):
        model.merge_adapter(into="same", rounding="nearest")
    with pytest.raises(CannotMergeError, match="cannot be rounded with dither; merge into dense weights"):
        model.merge_adapter(into="same")
    with pytest.raises(CannotMergeError, match='ask for rounding="nearest"'):
        model.set_merge_aware()
    assert torch.equal(model(x), live)
    assert all(torch.equal(a, b) for a, b in zip(before, stored(model.get_base_model().layer), strict=True))
    model.merge_adapter()
    assert torch.allclose(model(x), live, atol=1e-5)


def test_copies():
    model, x = adapted("nf4"), torch.randn(2, 3, 128)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@each
def test_counts_are_of_numbers(kind):
    trainable, total = adapted(kind).get_nb_trainable_parameters()
    assert trainable == 4 * (128 + 128)
    assert total - trainable - 5 * 128 - 5 in (128 * 128 + 128, 128 * 128)  # some layers keep the bias as no parameter


@each
def test_parts_of_a_fused_projection_are_rows_of_the_weight(kind):
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": 0}
    model = Phi3ForCausalLM(Phi3Config(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    attention = model.model.layers[0].self_attn
    layer = nn.Linear(128, 256)
    nn.init.zeros_(layer.bias)
    attention.qkv_proj = HERE[kind](layer)
    config = LoraConfig(r=2, target_modules=["qkv_proj"], enable_lora=[True, False, True])
    assert [site.rows for site in config.sites(model)] == [slice(0, 128), slice(192, 256)]
    with_parts = get_peft_model(model, config)
    shake(with_parts, 0.05)
    before, live = stored(attention.qkv_proj), with_parts(ids()).logits
    with_parts.merge_adapter()
    assert torch.allclose(with_parts(ids()).logits, live, atol=2e-2 if kind == "bnb_int8" else 1e-5)
    with_parts.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, stored(attention.qkv_proj), strict=True))
