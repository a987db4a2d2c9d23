"""HiRA's files move between Hugging Face peft and us."""

from __future__ import annotations

import pytest

from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways
from tiny import gpt2, llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CASES = {
    "default": {},
    "low-rank": {"r": 2, "init_weights": "gaussian"},
    # no rank_pattern: peft 0.21 has the field and ignores it
    "head": {"r": 3, "modules_to_save": ["lm_head"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    both_ways(
        llama,
        "Hira",
        tmp_path,
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], **CASES[case]},
    )


def test_transposed(tmp_path):
    both_ways(gpt2, "Hira", tmp_path, task_type="CAUSAL_LM", target_modules=["c_attn", "wte"], fan_in_fan_out=True)


@pytest.mark.parametrize("layer", ["embed", "seq", "image", "point", "cube", "head"])
def test_layers(layer, tmp_path):
    both_ways(conv_net, "Hira", tmp_path, tokens(), r=3, target_modules=[layer])
