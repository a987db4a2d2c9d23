"""The benchmarks run, and what they count and compare is what they say."""

import json
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a benchmark as a command; returns the JSON it writes."""

    def inner(script: str, *options: str) -> dict:
        out = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [script, "--tiny", "--out", str(out), *options])
        monkeypatch.syspath_prepend(str(FOLDER))
        runpy.run_path(str(FOLDER / script), run_name="__main__")
        return json.loads(out.read_text())

    return inner


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_table_agrees_with_peft_and_counts_fewer_bytes(run):
    parts = run("run.py", "--parts", "agreement", "bytes", "--threads", "1")["parts"]
    assert max(parts["agreement"]["results"].values()) < 1e-4
    rows = parts["bytes"]["results"]
    for name in ("LoRA, dropout 0.05", "DoRA"):
        for dtype in ("float32", "bfloat16"):
            row = rows[f"MB {dtype}: {name}"]
            assert row["deltatune"][0] < 0.75 * row["peft"][0]
    frozen, no_input = (rows[f"MB float32: {n}"]["deltatune"][0] for n in ("frozen", "LoRA-FA"))
    # what LoRA-FA keeps beyond the frozen model is h alone: 16 numbers a position for 14 layers
    assert no_input - frozen == pytest.approx(2 * 16 * 16 * 14 * 4 / 1e6)
    assert rows["MB float32: LoRA"]["deltatune"] == rows["MB float32: LoRA, dropout 0.05"]["deltatune"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_gpu_script_runs_without_one(run):
    found = run("gpu.py", "--device", "cpu")
    assert found["left_out"] == []
    assert {"tiny bf16 step: DoRA", "tiny NF4 tokens/s: LoRA", "tiny bf16 decode: 16 different"} <= found[
        "results"
    ].keys()


def test_the_gpu_script_lists_what_it_leaves_out(tmp_path):
    import gpu

    run = gpu.Run(tmp_path / "out.json", minutes=1)

    def raising(error: Exception):
        def measure():
            raise error

        return measure

    run.piece("good", lambda: {"row": {"peft": [1.0]}})
    run.piece("wrong", raising(RuntimeError("a defect")))
    run.piece("large", raising(torch.OutOfMemoryError("no memory")))
    run.piece("long", raising(gpu.CutOffError()))
    run.minutes = 0
    run.piece("late", lambda: {"row": {"peft": [2.0]}})
    run.write()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["results"] == {"row": {"peft": [1.0]}}
    assert found["left_out"] == [
        "wrong (failed: RuntimeError: a defect)",
        "large (out of memory)",
        "long (cut off by the clock)",
        "late (no time)",
    ]


def test_the_gpu_script_stops_a_piece_that_runs_over(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "GRACE", 0.05)
    run = gpu.Run(tmp_path / "out.json", minutes=0)
    with pytest.raises(gpu.CutOffError), run.alarm():
        time.sleep(5)
