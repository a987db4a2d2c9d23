"""Training procedures against plain LoRA, at the same steps: the table and the loss curves in docs/results.md.

Four questions, each with its own model and data (`procedures_questions.py`):

    small      a Llama of 1 million parameters that knows maths problems learns E2E, as bytes; three seeds
    classes    MiniLM learns the ten intents of Banking10 (a part of Banking77), three seeds
    language   SmolLM2-135M learns E2E (restaurant data to sentences), one seed
    scratch    a Llama of 0.4 million parameters is trained from nothing on maths problems (GSM8K), three seeds

Every entry of a question sees the same batches. The first seed tries all learning rates of an entry, and one or two
more if the best is the lowest or the highest (none in `language`); the one with the lowest loss on validation data goes
on, and what is reported is measured on other data. A killed run goes on where it stopped.

    python benchmarks/procedures.py --data ../shared/data
    python benchmarks/procedures.py --data ../shared/data classes/LISA       # this one again
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import machine, read_json, saved_bytes, write_json
from procedures_questions import QUESTIONS, Batch, Entry, Question
from rich.progress import Progress
from torch import Tensor

from deltatune import get_peft_config, get_peft_model, prepare_init
from deltatune.inits.data import needs_data
from deltatune.schedules import Attached, attach, find_procedure, mark

HERE = Path(__file__).parent
#: the learning rate of every run warms up over this share of the steps and then falls to zero in a line
WARM = 0.05
#: the order of the runs: a question, how many of an entry's learning rates are tried (None: all), how many seeds
PASSES: tuple[tuple[str, int | None, int], ...] = (
    ("classes", 3, 1),
    ("language", 1, 1),
    ("scratch", 2, 3),
    ("classes", None, 3),
    ("language", None, 1),
    ("scratch", None, 3),
    ("small", None, 3),
)


# ---------------------------------------------------------------------- one run
@torch.no_grad()
def measure(model: Any, batches: list[Batch], task: str) -> tuple[float, float]:
    """(loss, accuracy) on these batches; accuracy of classes, or of the trained tokens."""
    model.eval()
    losses, right, count = [], 0, 0
    for batch in batches:
        out = model(**batch)
        labels, logits = batch["labels"], out.logits
        if task == "CAUSAL_LM":
            labels, logits = labels[:, 1:], logits[:, :-1]
        counted = labels != -100
        right += int(((logits.argmax(-1) == labels) & counted).sum())
        count += int(counted.sum())
        losses.append(float(out.loss))
    model.train()
    return statistics.fmean(losses), right / count


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dictionaries and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(v) for v in values)


def training_bytes(model: Any, optimizer: torch.optim.Optimizer, schedule: Attached | None) -> int:
    """Gradients and the state of the optimiser and of a procedure's own; the base that checkpoints hold not counted."""
    grads = tensor_bytes([p.grad for p in model.parameters() if p.grad is not None])
    own = [s.state_dict() for s in schedule.schedules.values()] if schedule is not None else []
    return grads + tensor_bytes(list(optimizer.state.values())) + tensor_bytes(own)


def prepared(question: Question, entry: Entry, seed: int, steps: list[Batch]) -> tuple[Any, int]:
    """(the model with its adapter, the bytes of weights that it has more than the base)."""
    base = question.model(seed)
    before = sum(p.numel() * p.element_size() for p in base.parameters())
    if entry.method is None:
        return base, 0
    torch.manual_seed(seed)
    config: Any = get_peft_config({"task_type": question.task, **entry.method})
    if needs_data(config):
        prepare_init(base, config, steps[:8], progress=False)
    model = get_peft_model(base, config)
    return model, sum(p.numel() * p.element_size() for p in model.parameters()) - before


