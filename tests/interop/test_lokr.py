"""LoKr's files move between Hugging Face peft and us."""

from __future__ import annotations

import peft
import pytest
from torch import nn

from deltatune import LoKrConfig, get_peft_model
from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways
from tiny import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CASES = {
    "default": {},
    "low-rank": {"r": 2, "alpha": 3},
    "both": {"r": 1, "decompose_both": True},
    "factor": {"r": 3, "decompose_factor": 2},
    "patterns": {"r": 3, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 1}, "modules_to_save": ["lm_head"]},
    "lycoris": {"init_weights": "lycoris", "r": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    both_ways(
        llama,
        "LoKr",
        tmp_path,
        **{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], **CASES[case]},
    )


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("layer", ["seq", "image", "point", "grouped", "head"])
def test_layers(layer, r, effective, tmp_path):
    if effective and (layer, r) == ("seq", 1):
        pytest.skip("peft 0.21 fails on LoKr's Tucker form of a 1-d convolution")
    both_ways(
        conv_net, "LoKr", tmp_path, tokens(), r=r, alpha=4, target_modules=[layer], use_effective_conv2d=effective
    )


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 5, 8, 100])
def test_shapes_agree(factor):
    """Which divisors, and whether a factor is decomposed, is peft's choice at every size."""
    for rows, columns in [(2, 7), (12, 36), (48, 100), (64, 17), (30, 128)]:
        for r in (1, 2, 4, 6, 16):
            fields = {"r": r, "decompose_factor": factor, "decompose_both": True, "target_modules": ["0"]}
            shapes = []
            for get, config in ((peft.get_peft_model, peft.LoKrConfig), (get_peft_model, LoKrConfig)):
                model = get(nn.Sequential(nn.Linear(columns, rows)), config(**fields))
                shapes.append({n: p.shape for n, p in model.named_parameters() if p.requires_grad})
            assert shapes[0] == shapes[1]
