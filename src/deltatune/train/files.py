"""Run files and directories, written so that a crash, a kill or a full disk leaves the old ones whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltatune.core.files import write_atomically

STAGING = ".partial"


@contextlib.contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A directory to write into that takes the name `final` only once all is on disk.

    An exception removes it and leaves whatever `final` held before. The staging name is hidden, so nothing
    that looks for checkpoints sees a half-written one.
    """
    staging = final.parent / f".{final.name}{STAGING}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def remove_staging(directory: Path) -> None:
    """Remove what a killed process left half-written in `directory`."""
    for path in [*directory.glob(f".*{STAGING}"), *directory.glob(".*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    write_atomically(path, lambda staging: staging.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _sync(path: Path) -> None:
    """Force a file's bytes to the disk: a rename must not outlive the data it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
