"""Two gloo processes, DDP and FSDP2, end with the weights of one process, for every procedure."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranks import run_ranks
from schedule_runs import PROCEDURES


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_equal_one(parallel):
    printed = run_ranks(Path(__file__).with_name("schedule_worker.py"), parallel, *PROCEDURES)
    assert printed.count("equal") == len(PROCEDURES)
    assert printed.count("refused") == (2 if parallel == "ddp" else 0)
