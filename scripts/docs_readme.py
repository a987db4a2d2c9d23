"""Puts the generated table of methods between its markers in README.md.

python scripts/docs_readme.py           writes it
python scripts/docs_readme.py --check   exits with 1 if it is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from docs_methods import method_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: made by scripts/docs_readme.py -->", "<!-- end of methods -->"


def current(text: str) -> str:
    """`text` with today's table between the markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no line {BEGIN!r}, so there is no place for the table of methods")
    table = f"{BEGIN}\n{method_table()}{END}"
    return pattern.sub(lambda _: table, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts the generated table of methods into README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is out of date")
    wanted = current(README.read_text(encoding="utf-8"))
    if parser.parse_args().check:
        up_to_date = wanted == README.read_text(encoding="utf-8")
        sys.exit(None if up_to_date else "README.md is out of date: run python scripts/docs_readme.py")
    README.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
