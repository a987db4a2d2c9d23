"""The command as tests run it, and a small world on disk for it to work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from small_runs import write_adapter, write_base, write_run


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """`cli("eval", path, …)`: the whole command, in this process, on a terminal of 200 columns."""
    from deltatune.cli.app import run

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: Any) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run([str(a) for a in arguments])
        text = capsys.readouterr()
        code = stop.value.code
        return Done(code if isinstance(code, int) else int(code is not None), text.out, text.err)

    return call


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter` (for base) and `run` (adapter, recipe, data). Not to be written to."""
    root = tmp_path_factory.mktemp("world")
    base = write_base(root / "base")
    write_adapter(root / "adapter", base)
    write_run(root / "run", base, max_length=200)
    return root
