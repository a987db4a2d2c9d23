"""What a finished run shows: the before/after table, held-out examples, what to try next, loss.png."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltatune.cli.common import number, size
from deltatune.core.files import write_atomically
from deltatune.train.callbacks import duration, read_metrics

if TYPE_CHECKING:
    from rich.console import Console

    from deltatune.train.run import RunResult

#: metric → what it is called in tables; those that a run has are shown, in this order
METRICS = {
    "accuracy": "accuracy",
    "label_accuracy": "accuracy of the likeliest label",
    "macro_f1": "macro F1",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "loss": "loss (nats/token)",
    "perplexity": "perplexity",
}
#: what a run leaves for people to look at
FILES = (
    "adapter_model.safetensors",
    "metrics.jsonl",
    "metrics.csv",
    "loss.png",
    "ranks.png",
    "README.md",
    "recipe.yaml",
)
WIDE = 30  # losses that fall by more than this factor are drawn on a logarithmic scale
SHOWN_TEXT = 160  # characters of a prompt or an answer in a table


def metric_rows(result: RunResult) -> list[tuple[str, str, str]]:
    """(name, before, after) of every metric that was measured."""
    rows = []
    for key, label in METRICS.items():
        # Accuracy says all that exact match says when the answers are a closed set.
        if key == "exact_match" and "accuracy" in {**result.before, **result.after}:
            continue
        if key in result.before or key in result.after:
            rows.append((label, _metric(key, result.before), _metric(key, result.after)))
    return rows


def cost_rows(result: RunResult) -> list[tuple[str, str]]:
    """(name, value) of what the run took and made."""
    share = 100 * result.trainable / max(result.total, 1)
    told = [(name, _told(report)) for name, report in result.procedures.items()]
    return [
        ("trainable parameters", f"{result.trainable:,} of {result.total:,} ({share:.3f} %)"),
        ("training time", f"{duration(result.seconds)} for {result.steps} steps"),
        ("peak memory", size(result.peak_memory)),
        ("adapter size", size(result.adapter_bytes)),
        *told,
    ]


def _told(report: dict[str, Any]) -> str:
    """What a procedure tells, in a line; of long lists their range."""
    parts = []
    for key, value in report.items():
        if isinstance(value, dict):
            value = f"{min(value.values())} to {max(value.values())}" if value else "none"
        elif isinstance(value, float):
            value = f"{value:.3g}"
        parts.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(parts)


def show_result(result: RunResult, console: Console) -> None:
    """The before/after table, the shown examples, and what to try next."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    held_out = int({**result.before, **result.after}.get("examples", 0))
    title = f"{held_out} held-out examples" if held_out else "no held-out examples"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=False)
    table.add_column(title)
    for who in ("before", "after"):
        table.add_column(who, justify="right")
    for name, before, after in metric_rows(result):
        table.add_row(name, before, after)
    if metric_rows(result):
        console.print(table)
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in cost_rows(result):
        facts.add_row(name, Text(value))
    console.print(facts)
    for sample in result.samples:
        console.print()
        for label, key in (("prompt", "prompt"), ("expected", "expected"), ("base", "base"), ("tuned", "tuned")):
            mark = _mark(sample, key)
            console.print(Text(f"{label:>9}  ", style="dim") + Text(shorten(sample[key])) + mark)
    console.print()
    _show_next(result, console)


def _show_next(result: RunResult, console: Console) -> None:
    """Where the files are and the commands that use them."""
    from rich.text import Text

    where = result.output_dir
    written = [name for name in FILES if (Path(where) / name).is_file()]
    console.print(Text(f"Written to {where}: {', '.join(written)}."))
    console.print(Text("Next:"))
    for what, command in next_commands(where):
        console.print(Text(f"  {what:<10} ", style="dim") + Text(command, style="bold"), soft_wrap=True)


def next_commands(where: str) -> list[tuple[str, str]]:
    """(what it does, command) for a finished run."""
    return [
        ("talk to it", f"deltatune chat {where}"),
        ("measure it", f"deltatune eval {where} --which all"),
        ("look in", f"deltatune inspect {where}"),
        ("merge it", f"deltatune merge {where} {where}-merged"),
        ("repeat it", f"deltatune train {where}/recipe.yaml --overwrite"),
    ]


def plot_loss(directory: Path, result: RunResult) -> None:
    """loss.png: training loss per step, held-out loss where it was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(directory / "metrics.jsonl")
    training = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    ends = ((0, result.before), (result.best_step or result.steps, result.after))
    measured = {step: values["loss"] for step, values in ends if "loss" in values}
    held_out = sorted({**dict(held_out), **measured}.items())
    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        axes.plot(*zip(*training, strict=True), color="#1f77b4", linewidth=1.5, label="training")
    if held_out:
        # Before and after alone are two facts and not a curve.
        line = "--" if len(held_out) > 2 else "none"
        axes.plot(*zip(*held_out, strict=True), color="#d62728", marker="o", linestyle=line, label="held-out")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_title(f"{result.name}: {result.method} on {Path(result.model).name}")
    values = [value for _, value in [*training, *held_out] if value > 0]
    if values and max(values) > WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if training or held_out:
        axes.legend(frameon=False)
    write_atomically(directory / "loss.png", lambda path: figure.savefig(path, format="png"))


def _metric(key: str, measured: dict[str, Any]) -> str:
    if key not in measured:
        return "-"
    return number(measured[key]) if key in ("loss", "perplexity") else f"{measured[key]:.3f}"


def _mark(sample: dict[str, str], key: str) -> Any:
    """Right or wrong, for answers that can be compared with the expected one."""
    from rich.text import Text

    if key not in ("base", "tuned") or len(sample["expected"]) > SHOWN_TEXT:
        return Text()
    right = sample[key].strip() == sample["expected"].strip()
    return Text("  right", style="green") if right else Text("  wrong", style="red")


def shorten(text: str) -> str:
    line = " ⏎ ".join(part for part in text.strip().splitlines() if part.strip())
    return line if len(line) <= SHOWN_TEXT else line[: SHOWN_TEXT - 1] + "…"
