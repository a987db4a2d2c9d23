"""README.md of a run: what was trained on what, how well it does, how to use it, whose work it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltatune.train.report import cost_rows, metric_rows, shorten
from deltatune.version import __version__

if TYPE_CHECKING:
    from deltatune.train.data import Examples
    from deltatune.train.models import ResolvedModel
    from deltatune.train.recipe import Recipe
    from deltatune.train.run import RunResult


def model_card(result: RunResult, recipe: Recipe, resolved: ResolvedModel, examples: Examples) -> str:
    """The whole card as markdown, with the hub's metadata in front."""
    parts = [
        _front_matter(result, resolved),
        f"# {result.name}",
        recipe.description or f"A {result.method} adapter for {resolved.name}.",
        f"Trained with [deltatune](https://pypi.org/project/deltatune/) {__version__}.",
        _results_section(result, recipe),
        _samples_section(result),
        _usage_section(result, resolved),
        f"## Training\n\n{result.data}\n\n```yaml\n{recipe.to_yaml(brief=True)}```",
        _sources_section(resolved, examples),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(result: RunResult, resolved: ResolvedModel) -> str:
    import yaml

    from deltatune.train.packaged import find_packaged

    packaged = find_packaged(resolved.name)
    values: dict[str, Any] = {
        "library_name": "peft",
        "base_model": packaged.hub_id if packaged is not None else resolved.name,
        "pipeline_tag": "text-generation",
        "tags": ["deltatune", result.method.lower()],
    }
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True) + "---"


def _results_section(result: RunResult, recipe: Recipe) -> str:
    lines = ["## Results", ""]
    rows = metric_rows(result)
    if rows:
        count = int({**result.before, **result.after}.get("examples", 0))
        lines += [f"On {count} held-out examples that the training never saw:", ""]
        lines += ["| | before | after |", "|---|---:|---:|"]
        lines += [f"| {name} | {before} | {after} |" for name, before, after in rows] + [""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in cost_rows(result)]
    if recipe.report.plot:
        lines += ["", "![Training and held-out loss](loss.png)"]
    return "\n".join(lines)


def _samples_section(result: RunResult) -> str:
    if not result.samples:
        return ""
    lines = ["## Held-out examples", "", "| prompt | expected | base | tuned |", "|---|---|---|---|"]
    for sample in result.samples:
        cells = (sample["prompt"], sample["expected"], sample["base"], sample["tuned"])
        lines.append("| " + " | ".join(_cell(shorten(cell)) for cell in cells) + " |")
    return "\n".join(lines)


def _usage_section(result: RunResult, resolved: ResolvedModel) -> str:
    code = (
        "from deltatune import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{result.output_dir}")'
    )
    return (
        f"## Use\n\n```sh\ndeltatune chat {result.output_dir}\n```\n\n```python\n{code}\n```\n\n"
        f"The files also load in Hugging Face peft. The base model is {resolved.source}."
    )


def _sources_section(resolved: ResolvedModel, examples: Examples) -> str:
    lines = ["## Licences and citations", ""]
    lines += [_source("Base model", resolved.name, resolved.licence, resolved.citation)]
    lines += [_source("Data", examples.name or "the training data", examples.licence, examples.citation)]
    return "\n".join(lines)


def _source(what: str, name: str, licence: str | None, citation: str | None) -> str:
    said = f"licence: {licence}" if licence else "licence: not stated, see its source"
    return f"- {what}: {name}; {said}." + (f" {citation}" if citation else "")


def _cell(text: str) -> str:
    """Text that cannot break a markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;") or " "
