"""Code blocks of markdown files, and a world in which they run: small stand-ins for the models they name."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"(?:^<!-- test: (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block; `mark` is the text of an HTML comment `<!-- test: … -->` on the line before it."""

    language: str
    code: str
    line: int
    mark: str


def blocks(text: str, language: str) -> list[Block]:
    """The blocks of one language, in order."""
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == language:
            line = text.count("\n", 0, match.start("code")) + 1
            found.append(Block(language, match["code"], line, match["mark"] or ""))
    return found


def written_pages() -> Iterator[Path]:
    """The markdown files that people write: those of the root and of docs/."""
    yield from sorted(p for p in ROOT.glob("*.md"))
    yield from sorted((ROOT / "docs").rglob("*.md"))


def module(name: str) -> types.ModuleType:
    """An empty module that classes defined by a block can belong to."""
    made = types.ModuleType(name)
    sys.modules[name] = made
    return made


def run(block: Block, where: str, into: types.ModuleType) -> dict[str, Any]:
    """Runs a block in a module; errors name the file and its line."""
    code = compile("\n" * (block.line - 1) + block.code, where, "exec")
    exec(code, into.__dict__)
    return into.__dict__


#: hub ids that pages name -> the tiny model that stands for them, in directories of that name
STAND_INS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "causal",
    "google/flan-t5-small": "seq2seq",
    "google-bert/bert-base-uncased": "classifier",
}


def write_stand_ins(folder: Path) -> None:
    """Model directories under `folder`, so that `from_pretrained("owner/name")` finds them there."""
    from small_runs import small_tokenizer, write_base
    from tiny import bert, t5

    for name, kind in STAND_INS.items():
        if kind == "causal":
            write_base(folder / name)
            continue
        model = t5(vocab_size=400) if kind == "seq2seq" else bert(vocab_size=400)
        model.save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)
