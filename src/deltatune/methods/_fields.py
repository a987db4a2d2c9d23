"""Checks of fields that several methods' configurations share."""

from __future__ import annotations

from collections.abc import Mapping

from deltatune.core.sites import Site
from deltatune.core.weights import WeightRef
from deltatune.errors import ConfigError


def check_ranks(r: object, rank_pattern: Mapping[str, object]) -> None:
    """Raises ConfigError for a rank that is not a whole number of at least 1."""
    for value in (r, *rank_pattern.values()):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"r must be a whole number of at least 1, not {value!r}")


def check_probability(name: str, value: object) -> None:
    """Raises ConfigError for a dropout outside [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(f"{name} must be in [0, 1), not {value!r}")


def check_input_dropout(name: str, value: float, ref: WeightRef, site: Site) -> None:
    """Raises ConfigError for a dropout on the input of a weight whose module does not show it."""
    if value and not ref.bypass:
        raise ConfigError(
            f"{site.name!r} reads its weight itself, so {name} cannot reach its input; set it to 0 or leave this "
            "module out"
        )
