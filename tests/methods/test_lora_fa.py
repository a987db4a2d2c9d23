"""LoRA-FA: A stays, what is kept for backward does not grow with the input, files are LoRA's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltatune import ConfigError, LoraConfig, LoraFAConfig, PeftModel, get_peft_model
from deltatune.methods.lora_fa import project_gradients
from laws import KINDS, make
from laws import shake as shake_adapter
from tiny import ids, llama, shake


def test_a_is_frozen_and_spans_the_change():
    model = get_peft_model(llama(), LoraFAConfig(r=3, target_modules=["q_proj"]))
    deltas = model.adapters.deltas("default")
    before = [d.lora_A.weight.clone() for d in deltas]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(deltas)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.set_requires_grad("default", True)  # asks for what trains; A is not part of it
    for delta, a in zip(deltas, before, strict=True):
        assert torch.equal(delta.lora_A.weight, a)
        assert not delta.lora_A.weight.requires_grad
        w = delta.ref.load()
        change = delta.merged(w) - w
        assert change.abs().max() > 1e-4
        assert torch.linalg.matrix_rank(change, atol=1e-6) <= 3
        onto = a.T @ torch.linalg.inv(a @ a.T) @ a  # the projection on A's rows
        assert torch.allclose(change @ onto, change, atol=1e-5)


def kept_bytes(config: LoraConfig, width: int, out: int = 32, positions: int = 256) -> int:
    """Bytes that autograd keeps for one adapted layer, the parameters and the input's own storage apart."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(width, out)), config)
    x = torch.randn(positions, width, requires_grad=True)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x * 1.0)
    return sum(kept.values())


@pytest.mark.parametrize("r", [4, 16])
def test_bytes_kept_for_backward_scale_with_r(r):
    fa = {w: kept_bytes(LoraFAConfig(r=r, target_modules=["0"]), w) for w in (64, 1024)}
    plain = {w: kept_bytes(LoraConfig(r=r, target_modules=["0"]), w) for w in (64, 1024)}
    assert fa[64] == fa[1024]
    assert fa[64] <= (256 + 32) * r * 4  # A x, and s · B
    assert plain[1024] - plain[64] == 256 * (1024 - 64) * 4  # LoRA keeps x


def test_files_are_loras(tmp_path):
    model = get_peft_model(llama(), LoraFAConfig(r=3, target_modules=["q_proj", "v_proj"]))
    shake(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.rpartition("lora_")[2] for n in names} == {"A.weight", "B.weight"}
    as_lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    assert torch.equal(PeftModel.from_pretrained(llama(), tmp_path, config=as_lora)(ids()).logits, model(ids()).logits)


def test_an_embedding_learns():
    """LoRA starts an embedding's A at zero; frozen there, nothing could move."""
    model = get_peft_model(llama(), LoraFAConfig(r=3, target_modules=["embed_tokens"]))
    model(ids(), labels=ids()).loss.backward()
    (delta,) = model.adapters.deltas("default")
    assert delta.lora_B.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"lora_dropout": 0.1}, "its mask would be kept"), ({"use_dora": True}, "use_dora is not possible in LoRA-FA")],
)
def test_what_cancels_the_saving_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraFAConfig(**fields)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k.name in ("linear", "conv1d_hf", "conv2d")], ids=lambda k: k.name
)
def test_the_optimisers_form_takes_the_whole_gradient_projected(kind):
    """One SGD step changes W by -lr · G P, with P the projection on A's rows and G the gradient of W."""
    model, x = make("LORA_FA", kind)
    shake_adapter(model)
    (delta,) = model.adapters.deltas("default")
    w = delta.merged(delta.ref.load()).detach()
    layer = model.get_base_model().layer
    layer.weight.requires_grad_(True)  # the change is added to W, so W's gradient is that of the sum
    model(x).square().sum().backward()
    g = delta.ref.op.matrix(layer.weight.grad)
    layer.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([delta.lora_B.weight], lr=1e-2)
    handle = project_gradients(optimizer, model)
    optimizer.step()
    a = delta.ref.op.unpack(delta.lora_A.weight, delta.lora_B.weight)[0]
    onto = a.mT @ torch.linalg.inv(a @ a.mT) @ a
    wanted = -1e-2 * g @ onto
    assert wanted.abs().max() > 1e-4
    found = delta.merged(delta.ref.load()) - w
    assert torch.allclose(found, wanted, atol=1e-5 + 1e-4 * float(wanted.abs().max()))
    handle.remove()
    before = delta.lora_B.weight.grad.clone()
    optimizer.step()
    assert torch.equal(delta.lora_B.weight.grad, before)


def test_the_optimisers_form_needs_a_frozen_a():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match="this model has none; adapt it with LoraFAConfig"):
        project_gradients(optimizer, model)
