"""The pages of the command line and of recipes, from the command and the recipe's own models."""

from __future__ import annotations

import enum
import types
import typing
from typing import Any

import typer
from docs_text import cell, code, prose, table
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from deltatune.cli.app import build_app
from deltatune.train.recipe import Recipe, shipped_recipes


def verbs() -> dict[str, Any]:
    """Verb -> its command."""
    commands: dict[str, Any] = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
    return commands


def options(command: Any) -> set[str]:
    """Every spelling of every option of a command."""
    return {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}


def cli_page() -> str:
    """One section per verb: what it does, arguments, options, examples."""
    lines = [
        "# Command line",
        "`deltatune VERB --help` says the same in the terminal. Every verb has `--json` where programs read its "
        "result; errors that a user can mend are one sentence on standard error with exit status 1, and "
        "`deltatune --debug VERB …` shows where they came from.",
    ]
    for name, command in verbs().items():
        arguments = [p for p in command.params if not p.opts[0].startswith("-")]
        usage = " ".join(a.name.upper() if a.required else f"[{a.name.upper()}]" for a in arguments)
        lines += [f"## deltatune {name}", command.help or "", f"```sh\ndeltatune {name} {usage} [OPTIONS]\n```"]
        if arguments:
            lines += [table(("Argument", "Meaning"), ([code(a.name.upper()), prose(a.help or "")] for a in arguments))]
        flags = [p for p in command.params if p.opts[0].startswith("-")]
        lines += [table(("Option", "Meaning"), (_option(p) for p in flags))]
        examples = [line for line in (command.epilog or "").split("\n\n") if line.startswith(("deltatune", "printf"))]
        lines += ["```sh\n" + "\n".join(examples) + "\n```"]
    return "\n\n".join(lines) + "\n"


def _option(param: Any) -> list[str]:
    spelled = ", ".join(code(name) for name in (*param.opts, *param.secondary_opts))
    default = param.default.value if isinstance(param.default, enum.Enum) else param.default
    shown = "" if default in (None, False, [], ()) or callable(default) else f" Default: {code(default)}."
    return [spelled, prose(param.help or "") + shown]


# ---------------------------------------------------------------------- recipes
def recipe_page() -> str:
    """Every key of a recipe, and the shipped recipes."""
    lines = [
        "# Recipe keys",
        "A recipe is a YAML file. An unknown key is an error that names the nearest known one; "
        "`deltatune recipes --schema` prints the same as a JSON schema for editors. On the command line, "
        "`--set train.learning_rate=1e-3` changes one key.",
        "## Top level",
        _keys(Recipe),
    ]
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            lines += [f"## `{name}`", (section.__doc__ or "").strip(), _keys(section, f"{name}.")]
    lines += ["## Shipped recipes"]
    for name, path in shipped_recipes().items():
        lines += [f"### {name}", f"```yaml\n{path.read_text(encoding='utf-8')}```"]
    return "\n\n".join(lines) + "\n"


def _keys(model: type[BaseModel], prefix: str = "") -> str:
    rows = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            rows.append([code(prefix + name), "section", "", f"see [below](#{name})"])
            continue
        made = field.get_default(call_default_factory=True) if field.default_factory is not None else field.default
        default = "required" if made is PydanticUndefined else code(repr(made))
        rows.append([code(prefix + name), code(cell(type_name(kind))), default, prose(field.description or "")])
    return table(("Key", "Type", "Default", "Meaning"), rows)


def type_name(kind: Any) -> str:
    """A type as people write it, without module names and without `|`, which would end a table cell."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(a) for a in arguments)}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
