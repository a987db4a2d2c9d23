"""VeRA: the card's tests, and that the shared pair is there once whatever is done to the model."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltatune import (
    ConfigError,
    PeftModel,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from tiny import ids, llama, shake

PLACES = ["q_proj", "up_proj", "down_proj"]


def vera(adapter: str = "default", **fields) -> PeftModel:
    config = VeraConfig(task_type="CAUSAL_LM", **{"r": 6, "target_modules": PLACES, **fields})
    return get_peft_model(llama(), config, adapter)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def test_first_gradients():
    model = vera()
    model(ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (p.grad.abs().sum() == 0) == (".vera_lambda_d." in name), name


def test_counts():
    """sites · (out + r); RoBERTa-base, r 256 on q and v: 24 · (768 + 256)."""
    model = vera()
    assert model.get_nb_trainable_parameters()[0] == 2 * ((32 + 6) + (48 + 6) + (32 + 6))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = nn.Linear(768, 768), nn.Linear(768, 768)

    with torch.device("meta"):
        roberta = nn.ModuleList(Attention() for _ in range(12))
    model = get_peft_model(roberta, VeraConfig(target_modules=["query", "value"]))
    assert model.get_nb_trainable_parameters()[0] == 24_576


def test_equation():
    model = vera(vera_dropout=0.0)
    shake(model)
    base = model.get_base_model()
    layer, x = base.model.layers[1].mlp.up_proj, torch.randn(3, 32)
    a, b = base.vera_A.default[:, :32], base.vera_B.default[:48]
    assert tuple(base.vera_A.default.shape) == (6, 48)
    assert tuple(base.vera_B.default.shape) == (48, 6)
    wanted = layer.vera_lambda_b.default * ((layer.vera_lambda_d.default * (x @ a.T)) @ b.T)
    assert torch.allclose(layer(x), x @ layer.weight.T + wanted, atol=1e-5)


def test_change_has_rank_r():
    model = vera(r=3)
    shake(model)
    delta = model.adapters.deltas("default")[0]
    w = delta.ref.load()
    assert torch.linalg.matrix_rank(delta.merged(w) - w, atol=1e-5) == 3


def shared(model: PeftModel, adapter: str = "default") -> set[int]:
    return {d.bank.a.weight.data_ptr() for d in model.adapters.deltas(adapter)}


def test_the_pair_is_one_tensor_after_every_move():
    model = vera()
    assert len(shared(model)) == 1
    state = [n for n, _ in model.named_buffers() if "vera" in n]
    assert state == ["base_model.model.vera_A.default", "base_model.model.vera_B.default"]
    twin = copy.deepcopy(model)
    assert len(shared(twin)) == 1
    assert shared(twin) != shared(model)
    shake(twin)
    live = logits(twin)
    half = copy.deepcopy(twin).to(torch.bfloat16)
    assert len(shared(half)) == 1
    assert half.get_base_model().vera_A.default.dtype == torch.bfloat16
    assert torch.allclose(logits(half).float(), live, atol=0.3)
    twin.rename_adapter("default", "renamed")
    assert torch.equal(logits(twin), live)
    twin.delete_adapter("renamed")
    assert not [n for n, _ in twin.get_base_model().named_buffers() if "vera" in n]


def test_the_seed_alone_gives_the_same_model(tmp_path):
    model = vera(save_projection=False, projection_prng_key=5)
    shake(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names
    assert not any(n.endswith(("vera_A", "vera_B")) for n in names)
    for options in ({}, {"low_cpu_mem_usage": True}):
        torch.manual_seed(123)
        fresh = PeftModel.from_pretrained(llama(), tmp_path, **options)
        assert torch.equal(logits(fresh), logits(model))


def test_a_file_that_lost_the_pair_is_refused(tmp_path):
    model = vera()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if "vera_A" not in k}, path)
    with pytest.raises(ValueError, match=r"1 keys are missing: base_model\.vera_A"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_two_adapters_with_seeds_of_their_own(tmp_path):
    model = vera()
    model.add_adapter("other", VeraConfig(r=9, target_modules=["q_proj"], projection_prng_key=8))
    shake(model)
    apart = []
    for name in ("default", "other"):
        model.set_adapter(name)
        apart.append(logits(model))
    with torch.no_grad():
        mixed = model(ids(), adapter_names=["other", "default", "other"]).logits
    assert torch.allclose(mixed[1], apart[0][1], atol=1e-5)
    assert torch.allclose(mixed[2], apart[1][2], atol=1e-5)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(llama(), tmp_path)
    fresh.load_adapter(tmp_path / "other", "other")
    fresh.set_adapter("other")
    assert torch.equal(logits(fresh), apart[1])
    merged = [m.merge_and_unload(adapter_names=["other"]) for m in (model, fresh)]
    assert torch.equal(logits(merged[0]), logits(merged[1]))


def test_dropout_is_on_the_input_in_training_only():
    model = vera(vera_dropout=0.5)
    shake(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.allclose(logits(model), logits(model), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1"),
        ({"vera_dropout": 1.0}, r"vera_dropout must be in \[0, 1\)"),
        ({"projection_prng_key": None}, "projection_prng_key must be a whole number"),
        ({"bias": "lora_only"}, 'bias must be "none", "all" or "vera_only"'),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ConfigError, match=message):
        VeraConfig(**fields)


def test_injected_without_a_peft_model():
    base = inject_adapter_in_model(VeraConfig(r=6, target_modules=PLACES), llama())
    shake(base)
    state = get_peft_model_state_dict(base)
    assert {"base_model.vera_A", "base_model.vera_B"} <= set(state)
    assert "model.layers.0.self_attn.q_proj.vera_lambda_b" in state
    again = inject_adapter_in_model(VeraConfig(r=6, target_modules=PLACES), llama(), state_dict=state)
    assert torch.equal(logits(again), logits(base))
    gathered = {k: t.clone() for k, t in base.state_dict().items()}  # as FSDP gives it
    assert torch.equal(get_peft_model_state_dict(base, gathered)["base_model.vera_A"], state["base_model.vera_A"])
