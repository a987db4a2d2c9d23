"""Processes that each see a part of the data prepare what one process prepares from all of it."""

from __future__ import annotations

from pathlib import Path

from ranks import run_ranks


def test_two_processes_equal_one():
    assert run_ranks(Path(__file__).with_name("prepare_worker.py")).count("equal") == 5
