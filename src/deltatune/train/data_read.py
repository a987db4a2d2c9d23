"""Rows from files, directories and hub data sets. What the rows mean is for `data_rows` to find out."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltatune.errors import hint
from deltatune.train.data_spec import DataError, Table

#: File names that mean a split, as the hub's data sets use them.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing", "heldout", "held_out"),
}
PLAIN = {".txt", ".md"}
LABELS_FILE = "labels.json"  # beside the data: a list of names, or an object from number to name


def canonical_split(name: str) -> str | None:
    """`val`, `val_2` or `dev-00000-of-00001` to `validation`, and so on; None for any other name."""
    word = re.split(r"[-.]|_(?=\w{1,2}$)", name.lower())[0]
    return next((split for split, names in SPLIT_NAMES.items() if word in names), None)


def read_file(path: Path) -> Table:
    """All rows of one file, by its ending.

    Raises:
        DataError: the file is missing, empty, of an unknown kind, or broken; names the line where it can.
    """
    if not path.is_file():
        near = hint(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DataError(f"data file {path} does not exist{near}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(sorted(READERS))}")
    rows: list[dict[str, Any]] = []
    sources: list[str] = []
    try:
        for place, row in reader(path):
            rows.append(row)
            sources.append(f"{path}:{place}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not rows:
        raise DataError(f"data file {path} is empty: it has no examples")
    return Table(rows, sources, name=str(path), label_names=_labels_beside(path))


def read_files(paths: list[Path]) -> Table:
    """The rows of several files in one table."""
    tables = [read_file(path) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        first.rows += table.rows
        first.sources += table.sources
    return first


def directory_splits(folder: Path) -> dict[str, list[Path]]:
    """The data files of a directory by split; a file that names no split counts as training data.

    Raises:
        DataError: there is no data file in it.
    """
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in READERS and p.name[0] != "."]
    tables = [p for p in files if p.suffix.lower() not in PLAIN and p.name != LABELS_FILE]
    # Text beside tables is a README, a licence or notes, whatever its name.
    texts = [p for p in files if p.suffix.lower() in PLAIN and p.stem.lower() not in ("readme", "license", "licence")]
    splits: dict[str, list[Path]] = {}
    for path in tables or texts:
        splits.setdefault(canonical_split(path.stem) or "train", []).append(path)
    if not splits:
        raise DataError(f"directory {folder} has no data files ({', '.join(sorted(READERS))})")
    return splits


def hub_table(dataset: Any, name: str) -> Table:
    """A `datasets.Dataset` as a table, with the names of its class labels."""
    names = {
        column: list(feature.names)
        for column, feature in dataset.features.items()
        if getattr(feature, "names", None) and hasattr(feature, "int2str")
    }
    info = dataset.info
    rows = [dict(row) for row in dataset]
    if not rows:
        raise DataError(f"data set {name} is empty: it has no examples")
    return Table(
        rows,
        [f"{name}:{i + 1}" for i in range(len(rows))],
        name=name,
        label_names=names,
        licence=info.license or None,
        citation=info.citation or None,
    )


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(line, f"{path}:{number}")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object with named fields, found {_kind(value)}")
    return value


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """A JSON array of objects, an object that holds one array, or JSON lines under the wrong name."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        place = f"{path}:{error.lineno}"
        raise DataError(f"{place}: not valid JSON ({error.msg}, column {error.colno})") from None
    rows = _array(value, path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object with named fields, found {_kind(row)}")
        yield number, row


def _array(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    lists = {key: v for key, v in value.items() if isinstance(v, list)} if isinstance(value, dict) else {}
    if len(lists) == 1 and all(isinstance(row, dict) for row in next(iter(lists.values()))):
        return next(iter(lists.values()))
    if isinstance(value, dict) and not lists:
        return [value]  # a JSONL file of one line, named .json
    raise DataError(f"{path}: expected a JSON array of objects, found {_kind(value)}")


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, restkey="", strict=True)
        try:
            for row in reader:
                # DictReader puts surplus fields under restkey and None where fields are missing.
                if "" in row or None in row.values():
                    raise DataError(
                        f"{path}:{reader.line_num}: this row has {'more' if '' in row else 'fewer'} fields than "
                        f"the header ({', '.join(reader.fieldnames or [])}); quote fields that hold the delimiter"
                    )
                yield reader.line_num, dict(row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    yield from enumerate(rows, 1)


def _read_text(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Paragraphs where blank lines part them, otherwise lines; each at the line it starts on."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    blank = [not line.strip() for line in lines]
    inside = "".join("-" if b else "x" for b in blank).strip("-")
    paragraphs = "-" in inside
    start = 0
    for i in range(len(lines)):
        if blank[i]:
            continue
        if i == 0 or blank[i - 1] or not paragraphs:
            start = i
        if not paragraphs or i + 1 == len(lines) or blank[i + 1]:
            yield start + 1, {"text": "\n".join(lines[start : i + 1]).strip()}


def _labels_beside(path: Path) -> dict[str, list[str]]:
    """Names of integer labels from `labels.json` in the same directory, for any label column."""
    file = path.parent / LABELS_FILE
    if not file.is_file() or file == path:
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from None
    if isinstance(value, dict):
        try:
            value = [value[key] for key in sorted(value, key=int)]
        except ValueError:
            raise DataError(f"{file}: expected a list of names or an object from number to name") from None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{file}: expected a list of names or an object from number to name")
    return {"*": value}


def _kind(value: Any) -> str:
    return {list: "an array", str: "a string", dict: "an object", type(None): "null"}.get(type(value), "a number")


Reader = Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]
READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
