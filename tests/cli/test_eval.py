"""`deltatune eval`: which examples, which forms, what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from small_runs import ROWS, write_rows


def test_a_run_is_measured_on_its_own_held_out_examples(cli, world: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    done = cli("eval", world / "run", "--which", "all", "--json", "--predictions", answers, "--score-labels")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    base, adapter, merged = (found["results"][form] for form in ("base", "adapter", "merged"))
    assert base["loss"] != adapter["loss"]
    assert merged["loss"] == pytest.approx(adapter["loss"], rel=1e-4)
    assert merged["answers"] == adapter["answers"]
    for result in (base, adapter, merged):
        assert result["examples"] == len(ROWS)
        assert {"perplexity", "accuracy", "macro_f1", "exact_match", "invalid", "label_accuracy"} <= set(result)
    assert "run-rows.jsonl, 6 held-out examples: classification" in found["data"]
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [r["reference"] for r in records] == adapter["references"]
    assert [r["answers"]["base"] for r in records] == base["answers"]
    assert records[0]["source"].endswith(":1")


def test_the_table_has_a_column_for_each_form(cli, world: Path) -> None:
    done = cli("eval", world / "run", "--samples", 2)
    assert done.code == 0, done.err
    heading = next(line for line in done.out.splitlines() if "adapter" in line)
    assert heading.split() == ["base", "adapter"]
    assert "loss (nats/token)" in done.out
    assert "macro F1" in done.out
    assert done.out.count("reference") == 2


def test_other_data_is_asked_in_the_words_of_the_run(cli, world: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "mail.jsonl", [{"body": r["text"], "label": r["label"]} for r in ROWS])
    refused = cli("eval", world / "run", "--data", data)
    assert refused.code == 1
    assert "template uses {text}" in refused.err
    done = cli("eval", world / "run", "--data", data, "--set", 'template="Message: {body}\\nLabel:"', "--json")
    assert done.code == 0, done.err
    own = json.loads(cli("eval", world / "run", "--json").out)
    assert json.loads(done.out)["data"].startswith(f"{data}, 6 examples")
    assert set(own["results"]) == {"base", "adapter"}


def test_the_held_out_split_of_a_directory_is_taken(cli, world: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "test.jsonl", ROWS[:2])
    options = ["--data", tmp_path, "--set", "max_length=100", "--json"]
    held_out = json.loads(cli("eval", world / "run", *options).out)
    assert held_out["results"]["base"]["examples"] == 2
    assert "split test" in held_out["data"]
    trained = json.loads(cli("eval", world / "run", *options, "--split", "train", "--limit", 3).out)
    assert trained["results"]["base"]["examples"] == 3


def test_a_model_without_adapter_is_measured_as_it_is(cli, world: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"text": "see you at home tonight"}])
    done = cli("eval", world / "base", "--data", data, "--set", "max_length=100", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)["results"]["model"]
    assert result["loss"] > 0
    assert "answers" not in result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter"], "has no recipe.yaml that says what to measure on; name it with --data"),
        (["base", "--data", "x.jsonl", "--which", "base"], "so --which has nothing to choose from"),
        (["run", "--split", "test"], "--split chooses a part of --data"),
        (["run", "--set", "tmplate=x"], "did you mean 'data.template'"),
        (["run", "--set", "max_length=1"], "data.max_length: "),
        (["run", "--data", "missing.jsonl"], "missing.jsonl does not exist"),
        (["run", "--samples", "2", "--no-generate"], "which --no-generate leaves out"),
    ],
)
def test_wrong_use_is_one_sentence(
    cli, world: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(world)
    done = cli("eval", *arguments)
    assert done.code == 1
    assert message in done.err
    assert done.err.count("\n") <= 2  # the remark about the data may come before
    assert "Traceback" not in done.err
