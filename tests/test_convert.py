"""Any adapter with a ΔW written as a LoRA."""

from __future__ import annotations

import pytest
import torch

from deltatune import (
    BitFitConfig,
    CannotMergeError,
    ConfigError,
    FullConfig,
    LoHaConfig,
    LoraConfig,
    LoraDropoutConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from methods.test_lora_places import mixtral
from tiny import gpt2, ids, llama, shake


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def adapted(config):
    model = get_peft_model(llama(), config)
    shake(model)
    return model


CONFIGS = {
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "full": FullConfig(target_modules=["0.self_attn.q_proj", "1.mlp"]),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]),
    "tied": LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_ranks_give_the_same_outputs(name, tmp_path):
    model = adapted(CONFIGS[name])
    wanted, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    config, tensors = convert_to_lora(model, None)
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert torch.equal(logits(model), wanted)
    fresh = get_peft_model(llama(), config)
    set_peft_model_state_dict(fresh, tensors)
    assert torch.allclose(logits(fresh), wanted, atol=5e-6)
    report = save_as_lora(tmp_path, model)
    assert report.error < 1e-6
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(fresh))


def tied():
    return llama(tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        (gpt2, LoraConfig(r=2, target_modules=["c_attn"], enable_lora=[True, False, True])),
        (tied, LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)),
        (tied, LoraConfig(r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
        (llama, LoraConfig(r=2, trainable_token_indices=[3, 5])),
        (llama, LoraConfig(r=2, layer_replication=[(0, 2), (0, 2)])),
        (mixtral, LoraConfig(r=3, target_parameters=["gate_up_proj", "down_proj"])),
    ],
    ids=["fused", "tied", "tied_copy", "tokens", "replicated", "experts"],
)
def test_wherever_lora_goes(base, config, tmp_path):
    model = get_peft_model(base(), config)
    shake(model, scale=0.05)
    if base is mixtral:  # two parameters of one module, of different ranks
        with torch.no_grad():
            model.adapters.deltas("default")[-1].lora_B.weight[:, 8:] = 0
    wanted = logits(model)
    report = save_as_lora(tmp_path, model)
    assert report.error < 1e-6
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.allclose(logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(base()), wanted, rtol=1e-3, atol=1e-3)
    if base is mixtral:
        assert {s.rank for s in report.sites.values()} == {3}


def test_an_init_with_an_offset_needs_twice_its_rank():
    model = adapted(CONFIGS["pissa"])
    config, _ = convert_to_lora(model, None)
    assert config.r <= 4
    assert config.init_lora_weights is True


def test_fixed_rank_and_its_alpha():
    config, tensors = convert_to_lora(adapted(CONFIGS["loha"]), 3)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (3, 3, {})
    assert config.target_modules == {"q_proj", "v_proj"}
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {3}
    assert all(k.startswith("base_model.model.model.layers.") for k in tensors)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_a_share_of_the_variance(share, tmp_path):
    model = adapted(CONFIGS["dora"])
    report = save_as_lora(tmp_path, model, share)
    for place, site in report.sites.items():
        delta = next(d for d in model.adapters.deltas("default") if place.startswith(f"{d.host.path}."))
        w = delta.ref.load()
        energy = torch.linalg.svdvals((delta.merged(w) - w).detach().double()).square()
        assert float(energy[: site.rank].sum() / energy.sum()) >= share - 1e-6
        assert float(energy[: site.rank - 1].sum() / energy.sum()) < share
        assert site.relative**2 == pytest.approx(1 - float(energy[: site.rank].sum() / energy.sum()), abs=1e-6)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert {d.r for d in loaded.adapters.deltas("default")} == {s.rank for s in report.sites.values()}


def test_an_untrained_adapter_and_ranks_of_a_few_tokens():
    config, _ = convert_to_lora(get_peft_model(llama(), CONFIGS["loha"]), None)
    assert config.r == 1  # a LoRA has a rank; its change is zero


def test_the_chosen_adapter_is_converted_and_others_stay():
    model = adapted(CONFIGS["loha"])
    model.add_adapter("second", LoraConfig(r=5, target_modules=["k_proj"]))
    shake(model)
    config, tensors = convert_to_lora(model, None, adapter_name="second")
    assert (config.r, config.target_modules) == (5, {"k_proj"})
    assert all("k_proj" in k for k in tensors)
    assert model.active_adapters == ["default"]


def test_what_has_no_change_of_a_weight():
    model = adapted(LoraDropoutConfig(ensemble=2, target_modules=["q_proj"]))
    assert not model.base_model.supports_lora_conversion()
    with pytest.raises(CannotMergeError, match="mean of several runs"):
        convert_to_lora(model, 4)
    assert model.supports_lora_conversion() is False
    assert adapted(CONFIGS["dora"]).supports_lora_conversion()
    from tiny import bert

    model = get_peft_model(bert(), BitFitConfig())
    assert not model.supports_lora_conversion()
    with pytest.raises(ConfigError, match="changes no matrix"):
        convert_to_lora(model, 4)


@pytest.mark.parametrize("rank", [0, -1, 1000, 0.0, 1.5, "4", True])
def test_impossible_ranks(rank):
    model = adapted(CONFIGS["loha"])
    with pytest.raises(ConfigError, match="rank"):
        convert_to_lora(model, rank)
    assert list(model.peft_config) == ["default"]


def test_options_and_paths_that_do_not_work(tmp_path):
    model = adapted(CONFIGS["loha"])
    with pytest.raises(ConfigError, match="compile_kwargs"):
        convert_to_lora(model, 2, compile_kwargs={"mode": "max-autotune"})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        save_as_lora(tmp_path / "file", model)
    with pytest.raises(ValueError, match="no adapter named"):
        convert_to_lora(model, 2, adapter_name="other")
