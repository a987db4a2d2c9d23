"""`deltatune recipes`."""

from __future__ import annotations

import json
from pathlib import Path


def test_every_shipped_recipe_is_listed(cli) -> None:
    from deltatune.train.recipe import shipped_recipes

    rows = json.loads(cli("recipes", "--json").out)
    assert [row["name"] for row in rows] == list(shipped_recipes())
    assert all(row["description"] and Path(row["path"]).is_file() for row in rows)
    assert "quickstart" in cli("recipes").out


def test_a_recipe_is_shown_as_its_file_or_as_values(cli) -> None:
    from deltatune.train.recipe import shipped_recipes

    assert cli("recipes", "quickstart").out == shipped_recipes()["quickstart"].read_text()
    values = json.loads(cli("recipes", "quickstart", "--json").out)
    assert values["model"] == "smollm2-135m-instruct"
    assert values["train"]["batch_size"] > 0


def test_the_schema_describes_a_recipe(cli) -> None:
    schema = json.loads(cli("recipes", "--schema").out)
    assert {"model", "method", "data", "train"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_wrong_use(cli) -> None:
    assert "did you mean 'quickstart'" in cli("recipes", "quikstart").err
    assert "takes no name" in cli("recipes", "quickstart", "--schema").err
