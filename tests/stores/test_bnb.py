"""bitsandbytes weights: every method trains over them as over their unpacked numbers."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from deltatune import LoraConfig, PeftModel, get_peft_model
from deltatune.errors import DeltatuneError
from deltatune.stores import find_store
from laws import METHOD_NAMES, config_for
from tiny import shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BITS = {
    "nf4": lambda: bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True),
    "fp4": lambda: bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="fp4", compress_statistics=False),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 128, has_fp16_weights=False),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(128, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(x)))


def quantised(kind: str) -> Net:
    torch.manual_seed(0)
    return Net(BITS[kind]()).to("cpu").eval()


def unpacked(net: Net) -> Net:
    """The same network with its numbers in an ordinary layer."""
    store = find_store(net.layer.weight)
    layer = nn.Linear(64, 128)
    layer.weight.data = store.load(net.layer.weight).float()
    layer.bias.data = net.layer.bias.data.float()
    twin = Net(layer).eval()
    twin.head = net.head
    return twin


def methods() -> list[str]:
    """Those that adapt a linear layer."""
    found = []
    for method in METHOD_NAMES:
        try:
            get_peft_model(Net(nn.Linear(64, 128)), config_for(method))
        except (DeltatuneError, AttributeError):
            continue
        found.append(method)
    return [m for m in found if m != "FULL"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("method", methods())
def test_as_over_the_unpacked_numbers(method, kind, tmp_path):
    x = torch.randn(2, 3, 64)
    net = quantised(kind)
    numbers = find_store(net.layer.weight).load(net.layer.weight)
    dense = unpacked(quantised(kind))
    torch.manual_seed(1)
    model = get_peft_model(net, config_for(method))
    torch.manual_seed(1)
    twin = get_peft_model(dense, config_for(method))
    for m in (model, twin):
        shake(m)
        m.train()  # in inference the layer multiplies in bfloat16 on some processors
    outs = []
    for m in (model, twin):
        torch.manual_seed(2)  # the same dropout
        outs.append(m(x))
        outs[-1].square().sum().backward()
    assert torch.allclose(*outs, atol=1e-4)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-2, rtol=1e-3) for a, b in pairs if a.requires_grad)
    assert torch.equal(find_store(net.layer.weight).load(net.layer.weight), numbers)
    model.save_pretrained(tmp_path)
    model.set_requires_grad("default", False)
    model.eval()
    again = PeftModel.from_pretrained(quantised(kind), tmp_path)
    assert torch.allclose(again(x), model(x), atol=1e-6)


def test_eight_bits_train():
    x = torch.randn(2, 3, 64)
    net = quantised("int8")
    base = net(x)
    model = get_peft_model(net, config_for("LORA"))
    assert torch.equal(model(x), base)
    shake(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", BITS)
def test_counts_are_logical(kind):
    model = get_peft_model(quantised(kind), config_for("LORA"))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 4 * (64 + 128)
    assert total - trainable == 64 * 128 + 128 + 128 * 5 + 5


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_read_the_same_after_inference(kind):
    net = quantised(kind)
    store = find_store(net.layer.weight)
    before = store.load(net.layer.weight)
    with torch.no_grad():
        net(torch.randn(2, 3, 64))  # some processors repack the bytes here
    for _ in range(2):  # their scales are bfloat16 then: 8 bits of precision
        assert torch.allclose(store.load(net.layer.weight), before, atol=2**-7 * float(before.abs().max()))
        net(torch.randn(2, 3, 64))


FOUR = {
    "nf4": {"quant_type": "nf4", "compress_statistics": True},
    "nf4_single": {"quant_type": "nf4", "compress_statistics": False},
    "fp4_single": {"quant_type": "fp4", "compress_statistics": False},
}


def four(kind: str) -> Net:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, **FOUR[kind])
    net = Net(layer)
    net.head = nn.Linear(64, 5)
    return net.to("cpu").eval()


@pytest.mark.parametrize("kind", FOUR)
def test_an_evaluation_leaves_the_weight_and_its_gradients(kind):
    """bitsandbytes 0.50 repacks its weights in inference on some processors, and no gradient passes them then."""
    net = four(kind)
    store = find_store(net.layer.weight)
    before, stored_before = store.load(net.layer.weight), {k: v.clone() for k, v in net.layer.state_dict().items()}
    may = net.layer.support_avx512bf16_for_cpu
    model = get_peft_model(net, config_for("LORA"))
    shake(model, 0.02)
    x = torch.randn(4, 128, requires_grad=True)

    def gradient() -> torch.Tensor:
        (made,) = torch.autograd.grad(model.train()(x).square().sum(), x)
        return made

    first = gradient()
    with torch.no_grad():
        model.eval()(x.detach())
    assert torch.equal(gradient(), first)
    assert torch.equal(store.load(net.layer.weight), before)
    with torch.no_grad():
        model.eval()(x.detach())
        live = model(x.detach())
        merged = model.merge_and_unload(into="same")
        merged(x.detach())
    stored = merged.layer.state_dict()
    for name in stored_before:
        assert name == "weight" or torch.equal(stored[name], stored_before[name])  # the scales are the base's own
    assert not torch.equal(stored["weight"], stored_before["weight"])
    assert float((merged(x.detach()) - live).abs().mean()) < 0.1 * float(live.abs().mean())
    model = get_peft_model(four(kind), config_for("LORA"))
    assert model.unload().layer.support_avx512bf16_for_cpu == may


def test_a_layer_that_comes_after_the_first_adapter_keeps_its_weight_too():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(128, 128), four("nf4").layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.first(x))

    net = Two()
    model = get_peft_model(net, LoraConfig(target_modules=["first"]))
    net.layer = four("nf4").layer
    net.layer.support_avx512bf16_for_cpu = True  # as on a processor that has them; the layer is never repacked here
    model.add_adapter("b", LoraConfig(target_modules=["layer"]))
    assert not net.layer.support_avx512bf16_for_cpu
    model.delete_adapter("default")
    model.delete_adapter("b")
    assert net.layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("kind", FOUR)
def test_a_base_that_ran_before(kind):
    net = four(kind)
    before = find_store(net.layer.weight).load(net.layer.weight)
    with torch.no_grad():
        net(torch.randn(4, 128))  # some processors repack the bytes here, scales rounded to bfloat16
    read = find_store(net.layer.weight).load(net.layer.weight)
    assert torch.allclose(read, before, atol=2**-7 * float(before.abs().max()))
    model = get_peft_model(net, config_for("LORA"))
    shake(model)
    assert torch.allclose(find_store(net.layer.weight).load(net.layer.weight), read, atol=1e-6)
    x = torch.randn(4, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.train()(x).sum(), x)
    dense = model.merge_and_unload()
    (wanted,) = torch.autograd.grad(dense(x).sum(), x)
    assert torch.allclose(gradient, wanted, atol=1e-5)


def test_a_moved_weight_goes_to_a_device_alone():
    weight: Any = four("nf4").layer.weight
    store: Any = find_store(weight)
    change = torch.zeros(64, 128)
    made = store.move(weight, change, torch.full_like(change, 0.5))
    made.quant_state.to("meta")
    assert made.quant_state.state2.absmax.is_meta
    assert not weight.quant_state.state2.absmax.is_meta


@pytest.mark.parametrize("kept_as", [torch.bfloat16, torch.float32])
def test_bytes_in_a_floating_type(kept_as):
    """What FSDP shards a 4-bit weight as."""
    plain: Any = four("nf4").layer.weight
    other: Any = bnb.nn.Params4bit(
        torch.empty(0),
        quant_state=plain.quant_state,
        quant_type="nf4",
        quant_storage=kept_as,
        bnb_quantized=True,
    )
    other.data = plain.data.view(-1).view(kept_as).view(-1, 1)
    store: Any = find_store(plain)
    change = torch.randn(64, 128) * 1e-2
    draw = torch.rand(64, 128)
    made = store.move(other, change, draw)
    assert made.dtype == kept_as
    assert made.shape == other.shape
    assert torch.equal(made.data.view(torch.uint8).view(-1), store.move(plain, change, draw).data.view(-1))
    assert torch.equal(
        store.save(other, change).data.view(torch.uint8).view(-1), store.save(plain, change).data.view(-1)
    )
