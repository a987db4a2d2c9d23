"""Counts that the field publishes, on full-size models without memory; and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers

from deltatune import LoraConfig, get_peft_model


def on_meta(kind: str, config: transformers.PretrainedConfig):
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


def test_mt5_large():
    config = transformers.MT5Config(
        vocab_size=250112, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = on_meta("MT5ForConditionalGeneration", config)
    for targets in (["q", "v"], None):  # the default is found from the structure
        model = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", r=8, target_modules=targets))
        assert model.get_nb_trainable_parameters()[0] == 2_359_296
        model = model.unload()


@pytest.mark.parametrize("targets", [["query", "value"], ["q_proj", "v_proj"], None])
def test_vit_base_with_a_new_head(targets):
    model = on_meta("ViTForImageClassification", transformers.ViTConfig(num_labels=101))
    config = LoraConfig(r=16, target_modules=targets, modules_to_save=["classifier"])
    if targets == ["query", "value"]:  # the names of older transformers
        with pytest.warns(UserWarning, match="'(query|value)' is called '[qv]_proj' in this model") as seen:
            model = get_peft_model(model, config)
        assert any("'query' is called 'q_proj'" in str(w.message) for w in seen)
    else:
        model = get_peft_model(model, config)
    assert model.get_nb_trainable_parameters() == (667_493, 86_466_149)


def test_bert_base_names_and_shapes():
    model = on_meta("BertModel", transformers.BertConfig())
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "key", "value", "dense"]))
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    layer = "base_model.model.encoder.layer.0"
    assert shapes[f"{layer}.attention.self.query.weight"] == [768, 768]
    assert shapes[f"{layer}.attention.self.query.lora_A.default.weight"] == [8, 768]
    assert shapes[f"{layer}.output.dense.lora_A.default.weight"] == [8, 3072]


@pytest.mark.parametrize(
    ("kind", "config", "targets"),
    [
        ("LlamaForCausalLM", transformers.LlamaConfig(num_hidden_layers=1), {"q_proj", "v_proj"}),
        ("GPT2LMHeadModel", transformers.GPT2Config(n_layer=1), {"c_attn"}),
        ("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(num_hidden_layers=1), {"query_key_value"}),
        ("BloomForCausalLM", transformers.BloomConfig(n_layer=1), {"query_key_value"}),
        ("FalconForCausalLM", transformers.FalconConfig(num_hidden_layers=1), {"query_key_value"}),
        ("OPTForCausalLM", transformers.OPTConfig(num_hidden_layers=1), {"q_proj", "v_proj"}),
        ("Phi3ForCausalLM", transformers.Phi3Config(num_hidden_layers=1, pad_token_id=0), {"qkv_proj"}),
        ("BertModel", transformers.BertConfig(num_hidden_layers=1), {"query", "value"}),
        ("RobertaModel", transformers.RobertaConfig(num_hidden_layers=1), {"query", "value"}),
        ("DistilBertModel", transformers.DistilBertConfig(n_layers=1), None),
        ("DebertaV2Model", transformers.DebertaV2Config(num_hidden_layers=1), {"query_proj", "value_proj"}),
        ("BartModel", transformers.BartConfig(encoder_layers=1, decoder_layers=1), {"q_proj", "v_proj"}),
        ("WhisperModel", transformers.WhisperConfig(encoder_layers=1, decoder_layers=1), {"q_proj", "v_proj"}),
        ("MixtralForCausalLM", transformers.MixtralConfig(num_hidden_layers=1), {"q_proj", "v_proj"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_default_targets_are_found_from_structure(kind, config, targets):
    model = get_peft_model(on_meta(kind, config), LoraConfig())
    found = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_A" in n}
    if targets is None:  # renamed between releases of transformers
        assert len(found) == 2
    else:
        assert found == targets


def test_importing_is_light():
    code = (
        "import torch, sys; before = set(sys.modules);"
        "from deltatune import LoraConfig, get_peft_model;"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=['0']));"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "heavy = {'transformers', 'peft', 'accelerate', 'datasets', 'pydantic', 'huggingface_hub', 'numpy', 'triton'};"
        "print(sorted(new & heavy), 'torch._dynamo' in set(sys.modules) - before);"
        "print(sorted(m for m in sys.modules if m.startswith('deltatune.methods.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, methods = done.stdout.strip().splitlines()
    assert heavy == "[] False"
    needed = ("lora", "lora_bias", "trainable_tokens")
    assert methods == str([f"deltatune.methods.{name}" for name in needed])  # one method does not import the others
