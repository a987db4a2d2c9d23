"""WHAT changes: one file per method, its configuration and its mathematics. `import_all` registers all of them."""

from __future__ import annotations

import functools
from importlib import import_module
from pkgutil import iter_modules


@functools.cache
def import_all() -> None:
    """Imports every method; a single one is imported by its own name, without the others."""
    for found in iter_modules(__path__):
        import_module(f"{__name__}.{found.name}")
