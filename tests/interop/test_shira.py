"""SHiRA's files move between Hugging Face peft and us: each side keeps the other's positions."""

from __future__ import annotations

import pytest

from interop.roundtrip import both_ways
from tiny import bert, llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
CASES = {
    "default": {"r": 2},
    "seed": {"r": 3, "random_seed": 7, "target_modules": ["o_proj", "down_proj"]},
    "random values": {"r": 2, "init_weights": False, "target_modules": ["q_proj"]},
    "saved": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    fields = {"target_modules": ["q_proj", "v_proj"], **CASES[case]}
    both_ways(llama, "Shira", tmp_path, task_type="CAUSAL_LM", **fields)


def test_a_head_beside_it(tmp_path):
    both_ways(bert, "Shira", tmp_path, task_type="SEQ_CLS", r=2, target_modules=["query", "output.dense"])
