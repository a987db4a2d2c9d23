"""LoHa's files move between Hugging Face peft and us."""

from __future__ import annotations

import pytest

from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways
from tiny import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CASES = {
    "default": {},
    "low-rank": {"r": 2, "alpha": 3},
    "patterns": {
        "r": 3,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 5},
        "alpha_pattern": {"v_proj": 1},
        "modules_to_save": ["lm_head"],
    },
    "layers": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["0.self_attn.v_proj"]},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    both_ways(
        llama,
        "LoHa",
        tmp_path,
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], **CASES[case]},
    )


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("layer", ["seq", "image", "point", "grouped", "head"])
def test_layers(layer, effective, tmp_path):
    both_ways(
        conv_net, "LoHa", tmp_path, tokens(), r=3, alpha=4, target_modules=[layer], use_effective_conv2d=effective
    )
