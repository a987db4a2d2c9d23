"""Docstrings in the house style, turned into markdown: paragraphs, formulas, `Args:` and its kin."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

#: sections of a docstring whose lines are `name: text`
NAMED = ("Args", "Attributes")
#: sections whose text is free
FREE = ("Returns", "Raises", "Yields")


def link(paper: str) -> str:
    """`arXiv 2106.09685` or `openreview TwJrTz9cRS` in a text, as links."""
    paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"openreview (\w{8,})", r"[openreview \1](https://openreview.net/forum?id=\1)", paper)


def prose(text: str) -> str:
    """Text in which `<` and `*` are no markup; code spans and indented formulas stay as they are."""
    return "\n".join(line if line.startswith("    ") else _prose_line(line) for line in text.splitlines())


def _prose_line(line: str) -> str:
    spans = re.split(r"(`[^`]*`)", line)
    return "".join(s if s.startswith("`") else _plain(s) for s in spans)


def _plain(text: str) -> str:
    return re.sub(r"(?<!\*)\*(?!\*)", r"\\*", text.replace("<", "&lt;"))  # `**` makes bold text on purpose


def cell(text: str) -> str:
    """Text that cannot break a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell(c) for c in line) + " |" for line in lines) + "\n"


def code(text: object) -> str:
    """Inline code, whatever is in it."""
    return f"`{text}`"


def sections(doc: str) -> tuple[str, dict[str, str]]:
    """(the text before the first section, section -> its text without indentation)."""
    parts = re.split(rf"^({'|'.join((*NAMED, *FREE))}):\s*$", inspect.cleandoc(doc), flags=re.MULTILINE)
    found = {name: inspect.cleandoc("\n" + body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}
    return parts[0].strip(), found


def named(text: str) -> dict[str, str]:
    """name -> description, of an `Args:` section; `a, b: …` names two, and a line may hold several entries."""
    found: dict[str, str] = {}
    entry = re.compile(r"(?:^|(?<=[.;] ))((?:\*{0,2}[A-Za-z_]\w*(?:, )?)+): ")
    joined: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and joined:
            joined[-1] += " " + line.strip()
        elif line.strip():
            joined.append(line.strip())
    for line in joined:
        parts = entry.split(line)
        for names, description in zip(parts[1::2], parts[2::2], strict=True):
            found |= dict.fromkeys(names.split(", "), description.strip())
    return found


def markdown(doc: str) -> str:
    """A docstring as markdown; indented formulas are code blocks already."""
    head, rest = sections(doc)
    lines = [link(prose(head))] if head else []
    for name, body in rest.items():
        if name in NAMED:
            entries = named(body).items()
            lines += [f"**{name}**", "\n".join(f"- {code(k)}: {link(prose(v))}" for k, v in entries)]
        else:
            lines += [f"**{name}**: {link(prose(body))}"]
    return "\n\n".join(lines) + "\n"
