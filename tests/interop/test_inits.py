"""Initialisations across peft: what it computes, what it saves, and what it loads of ours."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import warnings

import peft
import pytest
import torch

import deltatune
from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways, run, same_files
from tiny import gpt2, llama, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # peft says that it writes the embeddings too
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
]
TARGETS = ["q_proj", "k_proj", "down_proj"]
FIELDS = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS}


def batch() -> dict[str, torch.Tensor]:
    x = torch.randint(2, 60, (1, 40), generator=torch.Generator().manual_seed(3))
    return {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x}


def saved_by_peft(folder, make=llama, **fields):
    model = peft.get_peft_model(make(), peft.LoraConfig(**{**FIELDS, **fields})).eval()
    shake(model, scale=0.3)
    model.save_pretrained(folder)
    return model


# ---------------------------------------------------------------------- loading peft's files
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
def test_files_of_peft_without_their_start_load(init, options, tmp_path):
    theirs = saved_by_peft(tmp_path / "peft", init_lora_weights=init, **options)
    ours = deltatune.PeftModel.from_pretrained(llama(), tmp_path / "peft")
    assert ours.load_report.clean
    assert torch.allclose(run(ours), run(theirs), atol=1e-5)
    with ours.disable_adapter():
        assert torch.equal(run(ours), run(llama()))
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.allclose(run(back), run(theirs), atol=1e-5)
    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert config["init_lora_weights"] == init


def test_embeddings_and_transposed_layers_of_peft_load(tmp_path):
    fields = {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": "pissa"}
    theirs = saved_by_peft(tmp_path / "a", **fields)  # peft starts embeddings as LoRA does
    assert torch.allclose(run(deltatune.PeftModel.from_pretrained(llama(), tmp_path / "a")), run(theirs), atol=1e-5)
    fields = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}
    theirs = saved_by_peft(tmp_path / "b", gpt2, **fields)
    assert torch.allclose(run(deltatune.PeftModel.from_pretrained(gpt2(), tmp_path / "b")), run(theirs), atol=1e-5)


@pytest.mark.parametrize("init", ["orthogonal", "mica"])
def test_starts_without_an_offset_go_both_ways(init, tmp_path):
    both_ways(llama, "Lora", tmp_path, init_lora_weights=init, **FIELDS)


def test_mica_freezes_what_peft_freezes():
    found = []
    for lib in (peft, deltatune):
        config = lib.LoraConfig(init_lora_weights="mica", **{**FIELDS, "target_modules": ["embed_tokens", "q_proj"]})
        model = lib.get_peft_model(llama(), config)
        found.append({n: (p.shape, p.requires_grad) for n, p in model.named_parameters() if "lora_" in n})
    assert found[0] == found[1]


def test_starts_that_cannot_be_computed_again_are_asked_for(tmp_path):
    saved_by_peft(tmp_path, init_lora_weights="pissa_niter_4")
    with pytest.raises(deltatune.AdapterLoadError, match="path_initial_model_for_weight_conversion"):
        deltatune.PeftModel.from_pretrained(llama(), tmp_path)
    model = deltatune.PeftModel.from_pretrained(llama(), tmp_path, strict=False)
    assert len(model.load_report.missing_keys) == 2 * len(model.adapters.deltas("default"))


# ---------------------------------------------------------------------- exporting to peft
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq", "corda", "lora_ga", "eva"])
def test_every_init_is_a_plain_lora_for_peft(init, tmp_path):
    model = llama()
    config = deltatune.LoraConfig(init_lora_weights=init, rank_pattern={"down_proj": 3}, use_rslora=True, **FIELDS)
    if init in ("corda", "lora_ga", "eva"):
        deltatune.prepare_init(model, config, [batch()])
    ours = deltatune.get_peft_model(model, config)
    shake(ours, scale=0.3)
    ours.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="not read")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(run(back), run(ours), atol=1e-5)
    ranks = {len(p) for n, p in back.named_parameters() if "lora_A" in n}
    assert max(ranks) <= 8


def test_convolutions_and_embeddings_too(tmp_path):
    fields = {"target_modules": ["embed", "image", "head"], "r": 3}
    ours = deltatune.get_peft_model(conv_net(), deltatune.LoraConfig(init_lora_weights="pissa", **fields))
    shake(ours, scale=0.3)
    deltatune.save_as_lora(tmp_path, ours)
    back = peft.PeftModel.from_pretrained(conv_net(), tmp_path)
    assert torch.allclose(run(back, tokens()), run(ours, tokens()), atol=1e-5)


# ---------------------------------------------------------------------- the same numbers
def test_eva_finds_what_peft_finds(tmp_path):
    states, models = [], []
    x = torch.randint(2, 60, (4, 15), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x)}]
    for lib in (peft, deltatune):
        config = lib.LoraConfig(init_lora_weights="eva", eva_config=lib.EvaConfig(rho=2.0), **FIELDS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lib.get_peft_model(llama(), config)
            states.append(lib.get_eva_state_dict(model, data, show_progress_bar=False))
            lib.initialize_lora_eva_weights(model, eva_state_dict=dict(states[-1]))  # peft empties it
        models.append(model)
    theirs, ours = states
    assert {k: t.shape for k, t in theirs.items()} == {k: t.shape for k, t in ours.items()}
    for name, a in theirs.items():
        cosines = (a.float() * ours[name]).sum(-1).abs()
        assert torch.allclose(cosines, torch.ones(len(a)), atol=1e-3), name
    config = models[1].peft_config["default"]
    assert config.rank_pattern == models[0].peft_config["default"].rank_pattern
    assert config.alpha_pattern == models[0].peft_config["default"].alpha_pattern
    shake(models[1])
    models[1].save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert torch.allclose(run(back), run(models[1]), atol=1e-5)
    back.save_pretrained(tmp_path / "back")
    same_files(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_finds_what_peft_finds(mode, monkeypatch):
    stand_in = types.ModuleType("attr")  # peft's file imports attrs for a dataclass and nothing else
    stand_in.dataclass = dataclasses.dataclass
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    products = []
    for lib, options, preprocess in (
        (peft, CordaConfig, preprocess_corda),
        (deltatune, deltatune.CordaConfig, deltatune.preprocess_corda),
    ):
        model = llama()
        config = lib.LoraConfig(init_lora_weights="corda", corda_config=options(corda_method=mode), **FIELDS)

        def run_model(model=model):
            with torch.no_grad():
                model(input_ids=batch()["input_ids"])

        preprocess(model, config, run_model)
        found = dict(lib.get_peft_model(model, config).named_parameters())
        products.append({n: found[n.replace("lora_A", "lora_B")] @ t for n, t in found.items() if "lora_A" in n})
    for name, theirs in products[0].items():
        assert torch.allclose(products[1][name], theirs, atol=1e-4 * float(theirs.detach().abs().max())), name


def test_peft_ignores_the_frozen_start_in_our_files(tmp_path):
    """A file of ours holds A0 and B0; peft derives them for PiSSA and gets the same model."""
    ours = deltatune.get_peft_model(llama(), deltatune.LoraConfig(init_lora_weights="pissa", **FIELDS))
    shake(ours)
    ours.save_pretrained(tmp_path)
    assert torch.allclose(run(peft.PeftModel.from_pretrained(llama(), tmp_path)), run(ours), atol=1e-5)
