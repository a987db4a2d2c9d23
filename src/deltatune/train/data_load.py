"""From the data part of a recipe to examples: where they are, which are held out, how many are used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltatune.errors import hint
from deltatune.train.data_read import (
    PLAIN,
    READERS,
    canonical_split,
    directory_splits,
    hub_table,
    read_file,
    read_files,
)
from deltatune.train.data_rows import Layout, understand
from deltatune.train.data_spec import DataError, DataSpec, Example, Examples, Table
from deltatune.train.datasets_builtin import BUILTIN, builtin_dataset
from deltatune.train.fetch import FetchError, ask_hub, hub_problem

AUTOMATIC_SHARE, AUTOMATIC_MOST = 0.1, 200  # held out when nothing is said and there is no held-out set
FEWEST = 20  # below this many examples, nothing is held out unasked


@dataclass(frozen=True)
class Source:
    """A named place with one or more splits, each read when asked for."""

    name: str
    splits: dict[str, Callable[[], Table]]
    single: bool = False  # a file: its one split has no name of its own

    def table(self, split: str) -> Table:
        if split in self.splits:
            return self.splits[split]()
        same = [name for name in self.splits if canonical_split(name) == canonical_split(split) is not None]
        if len(same) == 1:
            return self.splits[same[0]]()
        what = "is one file and has no splits" if self.single else f"has the splits {', '.join(self.splits)}"
        raise DataError(f"no split {split!r}: {self.name} {what}{hint(split, self.splits)}")

    def first(self, *wanted: str) -> str | None:
        """The first split that means one of `wanted`."""
        return next((s for w in wanted for s in self.splits if canonical_split(s) == w), None)


def load_examples(spec: DataSpec) -> Examples:
    """Read, understand, hold out and limit the examples that a recipe asks for.

    Raises:
        DataError: anything that keeps the data from being used, with the file and row where there is one.
    """
    source = find_source(spec.path, spec.subset)
    split = spec.split or source.first("train") or _only(source)
    train = source.table(split)
    held_out = _held_out_table(spec, source, split)
    layout = understand(train, held_out, spec)
    training = _convert(layout, train)
    rng = random.Random(spec.seed)
    if spec.shuffle:
        rng.shuffle(training)
    if held_out is not None:
        evaluation = _convert(layout, held_out)
        if spec.shuffle and spec.eval_limit is not None:
            rng.shuffle(evaluation)
        note = f"held out: {held_out.name}"
    else:
        training, evaluation, note = _hold_out(training, spec, rng)
    training, evaluation = training[: spec.limit], evaluation[: spec.eval_limit]
    both = sum(key in {_key(e) for e in training} for key in map(_key, evaluation)) if held_out else 0
    describe = (
        f"{len(training)} training and {len(evaluation)} held-out examples from {train.name} ({note}): "
        f"{layout.describe}" + (f"; {both} held-out examples are also in the training set" if both else "")
    )
    return Examples(
        training,
        evaluation,
        layout.format,
        describe,
        layout.labels,
        train.licence,
        train.citation,
        train.name,
        layout.template,
    )


def find_source(path: str | list[str], subset: str | None = None) -> Source:
    """The place a path means: files, a directory, a built-in data set, or a data set on the hub.

    Raises:
        DataError: it is none of them.
    """
    if isinstance(path, list):
        files = [Path(p).expanduser() for p in path]
        return Source(", ".join(path), {"train": lambda: read_files(files)}, single=True)
    place = Path(path).expanduser()
    if subset is not None and (place.exists() or path in BUILTIN):
        raise DataError(f"subset is for data sets on the hub, but {path} is not one")
    if place.is_dir():
        return _directory(place)
    if place.is_file() or place.suffix.lower() in READERS or path.startswith((".", "/", "~")):
        return Source(str(place), {"train": lambda: read_file(place)}, single=True)
    if path in BUILTIN:
        return _builtin(path)
    return _hub(path, subset)


def _directory(folder: Path) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        import datasets

        saved = datasets.load_from_disk(str(folder))
        parts = saved if isinstance(saved, dict) else {"train": saved}
        return _of_hub_parts(parts, folder.name)

    def reader(files: list[Path]) -> Callable[[], Table]:
        return lambda: _renamed(read_files(files), folder.name)

    return Source(str(folder), {name: reader(files) for name, files in directory_splits(folder).items()})


def _builtin(name: str) -> Source:
    def part(split: str) -> Table:
        data = builtin_dataset(name)
        rows = data.train if split == "train" else data.test
        places = [f"{name}/{split}:{i + 1}" for i in range(len(rows))]
        return Table(rows, places, name, {}, data.licence, data.citation, data.template)

    return Source(name, {"train": lambda: part("train"), "test": lambda: part("test")})


def _hub(name: str, subset: str | None) -> Source:
    import datasets

    try:
        try:
            ask_hub(lambda api: api.dataset_info(name))  # the library itself tries for half a minute
        except FetchError:
            if not (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()).is_dir():
                raise
        parts = datasets.load_dataset(name, subset)
    except Exception as error:  # the library raises a dozen kinds, from its own to httpx's and fsspec's
        here = [p.name for p in Path().iterdir() if p.is_dir() or p.suffix in READERS.keys() - PLAIN]
        reason = str(error) if isinstance(error, FetchError) else hub_problem(error)
        raise DataError(
            f"data {name!r} is no file or directory here, no built-in data set ({', '.join(BUILTIN)}), and the hub "
            f"could not give it: {reason}{hint(name, [*BUILTIN, *here])}"
        ) from error
    return _of_hub_parts(parts, name)


def _of_hub_parts(parts: dict[str, object], name: str) -> Source:
    def reader(part: object) -> Callable[[], Table]:
        return lambda: hub_table(part, name)

    return Source(name, {split: reader(part) for split, part in parts.items()})


def _renamed(table: Table, name: str) -> Table:
    table.name = name
    return table


def _only(source: Source) -> str:
    if len(source.splits) == 1:
        return next(iter(source.splits))
    raise DataError(f"{source.name} has no training split; choose one with split: {', '.join(source.splits)}")


def _held_out_table(spec: DataSpec, source: Source, used: str) -> Table | None:
    """The held-out set that the recipe names or that the source brings along."""
    if spec.eval_path is not None:
        place = find_source(spec.eval_path)
        return place.table(spec.eval_split or place.first("validation", "test", "train") or _only(place))
    if spec.eval_split is not None:
        return _renamed(source.table(spec.eval_split), f"split {spec.eval_split}")
    if spec.eval_fraction is not None:
        return None
    found = source.first("validation", "test")
    return None if found is None or found == used else _renamed(source.table(found), f"split {found}")


def _convert(layout: Layout, table: Table) -> list[Example]:
    return [layout.convert(row, place) for row, place in zip(table.rows, table.sources, strict=True)]


def _key(example: Example) -> str:
    """What makes two examples the same question."""
    return example.prompt or example.text or json.dumps(example.messages, sort_keys=True)


def _hold_out(examples: list[Example], spec: DataSpec, rng: random.Random) -> tuple[list[Example], list[Example], str]:
    """Part off a share of the examples; the same question never lands on both sides."""
    if spec.eval_fraction == 0.0:
        return examples, [], "nothing held out"
    if spec.eval_fraction is None and len(examples) < FEWEST:
        return examples, [], f"nothing held out of fewer than {FEWEST}; name a held-out set with eval_path"
    if spec.eval_fraction is None:
        wanted = min(round(AUTOMATIC_SHARE * len(examples)), AUTOMATIC_MOST)
    else:
        wanted = max(1, round(spec.eval_fraction * len(examples)))
    keys = list(dict.fromkeys(map(_key, examples)))
    rng.shuffle(keys)
    sizes = dict.fromkeys(keys, 0)
    for example in examples:
        sizes[_key(example)] += 1
    chosen: set[str] = set()
    taken = 0
    for key in keys[:-1]:  # one question at least stays for training
        if taken >= wanted:
            break
        chosen.add(key)
        taken += sizes[key]
    if not chosen:
        raise DataError("all examples ask the same thing, so none can be held out; set eval_fraction: 0")
    train = [e for e in examples if _key(e) not in chosen]
    return train, [e for e in examples if _key(e) in chosen], f"{taken} held out by chance, seed {spec.seed}"
