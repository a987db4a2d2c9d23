"""QLoRA beside peft and transformers: adapters move, merged models load without deltatune."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltatune import LoraConfig, PeftModel, get_peft_model, quantize_model
from deltatune.stores import quantised
from deltatune.train.merging import write_model
from tiny import ids, llama, shake

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}


@pytest.fixture
def base(tmp_path):
    llama(**SIZES).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def four_bits(folder, kind: str = "nf4"):
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, dtype=torch.float32)
    return model.train()  # in inference bitsandbytes multiplies in bfloat16 on some processors


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_adapters_move_both_ways(base, tmp_path, kind):
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(four_bits(base, kind), peft.LoraConfig(**options))
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(four_bits(base, kind), tmp_path / "theirs").train()
    wanted = theirs(input_ids=ids()).logits
    assert torch.allclose(ours(input_ids=ids()).logits, wanted, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(four_bits(base, kind), tmp_path / "ours").train()
    assert torch.allclose(back(input_ids=ids()).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("into", ["dense", "same"])
@pytest.mark.parametrize("native", [False, True])
def test_merged_models_load_in_transformers(base, tmp_path, into, native):
    if native:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
        quantize_model(model)
    else:
        model = four_bits(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    shake(adapted, 0.05)
    merged = adapted.merge_and_unload(into=into)
    wanted = merged(input_ids=ids()).logits
    write_model(merged, tmp_path / "merged", "5GB")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).train()
    layer = alone.model.layers[0].self_attn.q_proj
    assert (quantised(layer) is not None) == (into == "same")
    assert type(layer).__module__.startswith("torch" if into == "dense" else "bitsandbytes")
    assert torch.allclose(alone(input_ids=ids()).logits, wanted, atol=1e-4)
