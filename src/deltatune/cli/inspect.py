"""`deltatune inspect`: what is in a saved adapter, without loading its base."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.cli import common
from deltatune.cli.common import JsonFlag

if TYPE_CHECKING:
    from deltatune.cli.adapter_report import AdapterReport, ModuleReport

BAR = 30  # characters of the longest bar


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(
        "inspect",
        epilog=common.examples(
            "deltatune inspect runs/quickstart",
            "deltatune inspect adapter_model.safetensors --modules",
            "deltatune inspect runs/quickstart --json | jq .layers",
        ),
    )(inspect_command)


def inspect_command(
    path: Annotated[Path, typer.Argument(help="An adapter directory, a run, or a safetensors file.")],
    modules: Annotated[bool, typer.Option("--modules", help="A row for every module, not for every kind.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show an adapter: method, base, size, rank of each module, norm of each layer.

    Reads the adapter's files alone. Norms are Frobenius norms; the update of a low-rank pair is s·B·A.
    """
    from deltatune.cli.adapter_report import report

    found = report(path)
    if as_json:
        common.print_json(found.as_dict())
        return
    console = common.out()
    console.print(common.titled(found.path, common.facts(_facts(found))))
    console.print(_every_module(found.modules) if modules else _by_kind(found.modules))
    console.print(_by_layer(found))
    if any(module.rank is None for module in found.modules):
        console.print("in brackets: norms of stored tensors that are no low-rank pair", style="dim")
    for remark in found.remarks:
        console.print(remark, style="yellow", markup=False)


def _facts(found: AdapterReport) -> list[list[str]]:
    config = found.config
    facts = {
        "method": found.method,
        "base": found.base,
        "task": found.task,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": _listed(config.get("target_modules")),
        "trained whole": _listed(config.get("modules_to_save")),
        "parameters": f"{found.parameters:,} in {found.tensors} tensors, {', '.join(found.dtypes)}",
        "file": common.size(found.bytes),
        "trained on": _fingerprint(found.fingerprint),
    }
    extra = {f"header: {k}": v[:80] for k, v in found.metadata.items() if k not in ("format", "deltatune_base")}
    return [[key, str(value)] for key, value in (facts | extra).items() if value]


def _listed(value: Any) -> str | None:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else value


def _fingerprint(value: dict[str, Any] | None) -> str | None:
    if not value:
        return None
    return f"{value.get('architecture')}, shapes {value.get('shapes')}, {len(value.get('samples', {}))} weights sampled"


def _every_module(modules: list[ModuleReport]) -> Any:
    rows = [[m.name or "(the model)", *_pair(m), f"{m.parameters:,}", *_norms([m])] for m in modules]
    return _module_table("modules", ["module", "r", "out×in", "params", "‖A‖", "‖B‖", "‖update‖"], rows)


def _by_kind(modules: list[ModuleReport]) -> Any:
    """One row for all modules that differ by their layer number only."""
    kinds: dict[tuple[str, ...], list[ModuleReport]] = defaultdict(list)
    for module in modules:
        kinds[(re.sub(r"\.\d+(?=\.|$)", ".*", module.name), *_pair(module))].append(module)
    rows = [
        [key[0] or "(the model)", str(len(ms)), *key[1:], f"{sum(m.parameters for m in ms):,}", *_norms(ms)]
        for key, ms in kinds.items()
    ]
    columns = ["module", "n", "r", "out×in", "params", "‖A‖", "‖B‖", "‖update‖"]
    return _module_table("modules by kind, mean norms (--modules lists each)", columns, rows)


def _module_table(title: str, columns: list[str], rows: list[list[str]]) -> Any:
    """What all names begin with goes into the title: the names must fit a terminal of 80 columns."""
    parents = [row[0].split(".")[:-1] for row in rows]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
    shared = ".".join(parts[0] for parts in same)
    shown = [[row[0][len(shared) + 1 :] if shared else row[0], *row[1:]] for row in rows]
    result = common.table(columns, shown)
    result.padding = (0, 1, 0, 0)
    return common.titled(f"{title}, in {shared}" if shared else title, result)


def _pair(module: ModuleReport) -> tuple[str, str]:
    if module.rank is None or module.shape is None:
        return ("-", module.kind)
    return (str(module.rank), f"{module.shape[0]}×{module.shape[1]}")


def _norms(modules: list[ModuleReport]) -> list[str]:
    """Mean norms of A, of B and of the update; in brackets, of the tensors where there is no pair."""
    if modules[0].rank is None:
        return ["-", "-", f"({common.number(sum(m.norm for m in modules) / len(modules))})"]
    columns = ([m.a_norm for m in modules], [m.b_norm for m in modules], [m.update_norm for m in modules])
    return [common.number(sum(v or 0.0 for v in values) / len(values)) for values in columns]


def _by_layer(found: AdapterReport) -> Any:
    pairs = all(module.rank is not None for module in found.modules)
    title = "norm of the update, by layer" if pairs else "norm by layer, stored tensors included"
    top = max(found.layers.values(), default=0.0) or 1.0
    rows = [[layer, common.number(norm), "█" * round(BAR * norm / top)] for layer, norm in found.layers.items()]
    result = common.table(["layer", "‖update‖" if pairs else "norm", ""], rows)
    result.columns[2].justify = "left"
    return common.titled(title, result)
