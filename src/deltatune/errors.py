"""Every error a user can cause: one sentence that says what is wrong, where, and the likeliest fix.

All of them are `ValueError`s, so code that catches what peft raises keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltatuneError(ValueError):
    """Base of all errors that deltatune raises on purpose."""


class ConfigError(DeltatuneError):
    """A configuration value is impossible or contradicts another one."""


class PackingError(ConfigError):
    """Several examples in one row would see each other, or a part of what belongs to every one."""


class TargetError(DeltatuneError):
    """A pattern matches nothing, or a module that cannot carry the edit."""


class AdapterNameError(DeltatuneError):
    """An adapter name is unknown, taken, or not usable as a name."""


class AdapterLoadError(DeltatuneError):
    """An adapter file does not fit: missing, unexpected or mis-shaped tensors, or a damaged file."""


class BaseMismatchError(AdapterLoadError):
    """The adapter was trained on another base model."""


class CannotMergeError(DeltatuneError):
    """The adapter has no equivalent weight, so it cannot be folded into the base."""


class MixedBatchError(DeltatuneError):
    """Rows of this batch cannot be given to different adapters at this module."""


def nearest(name: str, options: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` options most like `name`: by spelling, of the whole path or of its last part."""
    options = list(dict.fromkeys(options))
    found = difflib.get_close_matches(name, options, n=n, cutoff=0.5)
    if not found:
        by_leaf: dict[str, str] = {}
        for option in options:
            by_leaf.setdefault(option.rpartition(".")[2], option)
        leaves = difflib.get_close_matches(name.rpartition(".")[2], by_leaf, n=n, cutoff=0.5)
        found = [by_leaf[leaf] for leaf in leaves]
    return found


def hint(name: str, options: Iterable[str]) -> str:
    """`; did you mean …?` or an empty string, to end an error sentence with."""
    found = nearest(name, options)
    return f"; did you mean {' or '.join(repr(f) for f in found)}?" if found else ""
