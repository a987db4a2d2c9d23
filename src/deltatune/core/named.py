r"""Parts of a model that its user named by their roles, where the structure does not show them.

    roles={"blocks": r"net\.stage_\d+", "attention": ["mixer"], "norm": ["scale"]}

Values are patterns as everywhere: name endings, or a regular expression over whole paths. An empty list says that the
model has no such part. What is not named is looked for in the structure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltatune.core.sites import base_modules, is_norm, select
from deltatune.errors import ConfigError, TargetError, hint

#: role -> what plays it
ROLES: dict[str, str] = {
    "blocks": "block",
    "attention": "self-attention",
    "cross_attention": "attention to an encoder",
    "attention_output": "output projection of attention",
    "query": "query projection",
    "key": "key projection",
    "value": "value projection",
    "feedforward": "feed-forward part",
    "feedforward_output": "layer that ends the feed-forward part",
    "norm": "normalisation layer",
    "norm_after_attention": "norm of the sum behind attention",
    "norm_after_cross_attention": "norm of the sum behind cross-attention",
    "norm_after_feedforward": "norm of the sum behind the feed-forward part",
}
#: roles of which a module can have one alone; its query and key may be the same layer
APART = ("attention", "cross_attention", "feedforward", "norm")
#: how many of a model's own names an error lists
SHOWN = 8


@dataclass(frozen=True)
class Named:
    """The modules of one model that have a role by their user's word: role -> paths, in the model's order."""

    found: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, table: Mapping[str, Any]) -> Named:
        """The modules that a configuration's `roles` name.

        Raises:
            ConfigError: a role that there is not. TargetError: a pattern that matches nothing, with the nearest names,
                or a module that two patterns give roles which it cannot have both.
        """
        paths = [p for p, _ in base_modules(model) if p]
        found = {}
        for role, patterns in table.items():
            if role not in ROLES:
                raise ConfigError(f"roles names {role!r}, which is not one of {', '.join(ROLES)}{hint(role, ROLES)}")
            hits = select(patterns, paths, f"roles[{role!r}]") if patterns else {}
            taken = {p for some in hits.values() for p in some}
            found[role] = tuple(p for p in paths if p in taken)
        owner: dict[str, str] = {}
        for one in APART:
            for path in found.get(one, ()):
                if path in owner:
                    raise TargetError(f"roles names {path!r} as {owner[path]!r} and as {one!r}; it can be one of them")
                owner[path] = one
        return cls(found)

    def __contains__(self, role: str) -> bool:
        return role in self.found

    def inside(self, role: str, path: str) -> list[str]:
        """The modules of a role at a path or below it."""
        return [p for p in self.found.get(role, ()) if f"{p}.".startswith(f"{path}." if path else "")]

    def is_norm(self, path: str, module: nn.Module) -> bool:
        return path in self.found["norm"] if "norm" in self.found else is_norm(module)


#: nothing is named
UNNAMED = Named()


def missing(model: nn.Module, role: str, inside: str = "") -> TargetError:
    """No module of a role is found in (a part of) a model; says how to name it, and what is there."""
    top = model.get_submodule(inside)
    names = [p.rpartition(".")[2] for p, m in base_modules(top) if p and _could_be(role, m)]
    candidates = _repeated(top) if role == "blocks" else list(dict.fromkeys(n for n in names if not n.isdigit()))
    shown = ", ".join(f"'{c}'" for c in candidates[:SHOWN]) + (", …" if len(candidates) > SHOWN else "")
    best = next(iter(difflib.get_close_matches(role, candidates, n=1, cutoff=0)), "…")
    value = f"r'{best}'" if role == "blocks" else repr([best])
    where = f"{inside!r} of this {type(model).__name__}" if inside else f"this {type(model).__name__}"
    there = f"; what could be one is called {shown}" if candidates else ""
    return TargetError(f"no {ROLES[role]} is found in {where}; name it, as in roles={{{role!r}: {value}}}{there}")


def _could_be(role: str, module: nn.Module) -> bool:
    """Whether a module is of the size of a role: a whole part, a norm, or one layer."""
    whole = next(module.children(), None) is not None
    if role in ("attention", "cross_attention", "feedforward"):
        return whole
    params = [p.ndim for p in module._parameters.values() if p is not None]
    return not whole and bool(params) and (max(params) == 1) == ("norm" in role)


def _repeated(model: nn.Module) -> list[str]:
    """Patterns of modules that hold others, numbered ones of one name together, those of most members first."""
    groups: dict[str, int] = {}
    for path, module in base_modules(model):
        if path and any(True for _ in module.children()):
            pattern = re.sub(r"\d+$", lambda _: r"\d+", path.replace(".", r"\."))
            groups[pattern] = groups.get(pattern, 0) + 1
    several = [p for p, n in groups.items() if n > 1]
    return sorted(several or groups, key=lambda p: -groups[p])
