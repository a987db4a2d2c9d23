"""The site builds without a warning and without a network, with the pages that are made from the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from blocks import ROOT


def test_builds_strictly(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page, words in {
        "index.html": "deltatune",
        "methods/lora.html": "lora_alpha",
        "methods/inits.html": "PiSSA",
        "reference/cli.html": "--dry-run",
        "reference/recipe.html": "train.learning_rate",
        "reference/core.html": "LowRank",
        "architecture.html": "WeightRef",
        "images/quickstart.png": "",
    }.items():
        assert (tmp_path / page).is_file(), page
        assert words in (tmp_path / page).read_text(encoding="utf-8", errors="ignore"), page
    assert "fonts.googleapis.com" not in (tmp_path / "index.html").read_text(encoding="utf-8")
