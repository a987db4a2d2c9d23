"""Bad input gets one sentence: what is wrong, where, and the likeliest fix; and nothing has been changed."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltatune.core.files as files
from deltatune import BitFitConfig, FullConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, plan_targets
from tiny import bert, gpt2, ids, llama, shake

CAUSAL = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_prjo"]}, "target_modules 'v_prjo' matches no module.*did you mean 'v_proj'"),
        ({"target_modules": r".*\.q_porj"}, "matches no module"),
        ({"target_modules": "["}, "not a regular expression"),
        ({"target_modules": ["mlp"]}, "LlamaMLP, which has no weight.*model.layers.0.mlp.gate_proj"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save 'lm_haed' matches no module.*did you mean 'lm_head'"),
        ({"exclude_modules": ["nothing"]}, "exclude_modules 'nothing' matches no module"),
        ({"exclude_modules": ["q_proj"]}, "taken away by exclude_modules"),
        ({"layers_to_transform": [0, 7]}, "names layer 7, but targets lie in layers 0 to 1"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "no target lies in numbered layers"),
        ({"layers_pattern": "layers"}, "it needs layers_to_transform"),
        ({"rank_pattern": {"k_proj": 4}}, "rank_pattern key 'k_proj' matches no adapted module"),
        ({"alpha_pattern": {"nope": 4}}, "alpha_pattern key 'nope' matches no adapted module"),
    ],
)
def test_patterns_that_match_nothing(options, message):
    base = llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, LoraConfig(**{**CAUSAL, "target_modules": ["q_proj"], **options}))
    assert all(p.requires_grad for p in base.parameters())
    assert type(base.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": -3}, "at least 1"),
        ({"r": 2.5}, "at least 1"),
        ({"rank_pattern": {"a": 0}}, "at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout must be"),
        ({"lora_dropout": "a"}, "lora_dropout must be"),
        ({"r": True}, "at least 1"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, not 'x'"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "lora_alpha must be a number"),
        ({"bias": "some"}, "bias must be"),
        ({"init_lora_weights": "gausian"}, "did you mean 'gaussian'"),
        ({"task_type": "CAUSAL"}, "task_type 'CAUSAL' is not one of.*did you mean 'CAUSAL_LM'"),
        ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
        ({"modules_to_save": "lm_head"}, "must be a list"),
    ],
)
def test_impossible_values(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"enable_lora": [True, False, True]}, "'model.layers.0.self_attn.q_proj' is not one"),
        (gpt2, {"enable_lora": [True, False]}, "2 entries for 'transformer.h.0.attn.c_attn'.*give three"),
        (llama, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "no head of this model is tied"),
        (lambda: llama(tie_word_embeddings=True), {"ensure_weight_tying": True}, "adapt the embedding or leave"),
    ],
)
def test_options_that_would_do_nothing_or_nonsense(make, options, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(), LoraConfig(**options))


def test_other_methods():
    with pytest.raises(ValueError, match="has a bias, so nothing would train"):
        get_peft_model(llama(), BitFitConfig())
    with pytest.raises(ValueError, match="FullConfig needs target_modules"):
        FullConfig()
    with pytest.raises(ValueError, match="did you mean 'lm_head'"):
        get_peft_model(llama(), FullConfig(target_modules=["lm_heat"]))


@pytest.mark.parametrize("name", ["", "a.b", "__base__", "default", "forward"])
def test_adapter_names(name):
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    with pytest.raises(ValueError, match="adapter"):
        model.add_adapter(name, LoraConfig(**CAUSAL))


def test_unknown_adapters():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    for act in (model.set_adapter, model.delete_adapter, lambda n: model.merge_adapter([n])):
        with pytest.raises(ValueError, match="no adapter named 'defualt'; did you mean 'default'"):
            act("defualt")
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        model(ids(2), adapter_names=["default", "x"])
    with pytest.raises(ValueError, match="1 entries for a batch of 2 rows"):
        model(ids(2), adapter_names=["default"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base"):
        model(ids(2), adapter_names=["default", "default"])


def test_two_copies_of_one_module_cannot_be_active_together():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL, modules_to_save=["lm_head"]))
    model.add_adapter("b", LoraConfig(**CAUSAL, modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="both have their own copy of 'lm_head'"):
        model.set_adapter(["default", "b"])


# ---------------------------------------------------------------------- files
@pytest.fixture
def saved(tmp_path):
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    shake(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def test_every_missing_and_unexpected_key_is_listed(saved):
    def change(tensors):
        key = next(k for k in tensors if "layers.1.self_attn.q_proj.lora_A" in k)
        tensors[key.replace("q_proj", "q_porj")] = tensors.pop(key)
        return tensors

    rewrite(saved, change)
    base = llama()
    message = "1 keys are missing: .*layers.1.self_attn.q_proj.lora_A.* 1 keys are unexpected"
    with pytest.raises(ValueError, match=message) as info:
        PeftModel.from_pretrained(base, saved)
    assert "nearest to the first" in str(info.value)
    assert "in Python, strict=False loads what fits" in str(info.value)  # the command line has no such option
    assert all(p.requires_grad for p in base.parameters())  # the base is as it was
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in llama().named_parameters()]
    model = PeftModel.from_pretrained(llama(), saved, strict=False)
    assert len(model.load_report.missing_keys) == len(model.load_report.unexpected_keys) == 1


def test_all_keys_wrong_is_no_silent_base_model(saved):
    rewrite(saved, lambda tensors: {f"x.{k}": t for k, t in tensors.items()})
    with pytest.raises(ValueError, match="8 keys are missing"):
        PeftModel.from_pretrained(llama(), saved)
    mapping = {r"^x\.": ""}
    assert PeftModel.from_pretrained(llama(), saved, key_mapping=mapping).load_report.clean


def test_a_base_of_another_shape_or_depth(saved):
    with pytest.raises(ValueError, match=r"has shape \(8, 32\) in the file and \(8, 64\) here"):
        PeftModel.from_pretrained(llama(hidden_size=64), saved)
    with pytest.raises(ValueError, match="keys are missing"):
        PeftModel.from_pretrained(llama(num_hidden_layers=3), saved)


def test_another_base_of_the_same_shape_is_reported(saved):
    with pytest.raises(ValueError, match="made for another base: the numbers of model.layers.0.self_attn.q_proj"):
        PeftModel.from_pretrained(llama(seed=9), saved)
    with pytest.warns(UserWarning, match="made for another base"):
        PeftModel.from_pretrained(llama(seed=9), saved, strict=False)
    assert PeftModel.from_pretrained(llama().bfloat16(), saved).load_report.clean  # another precision is no other base


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_truncated_files(saved, cut):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="is damaged or cut off"):
        PeftModel.from_pretrained(llama(), saved)


def test_pickles_are_refused(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle file.*convert it"):
        PeftModel.from_pretrained(llama(), saved)
    with pytest.raises(ValueError, match="would write a pickle"):
        get_peft_model(llama(), LoraConfig(**CAUSAL)).save_pretrained(saved, safe_serialization=False)


def test_places_that_are_no_adapters(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match="is not a directory here, and the hub could not give"):
        PeftModel.from_pretrained(llama(), "someone/adapter")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        PeftConfig.from_pretrained(tmp_path)


def test_unknown_configuration_keys(saved):
    path = saved / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "from_the_future": None}))
    assert PeftConfig.from_pretrained(saved).r == 8  # asks for nothing
    path.write_text(json.dumps({**values, "use_rslorra": True}))
    with pytest.raises(
        ValueError, match="sets 'use_rslorra', which LoraConfig does not have; did you mean 'use_rslora'"
    ):
        PeftConfig.from_pretrained(saved)
    path.write_text(json.dumps({**values, "peft_type": "LORRA"}))
    with pytest.raises(ValueError, match="method 'LORRA', which is unknown; did you mean 'LORA'"):
        PeftConfig.from_pretrained(saved)


def test_a_full_disk_leaves_the_old_checkpoint(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    real = files.save_file

    def full(tensors, path, metadata):
        real(tensors, path, metadata)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_merging_a_broken_adapter_safely():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(model(ids()).logits, llama()(ids()).logits)


def test_rows_that_cannot_be_told_apart():
    model = get_peft_model(bert(kind="BertModel"), LoraConfig(target_modules=["position_embeddings"]))
    with pytest.raises(ValueError, match="position_embeddings' is called with 1 rows"):
        model(ids(3), adapter_names=["default"] * 3)


def test_out_proj_of_a_multihead_attention_is_no_silent_no_op():
    net = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    model = get_peft_model(net, LoraConfig(target_modules=["out_proj"]))
    x = torch.randn(2, 5, 16)
    base = model(x)
    shake(model)
    assert not torch.allclose(model(x), base, atol=1e-3)
    with pytest.raises(ValueError, match="lora_dropout cannot reach its input"):
        get_peft_model(
            nn.TransformerEncoderLayer(16, 4, 32), LoraConfig(target_modules=["self_attn"], lora_dropout=0.1)
        )


def test_wrapping_twice():
    model = get_peft_model(llama(), LoraConfig(**CAUSAL))
    with pytest.raises(ValueError, match="already; use add_adapter"):
        get_peft_model(model, LoraConfig(**CAUSAL))


def test_a_plan_says_what_would_be_touched():
    base = llama(tie_word_embeddings=True)
    plan = plan_targets(base, LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["model.norm"]))
    assert plan.patterns["q_proj"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert plan.patterns["modules_to_save"] == ["model.norm"]
    assert plan.tied == [("model.embed_tokens.weight", "lm_head.weight")]
    assert type(base.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize(
    "normed", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.orthogonal]
)
def test_a_weight_that_is_computed_at_every_call_is_refused_by_name(normed):
    model = torch.nn.Sequential()
    model.add_module("first", normed(torch.nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="'weight' of 'first' is computed.*remove_parametrizations"):
        get_peft_model(model, LoraConfig(target_modules=["first"]))


def test_a_model_and_a_configuration_in_this_order():
    with pytest.raises(ValueError, match="in this order, not LoraConfig and Linear"):
        get_peft_model(LoraConfig(), torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="not list and LoraConfig"):
        get_peft_model(["fc"], LoraConfig())


@pytest.mark.parametrize("order", ["little", "big"])
def test_tensors_of_a_file_are_on_the_device_that_was_asked_for(order, tmp_path, monkeypatch):
    """A default device says nothing about where a file's bytes go."""
    tensors = {"a": torch.randn(3, 2), "empty": torch.empty(0, 4), "number": torch.tensor(2.5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(files.sys, "byteorder", order)
    assert (files._read_floats(tmp_path / "x.safetensors") is None) == (order == "big")
    monkeypatch.setattr(files.sys, "byteorder", "little")
    with torch.device("meta"):
        found, _ = files.read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_dropout": 0.1}, {"trainable_token_indices": [3, 1]}], ids=str
)
def test_a_default_device_changes_nothing_for_a_base_that_is_elsewhere(options, tmp_path):
    model, x = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], **options)).train(), ids(2)
    shake(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.device("meta"):
        model.save_pretrained(tmp_path)
        for _ in range(2):
            layer(torch.ones(2, layer.in_features, device="cpu")).sum().backward()
    base = llama()
    with torch.device("meta"):
        again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again.eval()(x).logits, model.eval()(x).logits)
