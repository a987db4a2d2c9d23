"""Files and directories as rows, and one clear sentence for each that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltatune.train.data import DataError, DataSpec, load_examples
from deltatune.train.data_read import canonical_split, read_file

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]


def write(path: Path, rows: list[dict] | str) -> Path:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pairs(path: Path, **options) -> list[tuple[str | None, str | None]]:
    examples = load_examples(DataSpec(path=str(path), eval_fraction=0, shuffle=False, **options))
    return [(e.prompt, e.completion) for e in examples.train]


EXPECTED = [(row["prompt"], row["completion"]) for row in ROWS]


def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path) -> None:
    import csv

    import pyarrow
    from pyarrow import parquet

    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "c.json", json.dumps({"version": 1, "data": ROWS}))
    write(tmp_path / "d.json", "".join(json.dumps(row) + "\n" for row in ROWS))
    for name, delimiter in (("e.csv", ","), ("f.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "g.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert pairs(file) == EXPECTED, file.name


def test_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\n\n" + json.dumps(ROWS[1]).encode())
    assert pairs(path) == EXPECTED[:2]


def test_line_separators_inside_strings_are_not_line_ends(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\x85c", "completion": "d"}
    path = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert pairs(path) == [("a\u2028b\x85c", "d")]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.jsonl", ROWS[2:4])
    spec = DataSpec(path=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], eval_fraction=0, shuffle=False)
    assert [e.prompt for e in load_examples(spec).train] == [f"question {i}" for i in range(4)]


def test_text_files_are_paragraphs_or_else_lines(tmp_path: Path) -> None:
    lines = read_file(write(tmp_path / "a.txt", "one\ntwo\nthree\n"))
    assert [row["text"] for row in lines.rows] == ["one", "two", "three"]
    paragraphs = read_file(write(tmp_path / "b.txt", "\none\ntwo\n \n\nthree\n"))
    assert [row["text"] for row in paragraphs.rows] == ["one\ntwo", "three"]
    assert paragraphs.sources == [f"{tmp_path}/b.txt:2", f"{tmp_path}/b.txt:6"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("train_a", "train"),
        ("train-00000-of-00002", "train"),
        ("val", "validation"),
        ("dev", "validation"),
        ("validation_2", "validation"),
        ("test", "test"),
        ("held_out", "test"),
        ("trainer_notes", None),
        ("testimony", None),
    ],
)
def test_file_names_mean_splits(name: str, split: str | None) -> None:
    assert canonical_split(name) == split


def test_directory_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train_a.jsonl", ROWS[:10])
    write(tmp_path / "train_b.jsonl", ROWS[10:20])
    write(tmp_path / "dev.jsonl", ROWS[20:25])
    write(tmp_path / "test.jsonl", ROWS[25:])
    write(tmp_path / "README.md", "notes")
    write(tmp_path / "CHANGES.txt", "notes")
    examples = load_examples(DataSpec(path=str(tmp_path)))
    assert (len(examples.train), len(examples.eval)) == (20, 5)
    assert {e.prompt for e in examples.eval} == {f"question {i}" for i in range(20, 25)}
    assert "held out: split validation" in examples.describe
    assert len(load_examples(DataSpec(path=str(tmp_path), eval_split="test")).eval) == 5
    assert len(load_examples(DataSpec(path=str(tmp_path), split="val", eval_split="test")).train) == 5


def test_saved_hub_data_set_with_class_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    examples = load_examples(DataSpec(path=str(tmp_path / "saved"), shuffle=False))
    assert [e.completion for e in examples.train] == ["no", "yes", "yes"]
    assert examples.labels == ["no", "yes"]


def test_hub_data_set_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from deltatune.train import data_load

    asked = []

    def load(name: str, subset: str | None) -> datasets.DatasetDict:
        asked.append((name, subset))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(data_load, "ask_hub", lambda question: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = load_examples(DataSpec(path="org/name", subset="small", limit=5))
    assert asked == [("org/name", "small")]
    assert (len(examples.train), len(examples.eval)) == (5, 3)
    assert examples.train[0].source.startswith("org/name:")


# ---- what cannot be read ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl:2: not valid JSON \(Expecting value"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n["b"]\n',
            r"a\.jsonl:2: expected a JSON object with named fields, found an array",
        ),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.json", '[{"a": 1},\n{"b": }]', r"a\.json:2: not valid JSON"),
        ("a.json", '["b"]', r"a\.json:1: expected a JSON object"),
        ("a.json", '"b"', r"a\.json: expected a JSON array of objects, found a string"),
        ("a.csv", "prompt,completion\na,b\nc\n", r"a\.csv:3: this row has fewer fields than the header"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv:2: this row has more fields than the header"),
        ("a.csv", 'prompt,completion\n"a,b\n', r"a\.csv:2: not valid CSV"),
        ("a.csv", "prompt,completion\n", r"a\.csv is empty"),
        ("a.parquet", "PAR1 no", r"a\.parquet is not a whole Parquet file"),
        ("a.xlsx", "x", r"a\.xlsx: unknown kind of file '\.xlsx'; known: \.csv"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        load_examples(DataSpec(path=str(path)))
    assert "\n" not in str(error.value)


def test_wrong_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\ncaf\xe9,b\n")
    with pytest.raises(DataError, match=r"a\.csv is not UTF-8 text \(byte"):
        load_examples(DataSpec(path=str(tmp_path / "a.csv")))


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"tran\.jsonl does not exist; did you mean 'train\.jsonl'"):
        load_examples(DataSpec(path=str(tmp_path / "tran.jsonl")))


def test_unknown_name_says_all_that_was_tried() -> None:
    with pytest.raises(DataError, match=r"'sms_spm' is no file .* switched off \(HF_HUB_OFFLINE\).*'sms_spam'"):
        load_examples(DataSpec(path="sms_spm"))


def test_directories_without_data_or_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no data files"):
        load_examples(DataSpec(path=str(tmp_path)))
    write(tmp_path / "val.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match="no training split; choose one with split: test, validation"):
        load_examples(DataSpec(path=str(tmp_path)))
    with pytest.raises(DataError, match="no split 'validaton'.*did you mean 'validation'"):
        load_examples(DataSpec(path=str(tmp_path), split="validaton"))
    with pytest.raises(DataError, match=r"no split 'dev'.*is one file and has no splits"):
        load_examples(DataSpec(path=str(tmp_path / "val.jsonl"), split="dev"))
    with pytest.raises(DataError, match="subset is for data sets on the hub"):
        load_examples(DataSpec(path=str(tmp_path), subset="x"))


def test_labels_file_beside_the_data(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    write(tmp_path / "labels.json", '["ham", "spam"]')
    spec = DataSpec(path=str(tmp_path), shuffle=False)
    assert [e.completion for e in load_examples(spec).train] == ["spam", "ham"]
    write(tmp_path / "labels.json", '{"1": "SPAM", "0": "HAM"}')
    assert load_examples(spec).labels == ["HAM", "SPAM"]
    write(tmp_path / "labels.json", '["only one"]')
    with pytest.raises(DataError, match=r"train\.jsonl:1: label 1 in column 'label', but there are 1 label names"):
        load_examples(spec)
    write(tmp_path / "labels.json", '{"a": "b"}')
    with pytest.raises(DataError, match=r"labels\.json: expected a list of names"):
        load_examples(spec)
