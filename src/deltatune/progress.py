"""Progress bars for work that takes more than a moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, cast

T = TypeVar("T")


def track(items: Iterable[T], text: str, *, show: bool = True, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on stderr that counts them; silent where there is no terminal, or `show` is False."""
    if not show:
        return items
    from tqdm import tqdm  # type: ignore[import-untyped]

    # disable=None: no bar unless stderr is a terminal
    return cast(Iterable[T], tqdm(items, desc=text, total=total, disable=None, leave=False))