def run(question: Question, entry: Entry, lr: float, seed: int, told: Callable[[str], None]) -> dict[str, Any]:
    """Trains once and measures."""
    steps = question.steps(seed)
    model, added = prepared(question, entry, seed, steps)
    procedures = [find_procedure(entry.procedure)] if entry.procedure else []
    if procedures:
        mark(model, *procedures)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    implied = entry.method is not None and get_peft_config(dict(entry.method)).procedures()
    schedule = None
    if procedures or implied:
        schedule = attach(model, optimizer, *procedures, total_steps=len(steps), seed=seed)
    n = len(steps)
    warm = max(WARM * n, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / warm) * (1 - k / n))
    losses, seconds, peak = [], [], 0
    for number, batch in enumerate(steps):
        start = time.perf_counter()
        with saved_bytes(model) as count:
            loss = model(**batch).loss
            kept = count()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if number % max(n // 20, 1) == 0 or number == n - 1:
            peak = max(peak, added + kept + training_bytes(model, optimizer, schedule))
        scheduler.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        told(f"step {len(losses)}/{n} loss {loss.item():.3f}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = schedule.finish() if schedule is not None else {}
    validation, _ = measure(model, question.validation, question.task)
    held, accuracy = measure(model, question.held_out, question.task)
    return {
        "validation": validation if math.isfinite(validation) else None, "loss": held if math.isfinite(held) else None,
        "accuracy": accuracy, "losses": losses, "trained": trained, "seconds": statistics.median(seconds),
        "training_mb": peak / 2**20, "report": report,
    }  # fmt: skip


# ---------------------------------------------------------------------- all runs
def best_lr(results: dict[str, Any], key: str, lrs: Sequence[float]) -> float:
    """The learning rate whose first seed has the lowest validation loss."""
    return min(lrs, key=lambda lr: results[f"{key}/{lr:g}/0"]["validation"] or math.inf)


def rates(results: dict[str, Any], key: str, question: Question, entry: Entry, tries: int | None = None) -> list[float]:
    """The learning rates to try: the entry's, and more on the side on which the best so far is the last.

    Args:
        tries: so many of the entry's and no more; None takes all there are to try.
    """
    lrs = sorted(entry.lrs[:tries])
    for _ in range(question.more if tries is None else 0):
        if any(f"{key}/{lr:g}/0" not in results for lr in lrs):
            break
        best = best_lr(results, key, lrs)
        if best == lrs[0]:
            lrs.insert(0, best / 2)
        elif best == lrs[-1]:
            lrs.append(best * 2)
    return lrs


def runs_of(
    results: dict[str, Any], key: str, question: Question, entry: Entry, tries: int | None, seeds: int
) -> Iterator[tuple[str, float, int]]:
    """(key, learning rate, seed) of what is to be run, the tries of the first seed before the others."""
    tried: set[float] = set()
    while missing := [lr for lr in rates(results, key, question, entry, tries) if lr not in tried]:
        for lr in missing:
            tried.add(lr)
            yield f"{key}/{lr:g}/0", lr, 0
    for seed in range(1, seeds):
        lr = best_lr(results, key, rates(results, key, question, entry, tries))
        yield f"{key}/{lr:g}/{seed}", lr, seed


def summary(results: dict[str, Any], key: str, question: Question, entry: Entry) -> dict[str, Any] | None:
    """An entry over the seeds that have been run, at its best learning rate; None before the first run."""
    lrs = [lr for lr in rates(results, key, question, entry) if f"{key}/{lr:g}/0" in results]
    if not lrs:
        return None
    lr = best_lr(results, key, lrs)
    found = [results.get(f"{key}/{lr:g}/{seed}") for seed in range(question.seeds)]
    runs = [r for r in found if r is not None]
    losses, right = [r["loss"] for r in runs], [r["accuracy"] for r in runs]
    return {"entry": entry, "lr": lr, "lrs": lrs, "runs": runs, "loss": losses, "accuracy": right}


def spread(values: list[float]) -> str:
    """A mean with the smallest and the largest value."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def edge(lr: float, lrs: list[float]) -> str:
    """Says which way a better rate may lie, if the best is the first or the last that was tried."""
    if len(lrs) == 1:
        return f"{lr:g}"
    return f"{lr:g}" + (" (lowest)" if lr == lrs[0] else " (highest)" if lr == lrs[-1] else "")


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| question | entry | trained at a time | lr | seeds | loss after a quarter of the steps | held-out loss | "
        "accuracy | training MB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key, s in summaries.items():
        question, _, name = key.partition("/")
        early = [early_loss(r["losses"]) for r in s["runs"]]
        run = s["runs"][0]
        lines.append(
            f"| {question} | {name} | {run['trained']:,} | {edge(s['lr'], s['lrs'])} | {len(s['runs'])} | "
            f"{spread(early)} | {spread(s['loss'])} | {spread(s['accuracy'])} | {run['training_mb']:.1f} |"
        )
    return "\n".join(lines)


def early_loss(losses: list[float]) -> float:
    """The mean training loss over the steps between 15 % and 25 % of the run."""
    n = len(losses)
    return statistics.fmean(losses[int(0.15 * n) : int(0.25 * n)])


def panels(summaries: dict[str, dict[str, Any]], columns: int) -> dict[tuple[str, str], tuple[int, int]]:
    """(question, family) -> (row, column) of its panel; a question that does not fit into a row begins the next."""
    found: dict[str, list[str]] = {}
    for key, s in summaries.items():
        families = found.setdefault(key.partition("/")[0], [])
        if s["entry"].family not in (None, *families):
            families.append(s["entry"].family)
    places: dict[tuple[str, str], tuple[int, int]] = {}
    row = column = 0
    for question, families in sorted(found.items(), key=lambda item: len(item[1])):
        if column + len(families) > columns:
            row, column = row + 1, 0
        for family in families:
            places[question, family] = (row, column)
            column += 1
    return places


def draw(summaries: dict[str, dict[str, Any]], path: Path, columns: int = 4) -> None:
    """The training losses, smoothed; a line is a mean over seeds, a band their range. Plain LoRA is black."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = panels(summaries, columns)
    rows = 1 + max(row for row, _ in places.values())
    figure = Figure(figsize=(4.2 * columns, 3.5 * rows), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flatten():
        axes.set_axis_off()
    for (question, family), (row, column) in places.items():
        chosen = {k: s for k, s in summaries.items() if k.startswith(f"{question}/")}
        chosen = {k: s for k, s in chosen.items() if s["entry"].family in (None, family)}
        grid[row, column].set_axis_on()
        draw_panel(grid[row, column], chosen)
        grid[row, column].set_title(f"{question}: {family}", fontsize=10)
        if not column:
            grid[row, column].set_ylabel("training loss (smoothed)")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def draw_panel(axes: Any, chosen: dict[str, dict[str, Any]]) -> None:
    """One panel's lines."""
    from matplotlib.ticker import LogLocator, NullFormatter

    number, lowest, highest = 0, math.inf, 0.0
    for key, s in chosen.items():
        color = "black" if s["entry"].family is None else f"C{number}"
        number += s["entry"].family is not None
        curves = torch.tensor([smooth(r["losses"]) for r in s["runs"]])
        mean = curves.mean(0)
        axes.plot(mean, color=color, label=key.partition("/")[2], linewidth=1.6)
        if len(curves) > 1:
            axes.fill_between(range(len(mean)), curves.amin(0), curves.amax(0), color=color, alpha=0.15, linewidth=0)
        lowest, highest = min(lowest, float(mean.min())), max(highest, float(mean[0]))
    axes.set_ylim(0.9 * lowest, 1.15 * highest)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set_xlabel("optimiser step")
    axes.legend(fontsize=7.5)


def smooth(losses: list[float], keep: float = 0.9) -> list[float]:
    """An average that forgets, corrected for its start."""
    total, weight, out = 0.0, 0.0, []
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        out.append(total / weight)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="questions, or question/entry to run again")
    parser.add_argument("--data", type=Path, required=True, help="folder with e2e_nlg, banking10, gsm8k")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "procedures.json")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "procedures.png")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = read_json(options.out).get("results", {})
    for name in (n for n in options.names if "/" in n):
        results = {k: r for k, r in results.items() if not k.startswith(f"{name}/")}
    wanted = set(options.names) or set(QUESTIONS)
    questions = {title: make(options.data) for title, make in QUESTIONS.items()}
    begun = time.monotonic()
    with Progress() as progress:
        for title, tries, seeds in PASSES:
            for name, entry in questions[title].entries.items():
                if not wanted & {title, f"{title}/{name}"}:
                    continue
                for place, lr, seed in runs_of(results, f"{title}/{name}", questions[title], entry, tries, seeds):
                    if place in results:
                        continue
                    if time.monotonic() - begun > 60 * options.minutes:
                        break
                    line = progress.add_task(place, total=None)
                    results[place] = run(
                        questions[title], entry, lr, seed, lambda text, at=(line, place): progress.update(
                            at[0], description=f"{at[1]} {text}"
                        ),
                    )  # fmt: skip
                    progress.remove_task(line)
                    write_json(options.out, {"machine": machine(), "results": results})
    summaries = {
        f"{title}/{name}": found
        for title, question in questions.items()
        for name, entry in question.entries.items()
        if (found := summary(results, f"{title}/{name}", question, entry)) is not None
    }
    draw(summaries, options.figure)
    print(table(summaries))


if __name__ == "__main__":
    main()
