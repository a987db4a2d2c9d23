"""`deltatune train`: from a recipe, or flags alone, to an adapter and its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import JsonFlag
from deltatune.errors import ConfigError

if TYPE_CHECKING:
    from deltatune.train.recipe import Recipe

#: what stands in for a recipe when there are flags alone
DEFAULTS: dict[str, Any] = {
    "method": {"peft_type": "LORA", "target_modules": "all-linear"},
    "train": {"epochs": 3, "learning_rate": 2e-4, "save_strategy": "epoch"},
}
#: data settings that belong to a data set; another data set does not inherit them
OWN_DATA = (
    "subset",
    "split",
    "eval_path",
    "eval_split",
    "eval_fraction",
    "format",
    "columns",
    "template",
    "as_chat",
    "system",
    "limit",
    "eval_limit",
)
EXAMPLES = common.examples(
    "deltatune train quickstart",
    "deltatune train quickstart --data mine.jsonl --output-dir runs/mine",
    "deltatune train recipe.yaml --set train.learning_rate=1e-3 --set method.r=16",
    "deltatune train --model smollm2-135m --data chats.jsonl --method lora --r 8 --lr 2e-4 --output-dir runs/chats",
    "deltatune train recipe.yaml --load-in-4bit --set train.merge_aware=true",
    "deltatune train recipe.yaml --dry-run",
    "deltatune train recipe.yaml --resume",
)


def register(app: typer.Typer) -> None:
    """Add the verb to the command."""
    app.command("train", epilog=EXAMPLES)(train)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe file, or the name of a shipped recipe (see `deltatune recipes`)."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one value of the recipe; repeatable."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Base model: directory, hub id, .gguf file or packaged name."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="Training data in place of the recipe's; repeatable."),
    ] = None,
    eval_data: Annotated[list[str] | None, typer.Option("--eval-data", help="Held-out data; repeatable.")] = None,
    method: Annotated[str | None, typer.Option(help="Method, such as lora (see the README's table).")] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of low-rank methods.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="lora_alpha; the scale is alpha / r.")] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="lora_dropout.")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option("--target-modules", help="Comma-separated name endings, a regex, or all-linear."),
    ] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit", help="Load the base in NF4 (QLoRA).")] = None,
    load_in_8bit: Annotated[bool | None, typer.Option("--load-in-8bit", help="Load the base in int8.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="train.learning_rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="train.epochs.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="train.max_steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="train.batch_size.")] = None,
    max_length: Annotated[int | None, typer.Option(help="data.max_length, in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="train.seed.")] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", "-o", help="Run directory; default runs/<recipe name>.")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--no-resume", help="Insist on continuing, or on not continuing, a run."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again in place of the run that is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained and the memory it needs; train nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter.

    A broken-off run of the same recipe is continued from its last checkpoint.
    """
    flags = {
        "model": model,
        "data": data,
        "eval_data": eval_data,
        "method": method,
        "method.r": r,
        "method.lora_alpha": alpha,
        "method.lora_dropout": dropout,
        "method.target_modules": _targets(target_modules),
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "train.learning_rate": lr,
        "train.epochs": epochs,
        "train.max_steps": max_steps,
        "train.batch_size": batch_size,
        "data.max_length": max_length,
        "train.seed": seed,
        "output_dir": output_dir,
    }
    chosen = {key: value for key, value in flags.items() if value is not None}
    built = build(recipe, chosen, set_ or [])
    if dry_run:
        _plan(built, resume, overwrite, as_json)
    else:
        _train(built, resume, overwrite, as_json)


def build(recipe: str | None, flags: dict[str, Any], overrides: list[str]) -> Recipe:
    """The recipe that file or name, flags and `--set` make together; later ones win.

    Raises:
        ValueError: neither a recipe nor model and data, or a value that cannot be.
    """
    from deltatune.train.recipe import apply_override, build_recipe, read_recipe, set_value

    missing = [name for name in ("model", "data") if name not in flags]
    if recipe is None and missing:
        wanted = " and ".join(f"--{name}" for name in missing)
        raise ConfigError(f"say what to train: a recipe (deltatune train quickstart), or {wanted} as well")
    raw = read_recipe(recipe) if recipe is not None else _from_defaults(flags)
    _apply_data(raw, flags)
    if "method" in flags:
        _apply_method(raw, flags["method"])
    if "train.epochs" in flags and "train.max_steps" not in flags:
        raw.setdefault("train", {}).pop("max_steps", None)  # it would override the epochs asked for
    for key, value in flags.items():
        if key not in ("data", "eval_data", "method"):
            set_value(raw, key, value)
    for override in overrides:
        apply_override(raw, override)
    return build_recipe(raw, recipe or "the command line")


def _from_defaults(flags: dict[str, Any]) -> dict[str, Any]:
    return {"name": _data_name(flags["data"]), **{key: dict(value) for key, value in DEFAULTS.items()}}


def _apply_data(raw: dict[str, Any], flags: dict[str, Any]) -> None:
    """`--data` replaces the recipe's data set, with everything that was said about the old one."""
    section = raw.setdefault("data", {})
    if "data" in flags:
        for key in OWN_DATA:
            section.pop(key, None)
        section["path"] = flags["data"][0] if len(flags["data"]) == 1 else flags["data"]
        name = _data_name(flags["data"])
        if name not in str(raw["name"]):
            raw["name"] = f"{raw['name']}-{name}"
            # Not the recipe's own directory: another data set makes another run.
            raw.pop("output_dir", None)
            raw.pop("description", None)
    if "eval_data" in flags:
        section.pop("eval_fraction", None)
        section.pop("eval_split", None)
        section["eval_path"] = flags["eval_data"][0] if len(flags["eval_data"]) == 1 else flags["eval_data"]


def _data_name(paths: list[str]) -> str:
    """A short name for a data set: its file's, or its directory's where the file is called train or data."""
    import re

    path = Path(paths[0])
    generic = path.stem.lower() in ("train", "training", "data", "dataset")
    name = path.resolve().parent.name if generic else path.stem
    return re.sub(r"[^\w.-]+", "-", name) or "data"


def _apply_method(raw: dict[str, Any], method: str) -> None:
    """Another method keeps of the old one's settings only where it goes."""
    from deltatune.train.recipe import find_method

    name, fields = find_method(method)
    old = raw.get("method", {})
    if str(old.get("peft_type", "")).casefold() != name.casefold():
        kept = fields & {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        raw["method"] = {"peft_type": name, **{key: old[key] for key in old if key in kept}}


def _targets(text: str | None) -> Any:
    """`a,b` is a list; one word is a list of one, unless it is all-linear or a regular expression."""
    if text is None or text == "all-linear":
        return text
    if "," not in text and any(sign in text for sign in "*?[](){}|^$\\+"):
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def _train(recipe: Recipe, resume: bool | None, overwrite: bool, as_json: bool) -> None:
    from deltatune.train.report import show_result
    from deltatune.train.run import train as run

    console = common.err() if as_json else common.out()
    result = run(recipe, console=console, resume=resume, overwrite=overwrite)
    if as_json:
        common.print_json(result.to_json())
        return
    if result.status == "finished":
        console.print(
            f"This run is finished; its result is below. To repeat it: "
            f"deltatune train {result.output_dir}/recipe.yaml --overwrite",
            markup=False,
        )
    show_result(result, console)


def _plan(recipe: Recipe, resume: bool | None, overwrite: bool, as_json: bool) -> None:
    from deltatune.train.plan import plan

    made = plan(recipe, resume=resume, overwrite=overwrite)
    if as_json:
        common.print_json(made.to_json())
    else:
        made.show(common.out())
