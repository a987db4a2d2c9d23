"""Every Python block of the README and of docs/ runs, every command exists with the options it is given."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from pathlib import Path

import docs_cli
import docs_methods
import pytest
import torch
from blocks import ROOT, blocks, module, run, write_stand_ins, written_pages

from deltatune.train.recipe import load_recipe
from small_runs import ROWS

#: ARCHITECTURE.md has a test of its own
PAGES = [p for p in written_pages() if p.name != "ARCHITECTURE.md"]
WITH_PYTHON = [p for p in PAGES if blocks(p.read_text(encoding="utf-8"), "python")]
names = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with the names of the hub models that the pages use."""
    folder = tmp_path_factory.mktemp("hub")
    write_stand_ins(folder)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which those names lead to the small models."""
    for owner in models.iterdir():
        (tmp_path / owner.name).symlink_to(owner, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_tickets(folder: Path) -> None:
    rows = "".join(f'"{row["text"]}",{row["label"]}\n' for row in ROWS * 5)
    (folder / "tickets.csv").write_text(f"body,team\n{rows}", encoding="utf-8")


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: p.name)
def test_python_runs(page: Path, here: Path):
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "yaml"):
        if block.mark == "recipe":
            write_tickets(here)
            (here / "support.yaml").write_text(block.code, encoding="utf-8")
    name = f"page_{page.stem}"
    try:
        space = module(name)
        for block in blocks(text, "python"):
            run(block, str(page), space)
    finally:
        del sys.modules[name]


@names
def test_recipes_are_valid(page: Path, tmp_path: Path):
    for block in blocks(page.read_text(encoding="utf-8"), "yaml"):
        if block.mark == "recipe":
            path = tmp_path / "recipe.yaml"
            path.write_text(block.code, encoding="utf-8")
            assert load_recipe(path).model


@names
def test_commands_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for block in blocks(text, "sh"):
        for offset, line in enumerate(block.code.splitlines()):
            words = shlex.split(line, comments=True)
            if words:
                check_command(words, f"{page.name}:{block.line + offset}")


@names
def test_inline_commands_exist(page: Path):
    for found in re.finditer(r"`((?:deltatune|make) [^`\n]+)`", page.read_text(encoding="utf-8")):
        if "…" not in found[1] and "VERB" not in found[1]:
            check_command(shlex.split(found[1]), f"{page.name}: {found[1]}")


def check_command(words: list[str], where: str) -> None:
    """`deltatune VERB …` with options that the verb has, `make` with targets that are there, scripts that exist."""
    program, *rest = words
    if program == "deltatune":
        verb, *given = rest
        assert verb in docs_cli.verbs(), where
        known = docs_cli.options(docs_cli.verbs()[verb])
        for word in given:
            assert not word.startswith("-") or word.partition("=")[0] in known, f"{where}: {word}"
        for key, value in itertools.pairwise(given):
            if key in ("--set", "-s"):
                load_recipe("quickstart", [value])
    elif program == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert set(rest) <= targets, where
    elif program.endswith("python"):
        scripts = [word for word in rest if word.endswith(".py")]
        assert all((ROOT / script).exists() for script in scripts), where
    else:
        assert program in ("pip", "pre-commit"), where


@names
def test_links_lead_somewhere(page: Path):
    """Relative links of files that are read in the repository; the site checks those of docs/ itself."""
    if page.parent != ROOT:
        return
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_scripts_that_pages_name_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:examples|scripts|tests|benchmarks|src)/[\w/.]+\.py)`", page.read_text("utf-8")):
            assert (ROOT / path).is_file(), f"{page.name}: {path}"


# ---------------------------------------------------------------------- generated pages
METHODS = docs_methods.methods()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_method_page(method: docs_methods.Method):
    """Its code attaches the method to a language model, and every option is explained."""
    from small_runs import small_model

    space = module("method_page")
    space.base = small_model(hidden_size=256, attention_bias=True)  # biases for BitFit, room for SAID's vector
    try:
        exec(docs_methods.snippet(method), space.__dict__)
    finally:
        del sys.modules["method_page"]
    logits = space.model(input_ids=torch.arange(6).view(1, 6)).logits
    assert torch.isfinite(logits).all()
    page = docs_methods.page(method)
    assert page.startswith(f"# {method.title}\n")
    unexplained = re.findall(r"^\| `(\w+)` \| .* \|  \|$", page, re.MULTILINE)
    assert not unexplained, "say in the configuration's Args what these fields mean"


def test_readme_table_is_current():
    import docs_readme

    text = docs_readme.README.read_text(encoding="utf-8")
    assert docs_readme.current(text) == text, "run: python scripts/docs_readme.py"


def test_every_method_is_in_the_table():
    from deltatune.config import known_methods

    shipped = {n for n, c in known_methods().items() if c.__module__.startswith("deltatune.")}
    assert {str(m.config.method) for m in METHODS} == shipped
    assert len({m.slug for m in METHODS}) == len(METHODS)
