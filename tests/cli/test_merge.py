"""`deltatune merge`: what the verb adds to `train.merging`, which has its own tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def test_a_merged_run_answers_as_the_run_does(cli, world: Path, tmp_path: Path) -> None:
    done = cli("merge", world / "run", tmp_path / "merged", "--json", "--prompt", "see you", "--prompt", "home")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["output"] == str(tmp_path / "merged")
    assert told["difference"]["prompts"] == 2
    assert told["difference"]["max"] < 1e-4 < told["difference"]["adapter_effect"]
    ask = ["Message: see you\nLabel:", "--style", "raw", "--json", "-n", 8]
    live = json.loads(cli("generate", world / "run", *ask).out)
    merged = json.loads(cli("generate", tmp_path / "merged", *ask).out)
    assert merged == live


def test_the_table(cli, world: Path, tmp_path: Path) -> None:
    done = cli("merge", world / "run", tmp_path / "merged", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    for words in ("bfloat16", "largest logit difference", "same next token", f"written to {tmp_path / 'merged'}"):
        assert words in done.out
    quiet = cli("merge", world / "run", tmp_path / "quiet", "--no-verify")
    assert "difference" not in quiet.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "run"], "overlap; choose another output directory"),
        (["base", "out"], "is no adapter, so there is nothing to merge"),
        (["run", "out", "--no-verify", "--prompt", "x"], "--no-verify leaves out"),
        (["run", "out", "--prompt", ""], "a prompt to compare on is empty"),
        (["run", "out", "--stream", "--prompt", "x"], "--prompt is for a merge in memory"),
        (["run", "out", "--stream", "--max-shard-size", "1MB"], "--max-shard-size is for a merge in memory"),
    ],
)
def test_wrong_use_is_one_sentence(
    cli, world: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(world)
    done = cli("merge", *arguments)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert not (world / "out").exists()
