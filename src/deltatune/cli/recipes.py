"""`deltatune recipes`: list and show the shipped recipes, and their JSON schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import JsonFlag


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "recipes",
        epilog=common.examples(
            "deltatune recipes",
            "deltatune recipes quickstart > mine.yaml",
            "deltatune recipes --schema > recipe.schema.json",
        ),
    )(recipes_command)


def recipes_command(
    name: Annotated[str | None, typer.Argument(help="Show this recipe; without it, list all.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the shipped recipes, show one as YAML, or print the JSON schema that editors check recipes with."""
    from deltatune.train.recipe import load_recipe, recipe_schema, shipped_recipes

    if schema and name is not None:
        raise ValueError("--schema describes every recipe, so it takes no name")
    if schema:
        common.print_json(recipe_schema())
    elif name is not None:
        recipe = load_recipe(name)
        if as_json:
            common.print_json(recipe.model_dump(mode="json"))
        else:
            # The file as it is, comments included, when it is a shipped one.
            path = shipped_recipes().get(name, Path(name))
            sys.stdout.write(path.read_text(encoding="utf-8"))
    else:
        _list([_row(path) for path in shipped_recipes().values()], as_json)


def _row(path: Path) -> dict[str, Any]:
    """What the list says of one file; it is not built, which would load torch."""
    from deltatune.train.recipe import parse_yaml

    raw = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return {
        "name": path.stem,
        "method": raw["method"]["peft_type"],
        "model": raw["model"],
        "data": raw["data"]["path"],
        "description": raw.get("description", ""),
        "path": str(path),
    }


def _list(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        common.print_json(rows)
        return
    console = common.out()
    columns = ["name", "method", "model", "data", "description"]
    table = common.table(columns, [[_text(row[key]) for key in columns] for row in rows])
    for column in table.columns[1:]:
        column.justify = "left"
    console.print(table)
    console.print("deltatune recipes NAME shows one; deltatune train NAME runs it", style="dim")


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
