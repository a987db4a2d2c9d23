"""WHAT changes: one file per method, its configuration and its mathematics. Importing this registers all."""

from importlib import import_module
from pkgutil import iter_modules

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")
