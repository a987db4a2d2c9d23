"""LoRA's files, with every option that changes what they hold, move between Hugging Face peft and us."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatune import LoraConfig, PeftModel, get_peft_model
from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways, run, same_files
from tiny import bert, gpt2, llama, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # peft takes a bias on B for a shard, and says that it writes the embeddings too
    pytest.mark.filterwarnings("ignore:.*have invalid shape.*"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias.*"),
]
QV = ["q_proj", "v_proj"]
CASES = {
    "default": {"target_modules": QV},
    "absent": {},
    "regex": {"target_modules": r".*layers\.0.*\.(q|k|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": QV, "r": 4, "lora_alpha": 12, "use_rslora": True},
    "dropout": {"target_modules": QV, "lora_dropout": 0.3},
    "bias": {"target_modules": QV, "lora_bias": True, "lora_alpha": 32},
    "patterns": {
        "target_modules": "all-linear",
        "r": 3,
        "rank_pattern": {"k_proj": 5, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"k_proj": 20, "^model.layers.0.self_attn.q_proj": 1},
    },
    "rslora-patterns": {
        "target_modules": QV, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3},
    },
    "layers": {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "saved": {"target_modules": QV, "modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "gaussian": {"target_modules": QV, "init_lora_weights": "gaussian"},
    "random": {"target_modules": QV, "init_lora_weights": False},
    "no-task": {"target_modules": QV, "task_type": None},
    "regex-embedding": {"target_modules": r".*(embed_tokens|k_proj)"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    both_ways(llama, "Lora", tmp_path, **{"task_type": "CAUSAL_LM", **CASES[case]})


def test_many_layers_are_named_shortly(tmp_path):
    both_ways(
        lambda: llama(num_hidden_layers=3), "Lora", tmp_path, task_type="CAUSAL_LM", target_modules="all-linear", r=2
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_biases(bias, lora_bias, tmp_path):
    fields = {"target_modules": ["query", "value"], "bias": bias, "lora_bias": lora_bias}
    both_ways(bert, "Lora", tmp_path, **fields)


def biased_llama():
    return llama(attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_llama(bias, tmp_path):
    both_ways(biased_llama, "Lora", tmp_path, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], bias=bias)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["pooler"]}], ids=str)
def test_bert_classifier(fields, tmp_path):
    both_ways(bert, "Lora", tmp_path, task_type="SEQ_CLS", target_modules=["query", "dense"], **fields)


def test_a_trained_head_wins_over_the_original_that_peft_writes_too(tmp_path):
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query"], "bias": "all"}
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(**fields)).eval()
    shake(theirs, scale=0.5)
    theirs.save_pretrained(tmp_path / "peft")
    names = [k for k in load_file(tmp_path / "peft/adapter_model.safetensors") if "classifier" in k]
    assert any("original_module" in k for k in names)
    assert any("modules_to_save" in k for k in names)
    ours = PeftModel.from_pretrained(bert(), tmp_path / "peft")
    assert torch.allclose(run(ours), run(theirs), atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    assert not any("original" in k for k in load_file(tmp_path / "ours/adapter_model.safetensors"))
    back = peft.PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    assert torch.allclose(run(back), run(theirs), atol=1e-5)


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=40)
    return DistilBertForSequenceClassification(config).eval()


def test_every_fresh_layer_of_a_head_is_saved(tmp_path):
    """DistilBERT's head has two layers, of which one is called pre_classifier."""
    both_ways(distilbert, "Lora", tmp_path, task_type="SEQ_CLS", target_modules=["q_lin"])
    assert "base_model.model.pre_classifier.weight" in load_file(tmp_path / "ours/adapter_model.safetensors")


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "wte"]], ids=str)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_gpt2(targets, bias, tmp_path):
    both_ways(gpt2, "Lora", tmp_path, task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=True, bias=bias)


@pytest.mark.parametrize("layer", ["embed", "seq", "image", "point", "cube", "head"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_layers(layer, options, tmp_path):
    both_ways(conv_net, "Lora", tmp_path, tokens(), r=3, target_modules=[layer], **options)


@pytest.mark.parametrize("layer", ["seq", "image", "point", "cube", "head"])
def test_layers_with_a_bias_on_b(layer, tmp_path):
    both_ways(conv_net, "Lora", tmp_path, tokens(), r=3, target_modules=[layer], lora_bias=True)


class Attention(nn.Module):
    """Token embeddings, torch's own attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "modules_to_save": ["head"]}], ids=str)
def test_multihead_attention(options, tmp_path):
    """The files are the same, but peft 0.21 adds the change of out_proj twice, in training too; we add it once."""
    fields = {"r": 3, "target_modules": ["attention"], **options}
    theirs = peft.get_peft_model(attention(), peft.LoraConfig(**fields)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "peft")
    ours = PeftModel.from_pretrained(attention(), tmp_path / "peft")
    ours.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "peft")
    wanted = run(theirs, tokens())
    assert not torch.allclose(run(ours, tokens()), wanted, atol=1e-3)
    with torch.no_grad():
        ours.get_parameter("base_model.model.attention.out_proj.lora_B.default.weight").mul_(2)
    assert torch.allclose(run(ours, tokens()), wanted, atol=1e-5)


def test_peft_reads_a_trained_embedding_with_its_tied_head(tmp_path):
    config = LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    shake(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(tmp_path))
    x = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(input_ids=x).logits, model.eval()(input_ids=x).logits, atol=1e-5)
