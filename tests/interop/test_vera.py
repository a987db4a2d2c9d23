"""VeRA's files, with and without the shared matrices, move between Hugging Face peft and us."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways
from tiny import bert, gpt2, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # peft advises against leaving the shared matrices out
    pytest.mark.filterwarnings("ignore:.*save_projection.*"),
    pytest.mark.filterwarnings("ignore:.*projection.*PRNG.*"),
]
CASES = {
    "default": {},
    "sizes": {"r": 5, "target_modules": ["q_proj", "up_proj", "down_proj"], "d_initial": 0.3},
    "seed": {"r": 7, "projection_prng_key": 11, "save_projection": False},
    "saved": {"r": 4, "modules_to_save": ["lm_head"], "layers_to_transform": [1]},
    "random": {"r": 4, "init_weights": False},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **CASES[case]}
    both_ways(llama, "Vera", tmp_path, **fields)
    names = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert ("base_model.vera_A" in names) == (case != "seed")


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_bert(bias, tmp_path):
    both_ways(bert, "Vera", tmp_path, r=4, target_modules=["query", "dense"], bias=bias)


def test_gpt2(tmp_path):
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    both_ways(gpt2, "Vera", tmp_path, r=4, **fields)


def test_linear_layer(tmp_path):
    both_ways(conv_net, "Vera", tmp_path, tokens(), r=3, target_modules=["head"])
