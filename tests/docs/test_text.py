"""Docstrings as markdown."""

from __future__ import annotations

import dataclasses

from docs_api import signature
from docs_cli import type_name
from docs_text import link, markdown, named, prose, sections, table

from deltatune import register

DOC = """One line.

    y = a * b <c>

Args:
    r: rank, >= 1.
    a, b: the factors,
        over two lines. scale: by which they are multiplied.

Raises:
    ValueError: never.
"""


def test_sections():
    head, rest = sections(DOC)
    assert head == "One line.\n\n    y = a * b <c>"
    assert set(rest) == {"Args", "Raises"}


def test_named_entries():
    assert named(sections(DOC)[1]["Args"]) == {
        "r": "rank, >= 1.",
        "a": "the factors, over two lines.",
        "b": "the factors, over two lines.",
        "scale": "by which they are multiplied.",
    }


def test_markdown():
    text = markdown(DOC)
    assert "    y = a * b <c>" in text  # a formula stays
    assert "- `r`: rank, >= 1." in text
    assert "**Raises**: ValueError: never." in text


def test_prose_is_no_markup():
    assert prose("runs/<name> and `<kept>` 2 * 3, **bold**") == "runs/&lt;name> and `<kept>` 2 \\* 3, **bold**"


def test_link():
    assert link("arXiv 2106.09685") == "[arXiv 2106.09685](https://arxiv.org/abs/2106.09685)"


def test_table_cells_cannot_break_it():
    assert table(("a", "b"), [("x | y", "two\nlines")]).splitlines()[-1] == "| x \\| y | two lines |"


def test_signature_reads_as_in_the_source():
    def function(self, a: int | None = None, *, b: str = "x") -> list[str]: ...

    assert signature("f", function) == "f(a: int | None = None, *, b: str = 'x') -> list[str]"
    assert signature("register", register) == "register(cls: C) -> C"


def test_type_names():
    assert type_name(int | None) == "int or None"
    assert type_name(dict[str, list[int]]) == "dict[str, list[int]]"


def test_defaults():
    from docs_methods import default_of

    @dataclasses.dataclass
    class Config:
        a: int
        b: int = 2
        c: list[int] = dataclasses.field(default_factory=list)

    assert [default_of(f) for f in dataclasses.fields(Config)] == ["required", "2", "[]"]
