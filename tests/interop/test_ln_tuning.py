"""LN tuning's files move between Hugging Face peft and us."""

from __future__ import annotations

import peft
import pytest
import torch

from deltatune import LNTuningConfig, get_peft_model
from interop.roundtrip import both_ways, run
from tiny import bert, gpt2, llama, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
CASES = {
    "rms": (llama, {"task_type": "CAUSAL_LM", "target_modules": ["input_layernorm", "norm"]}),
    "one layer": (llama, {"task_type": "CAUSAL_LM", "target_modules": ["layers.1.input_layernorm"]}),
    "rule": (llama, {"task_type": "CAUSAL_LM", "target_modules": r".*_layernorm"}),
    "saved": (llama, {"task_type": "CAUSAL_LM", "target_modules": ["norm"], "modules_to_save": ["lm_head"]}),
    "bias": (gpt2, {"task_type": "CAUSAL_LM", "target_modules": ["ln_1", "ln_f"]}),
    "head": (bert, {"task_type": "SEQ_CLS", "target_modules": ["LayerNorm"]}),
    "excluded": (bert, {"target_modules": ["LayerNorm"], "exclude_modules": ["embeddings.LayerNorm"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_files(case, tmp_path):
    make, fields = CASES[case]
    both_ways(make, "LNTuning", tmp_path, **fields)


def test_llamas_default_is_pefts():
    ours = get_peft_model(llama(), LNTuningConfig(task_type="CAUSAL_LM"))
    theirs = peft.get_peft_model(llama(), peft.LNTuningConfig(task_type="CAUSAL_LM"))
    names = [{n for n, _ in model.named_parameters() if "ln_tuning" in n} for model in (ours, theirs)]
    assert names[0] == names[1]
    assert len(names[0]) == 5


@pytest.mark.parametrize("make", [gpt2, bert])
def test_what_the_structure_gave_is_named_in_the_file(make, tmp_path):
    ours = get_peft_model(make(), LNTuningConfig())  # peft knows no default for these
    shake(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.allclose(run(theirs), run(ours), atol=1e-5)
