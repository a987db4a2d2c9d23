"""L9: two gloo ranks under FSDP2 give what one process gives, for every method that adapts a linear layer, and for
those in the blocks of a transformer."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_worker import IN_BLOCKS
from laws import KINDS, METHOD_NAMES, refusal
from ranks import run_ranks

LINEAR = next(k for k in KINDS if k.name == "linear")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(parallel, tmp_path):
    methods = [*IN_BLOCKS, *(m for m in METHOD_NAMES if refusal(m, LINEAR) is None)]
    printed = run_ranks(Path(__file__).with_name("distributed_worker.py"), parallel, str(tmp_path), *methods)
    assert printed.count("equal") == len(methods)
