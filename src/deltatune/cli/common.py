"""What every verb shares: consoles, JSON output, number formats, the options that say how to load."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

    from deltatune.train.loading import Loaded

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Base model, instead of the one the adapter names."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps …; default: a GPU if any.")]
QuantOption = Annotated[
    str | None,
    typer.Option(help="Storage of the base: 4bit, fp4, 8bit, native or none; default: an adapter's in its training."),
]


class Dtype(str, Enum):
    """Storage type of weights, by the names people type."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[
    Dtype, typer.Option(help="Type the weights are loaded in; auto: the file's on a GPU, else float32.")
]


def out() -> Console:
    """Console for results (stdout)."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> Console:
    """Console for progress and remarks (stderr), so that stdout stays clean for pipes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One remark on stderr, dim, without reading `[…]` in it as markup."""
    console = err()
    # A terminal wraps between words; a pipe keeps the sentence on one line.
    console.print(text, style="dim", markup=False, soft_wrap=not console.is_terminal)


def note_unpacked(loaded: Loaded) -> None:
    """Says so where the base's own weights, in few bits, were unpacked."""
    if loaded.resolved.kind == "gguf":
        note(f"the base is {loaded.resolved.source}")


def print_json(value: Any) -> None:
    """One JSON document on stdout. Not through rich, which would wrap long lines."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def examples(*lines: str) -> str:
    """Example command lines as the epilogue of a `--help` page, one line each."""
    return "Examples:\n\n" + "\n\n".join(lines)


def size(count: float) -> str:
    """Bytes for people: 512 B, 4.3 MB, 1.2 GB (powers of ten, as disks and networks count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """A measured number with four significant digits and no needless exponent."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def titled(title: str, content: Table) -> Group:
    """A table under its title; a title of the table itself would be folded to the table's width."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(title, style="bold"), content)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A plain table: first column left, the others right; cells are never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result


def facts(rows: Iterable[Sequence[str]]) -> Table:
    """Names and what is known of them, in two columns without a heading."""
    result = table(["", ""], rows)
    result.show_header = False
    result.columns[0].no_wrap = True
    result.columns[1].justify = "left"
    return result


def write_now(text: str) -> None:
    """Words on stdout as they come."""
    sys.stdout.write(text)
    sys.stdout.flush()


class WordWrap:
    """Breaks streamed text between words, where a terminal would break inside them.

    Text must come in pieces that end after a word, as transformers' streamer gives it.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.column = 0

    def __call__(self, text: str) -> None:
        """Write `text` on stdout."""
        from rich.cells import cell_len

        pieces = []
        for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
            length = cell_len(piece)
            if piece == "\n":
                self.column = 0
            elif self.column > 0 and self.column + length > self.width:
                blank = piece.isspace()
                pieces.append("\n")
                self.column = 0 if blank else length
                if blank:  # a blank at the break is the break
                    continue
            else:
                self.column += length
            pieces.append(piece)
        write_now("".join(pieces))
