"""The directory of one run: whose it is, whether it may be written, continued or started again.

`run.json` is written before the first step and says which recipe the directory belongs to; `results.json` is
written last and says that the run is finished. Between the two, the checkpoints tell how far it came.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltatune.errors import ConfigError
from deltatune.train.files import remove_staging, write_json, write_text
from deltatune.train.recipe import Recipe, RecipeError, build_recipe
from deltatune.version import __version__

RUN, RESULTS, BEFORE, LOCK = "run.json", "results.json", "before.json", ".lock"
STATES = (RUN, RESULTS, BEFORE)

#: Parts of a recipe that may change between a run and its continuation: they alter what is shown, kept or how
#: long it goes on, not what the finished steps did.
_FREE = {
    "name",
    "description",
    "output_dir",
    "eval",
    "report",
    "train.epochs",
    "train.max_steps",
    "train.logging",
    "train.logging_steps",
    "train.eval_strategy",
    "train.eval_steps",
    "train.save_strategy",
    "train.save_steps",
    "train.save_total_limit",
    "train.load_best",
    "train.metric_for_best",
    "train.greater_is_better",
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.num_workers",
}


class RunDirError(ConfigError):
    """The output directory cannot be used for this run."""


Action = Literal["start", "resume", "finished"]


@dataclass(frozen=True)
class Decision:
    """What to do in a run directory; `checkpoint` is where to go on from."""

    action: Action
    checkpoint: Path | None = None
    note: str = ""


def decide(recipe: Recipe, *, resume: bool | None = None, overwrite: bool = False) -> Decision:
    """Look at the output directory and say what may be done there. Nothing is changed.

    Args:
        resume: True insists on continuing, False on starting; None continues a run of the same recipe.
        overwrite: start again in place of whatever run is there.

    Raises:
        RunDirError: the directory holds another run or other files, or there is nothing to resume.
    """
    from deltatune.train.trainer import list_checkpoints

    directory = recipe.run_dir
    if resume and overwrite:
        raise RunDirError("--resume and --overwrite contradict each other: continue the run, or start again")
    if directory.exists() and not directory.is_dir():
        raise RunDirError(f"{directory} is a file; name a directory with --output-dir")
    contents = [path for path in directory.iterdir() if path.name != LOCK] if directory.is_dir() else []
    if not contents:
        if resume:
            raise RunDirError(f"there is no run to resume in {directory}; leave out --resume to start one")
        return Decision("start")
    earlier = _read(directory / RUN)
    if earlier is None:
        raise RunDirError(
            f"{directory} holds files that are no deltatune run (such as {sorted(contents)[0].name}); "
            "choose another --output-dir"
        )
    if overwrite:
        return Decision("start", note=f"Starting again in {directory}.")
    changed = _differences(earlier["recipe"], recipe.model_dump(mode="json"))
    if changed and not resume and not _has_trained(directory):
        return Decision("start", note=f"Starting again in {directory}, where an earlier run broke off before it began.")
    if changed and not (resume and all(map(_is_free, changed))):
        raise RunDirError(_other_run(directory, changed))
    finished = (directory / RESULTS).is_file()
    if finished and not changed and resume is not False:
        return Decision("finished")
    if resume is False:
        raise RunDirError(f"{directory} already holds this run; --resume continues it, --overwrite starts it again")
    return _continue(directory, list_checkpoints(directory), finished)


def recorded_template(directory: Path) -> str | None:
    """How the prompts of the run in `directory` were put, if it has recorded that."""
    template = (_read(directory / RUN) or {}).get("template")
    return template if isinstance(template, str) else None


def _has_trained(directory: Path) -> bool:
    """Whether a run left anything that took time: a logged step, a checkpoint, an adapter."""
    from deltatune.train.trainer import list_checkpoints

    made = (RESULTS, "metrics.jsonl", "adapter_model.safetensors")
    return bool(list_checkpoints(directory)) or any((directory / name).exists() for name in made)


def _continue(directory: Path, checkpoints: list[Path], finished: bool) -> Decision:
    """The same run lies here, broken off or to be carried further."""
    if checkpoints:
        last = checkpoints[-1]
        return Decision("resume", last, f"Continuing the run in {directory} from {last.name}.")
    if finished:
        raise RunDirError(f"{directory} keeps no checkpoint to continue from; --overwrite starts it again")
    return Decision("start", note=f"The run in {directory} broke off before its first checkpoint.")


def _other_run(directory: Path, changed: list[str]) -> str:
    keys = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    if all(map(_is_free, changed)):
        fix = "--resume continues it with the new values, --overwrite starts again"
    else:
        fix = "choose another --output-dir, or start again in its place with --overwrite"
    return f"{directory} holds another run (its recipe differs in {keys}); {fix}"


def begin(recipe: Recipe, decision: Decision, template: str | None = None) -> Path:
    """Make the directory ready and record whose it is. Returns the directory.

    Args:
        template: how prompts are put, for those who ask the model later; a recipe may leave it to the columns.
    """
    directory = recipe.run_dir
    directory.mkdir(parents=True, exist_ok=True)
    remove_staging(directory)
    if decision.action == "start":
        _clear(directory)
    earlier = _read(directory / RUN) or {}
    (directory / RESULTS).unlink(missing_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    write_json(
        directory / RUN,
        {
            "deltatune": __version__,
            "started": earlier.get("started", now),
            "continued": now if earlier else None,
            "recipe": recipe.model_dump(mode="json"),
            "template": template,
        },
    )
    write_text(directory / "recipe.yaml", recipe.to_yaml())
    return directory


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the system frees it when the process dies, however it dies.

    Raises:
        RunDirError: another process is training there.
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunDirError(f"another process is training in {directory}; choose another --output-dir") from None
    try:
        yield
    finally:
        lock.release()


def _clear(directory: Path) -> None:
    """Remove what an earlier run wrote; files of anyone else stay."""
    from deltatune.train.trainer import list_checkpoints

    for checkpoint in list_checkpoints(directory):
        shutil.rmtree(checkpoint)
    shutil.rmtree(directory / "tensorboard", ignore_errors=True)
    written = ("adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", "loss.png", "ranks.png")
    for name in (*STATES, *written, "metrics.jsonl", "metrics.csv", "samples.jsonl"):
        (directory / name).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) and "recipe" in content else None


def _flat(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys whose values differ, those that change what the finished steps did first."""
    with contextlib.suppress(RecipeError):
        # A later release has keys that the earlier recipe lacks: their defaults are what it meant.
        earlier = build_recipe(earlier, RUN).model_dump(mode="json")
    before, after = dict(_flat(earlier)), dict(_flat(now))
    cosmetic = {"name", "description", "output_dir"}
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key) and key not in cosmetic]
    return sorted(keys, key=_is_free)


def _is_free(key: str) -> bool:
    return key in _FREE or key.split(".")[0] in _FREE
