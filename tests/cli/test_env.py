"""`deltatune env`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch


def test_facts(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").write_bytes(b"x" * 1500)
    monkeypatch.setenv("DELTATUNE_CACHE", str(tmp_path))
    facts = json.loads(cli("env", "--json").out)
    assert facts["packages"]["torch"] == version("torch")
    assert facts["cache"] == {"path": str(tmp_path), "bytes": 1500}
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["devices"][-1]["device"] == "cpu"
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["environment"]["DELTATUNE_CACHE"] == str(tmp_path)
    assert "switched off" in facts["hub"]  # the tests run with HF_HUB_OFFLINE
    table = cli("env", "--no-hub").out
    assert "1.5 kB" in table
    assert "not asked" in table


def test_a_package_that_is_missing_is_said(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltatune.cli import env

    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert json.loads(cli("env", "--no-hub", "--json").out)["packages"]["no-such-package"] is None
    assert "not installed" in cli("env", "--no-hub").out
