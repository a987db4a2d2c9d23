"""DoRA's files move between Hugging Face peft and us, and training with dropout takes the same steps."""

from __future__ import annotations

import peft
import pytest
import torch

import deltatune
from deltatune import kernels
from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways
from tiny import bert, gpt2, ids, llama, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # peft says that it writes the embeddings too
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
]
CASES = {
    "default": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 2}},
    "saved": {"modules_to_save": ["lm_head"]},
    "random": {"init_lora_weights": False},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], **CASES[case]}
    both_ways(llama, "Lora", tmp_path, use_dora=True, **fields)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_bert(bias, tmp_path):
    both_ways(bert, "Lora", tmp_path, target_modules=["query", "dense"], bias=bias, use_dora=True)


def test_gpt2(tmp_path):
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    both_ways(gpt2, "Lora", tmp_path, use_dora=True, **fields)


@pytest.mark.parametrize("layer", ["embed", "seq", "image", "point", "cube", "head"])
def test_layers(layer, tmp_path):
    both_ways(conv_net, "Lora", tmp_path, tokens(), r=3, target_modules=[layer], use_dora=True)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_in_training(use_dora, dropout, tmp_path):
    """The same masks from the same seed: loss and every gradient agree."""
    fields = {"target_modules": ["q_proj", "down_proj"], "use_dora": use_dora, "lora_dropout": dropout}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    shake(theirs, scale=0.3)
    theirs.save_pretrained(tmp_path)
    ours = deltatune.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    grads = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(7)
        with kernels.use("plain"):  # the kernels draw masks of their own
            model(input_ids=ids(), labels=ids()).loss.backward()
        grads.append({n.replace(".base_layer", ""): p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert set(grads[0]) == set(grads[1])
    for name, wanted in grads[0].items():
        assert torch.allclose(grads[1][name], wanted, atol=1e-6, rtol=1e-4), name
