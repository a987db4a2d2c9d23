"""Adapters in special places cross to and from peft: trained tokens (tied or not) and fused experts."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import deltatune
from tiny import ids, llama, shake

pytestmark = pytest.mark.filterwarnings("ignore")


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


CASES = {
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [9, 5]}),
    "tied tokens": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [9, 5]},
    ),
    "experts": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 3},
    ),
    "one expert weight": (mixtral, {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case, tmp_path):
    make, options = CASES[case]
    x = ids()
    x[0, :2] = torch.tensor([5, 9])
    logits = []
    for writer, reader, folder in ((peft, deltatune, "theirs"), (deltatune, peft, "ours")):
        written = writer.get_peft_model(make(), writer.LoraConfig(task_type="CAUSAL_LM", **options))
        shake(written)
        written.eval()
        written.save_pretrained(tmp_path / folder)
        read = reader.PeftModel.from_pretrained(make(), tmp_path / folder).eval()
        logits.append((written(x).logits, read(x).logits))
    for wrote, reads in logits:
        assert torch.allclose(wrote, reads, atol=1e-5)
    keys = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("theirs", "ours")]
    assert keys[0] == keys[1]
