"""Shared by all tests: no hub, one thread, fixed seeds, and the table of laws at the end of a run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Set on some CI machines: rich and typer would colour what tests compare as plain text.
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("PY_COLORS", None)
os.environ.pop("GITHUB_ACTIONS", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ.pop("TTY_INTERACTIVE", None)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--laws-table", action="store_true", help="print the grid of laws: method x op x store")


def pytest_terminal_summary(terminalreporter, config) -> None:
    if not config.getoption("--laws-table"):
        return
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(report.user_properties)
            if "law" in properties and (report.when == "call" or outcome == "skipped"):
                key = (properties["method"], properties["op"], properties["store"])
                mark = {"passed": "ok", "failed": "FAIL", "skipped": "refused"}[outcome]
                cells.setdefault(key, {})[properties["law"]] = properties.get("note", mark)
    laws = sorted({law for row in cells.values() for law in row})
    terminalreporter.section("laws: method x op x store")
    terminalreporter.write_line("  ".join(f"{c:<14}" for c in ("method", "op", "store")) + "  ".join(laws))
    notes: dict[str, int] = {}
    for (method, op, store), row in sorted(cells.items()):
        marks = []
        for law in laws:
            mark = row.get(law, "-")
            if mark not in ("ok", "FAIL", "-"):
                mark = f"({notes.setdefault(f'{method} on {op}: {mark}', len(notes) + 1)})"
            marks.append(f"{mark:<{len(law)}}")
        line = "  ".join(f"{c:<14}" for c in (method, op, store)) + "  ".join(marks)
        terminalreporter.write_line(line)
    for note, i in notes.items():
        terminalreporter.write_line(f"({i}) {note}")
