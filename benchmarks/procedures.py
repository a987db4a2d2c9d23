"""Training procedures against plain LoRA, at the same steps: the table and the loss curves in docs/results.md.

Three questions, each with its own model and data:

    language   SmolLM2-135M learns E2E (restaurant data to sentences), 24 steps of 2 rows
    classes    MiniLM learns the ten intents of Banking10 (a part of Banking77), 100 steps of 8 rows, three seeds
    scratch    a Llama of 0.6 million parameters is trained from nothing on maths problems (GSM8K), three seeds

Every entry of a question sees the same batches. Of the learning rates that an entry lists, the first seed tries all and
the one with the lowest held-out loss goes on. A killed run goes on where it stopped.

    python benchmarks/procedures.py --data ../shared/data
    python benchmarks/procedures.py --data ../shared/data classes/LISA       # this one again
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, read_json, write_json
from rich.progress import Progress
from torch import Tensor

from deltatune import get_peft_config, get_peft_model, prepare_init
from deltatune.inits.data import needs_data
from deltatune.schedules import attach, find_procedure, mark
from deltatune.train.models import load_tokenizer, resolve_model

HERE = Path(__file__).parent
Batch = dict[str, Tensor]
#: the learning rate of every run warms up over this share of the steps and then falls to zero in a line
WARM = 0.05


@dataclass
class Entry:
    """One line: a method's configuration, a procedure's options, and the learning rates to try."""

    method: dict[str, Any] | None
    lrs: tuple[float, ...]
    procedure: dict[str, Any] = field(default_factory=dict)


@dataclass
class Question:
    """A fresh model, its training batches for a seed, and what it is measured on."""

    model: Callable[[int], Any]
    steps: Callable[[int], list[Batch]]
    held_out: list[Batch]
    task: str
    seeds: int
    entries: dict[str, Entry]


def batched(rows: list[Any], collate: Callable[[list[Any]], Batch], count: int, size: int, seed: int) -> list[Batch]:
    """`count` batches in a random order of the seed's, going round the rows as often as needed."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < count * size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [collate([rows[i] for i in order[k : k + size]]) for k in range(0, count * size, size)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


# ---------------------------------------------------------------------- the questions
LINEAR = {"target_modules": "all-linear"}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
ADALORA = {"peft_type": "ADALORA", "init_r": 12, "target_r": 8, "lora_alpha": 32, "orth_reg_weight": 0.1}
WHOLE = {"peft_type": "FULL", "in_place": True}


def smollm2(folder: Path, entries: dict[str, Entry]) -> Question:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m-instruct"))
    rows = read_rows(folder / "e2e_nlg" / "train.jsonl")
    test = read_rows(folder / "e2e_nlg" / "val.jsonl")[:36]

    def collate(some: list[dict[str, Any]]) -> Batch:
        prompts = [tokenizer(f"{r['mr']}\n")["input_ids"] for r in some]
        refs = [r["ref"] if "ref" in r else r["refs"][0] for r in some]
        answers = [[*tokenizer(ref)["input_ids"], tokenizer.eos_token_id] for ref in refs]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids, labels = torch.full((len(some), width), tokenizer.eos_token_id), torch.full((len(some), width), -100)
        mask = torch.zeros_like(ids)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
            mask[i, : len(p) + len(a)] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    return Question(
        lambda seed: load_smollm2()[0],
        lambda seed: batched(rows, collate, 24, 2, seed),
        [collate(test[k : k + 12]) for k in range(0, len(test), 12)],
        "CAUSAL_LM",
        1,
        entries,
    )


def language(folder: Path) -> Question:
    entries = {
        "LoRA": Entry({**LORA, **LINEAR}, (2e-3,)),
        "LoRA+": Entry({**LORA, **LINEAR}, (5e-4,), {"name": "lora_plus", "ratio": 16}),
        "AdaLoRA": Entry({**ADALORA, **LINEAR, "tinit": 3, "tfinal": 8, "deltaT": 1}, (5e-3,)),
        "ReLoRA": Entry(
            {**LORA, **LINEAR},
            (2e-3,),
            {"name": "relora", "cycle": 8, "restart_warmup": 2, "train_rest": False},
        ),
        "LISA": Entry(WHOLE, (5e-5,), {"name": "lisa", "layers": 2, "every": 3}),
        "Full, then LoRA": Entry(
            {**LORA, **LINEAR}, (2e-3,), {"name": "full_then_lora", "share": 0.2, "full_rate": 0.01, "warmup": 2}
        ),
    }
    return smollm2(folder, entries)


def classes(folder: Path) -> Question:
    from transformers import AutoModelForSequenceClassification

    path = resolve_model("all-minilm-l6-v2").path
    tokenizer = load_tokenizer(resolve_model("all-minilm-l6-v2"))
    rows = read_rows(folder / "banking10" / "train.jsonl")
    test = read_rows(folder / "banking10" / "test.jsonl")

    def collate(some: list[dict[str, Any]]) -> Batch:
        batch = tokenizer([r["text"] for r in some], padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**batch, "labels": torch.tensor([r["label"] for r in some])}

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=10)

    pair = {**LORA, "target_modules": ["query", "value"]}
    entries = {
        "LoRA": Entry(pair, (3e-3, 1e-2, 3e-2)),
        "LoRA, PiSSA init": Entry({**pair, "init_lora_weights": "pissa"}, (3e-3, 1e-2, 3e-2)),
        "LoRA, LoRA-GA init": Entry({**pair, "init_lora_weights": "lora_ga"}, (3e-3, 1e-2, 3e-2)),
        "LoRA+, ratio 16": Entry(pair, (1e-3, 3e-3), {"name": "lora_plus", "ratio": 16}),
        "LoRA+, ratio 4": Entry(pair, (3e-3, 1e-2), {"name": "lora_plus", "ratio": 4}),
        "AdaLoRA": Entry(
            {**ADALORA, "target_modules": ["query", "value"], "tinit": 10, "tfinal": 30, "deltaT": 5}, (1e-2, 3e-2)
        ),
        "ReLoRA": Entry(pair, (1e-2, 3e-2), {"name": "relora", "cycle": 30, "restart_warmup": 5, "train_rest": False}),
        "LISA": Entry(WHOLE, (3e-4, 1e-3), {"name": "lisa", "layers": 2, "every": 5}),
        "LoRA, LISA's memory": Entry({**LORA, **LINEAR, "r": 256, "lora_alpha": 512}, (1e-3, 3e-3)),
        "Full, then LoRA": Entry(
            pair, (1e-2, 3e-2), {"name": "full_then_lora", "share": 0.2, "full_rate": 0.1, "warmup": 5}
        ),
    }
    held_out = [collate(test[k : k + 64]) for k in range(0, len(test), 64)]
    return Question(model, lambda seed: batched(rows, collate, 100, 8, seed), held_out, "SEQ_CLS", 3, entries)


def scratch(folder: Path) -> Question:
    from transformers import LlamaConfig, LlamaForCausalLM

    def text(name: str) -> bytes:
        rows = read_rows(folder / "gsm8k" / f"{name}.jsonl")
        return "\n\n".join(f"{r['question']}\n{r['answer']}" for r in rows).encode()

    def windows(data: bytes, width: int = 96) -> list[Tensor]:
        ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        return list(ids[: len(ids) // width * width].view(-1, width))

    def collate(some: list[Tensor]) -> Batch:
        ids = torch.stack(some)
        return {"input_ids": ids, "labels": ids}

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, **sizes))

    pair = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    relora = {"name": "relora", "cycle": 60, "restart_warmup": 10}
    # for one low-rank run that trains the rest in full as ReLoRA does: no restart before the end
    once = {"name": "relora", "cycle": 359, "restart_warmup": 10, "reset": "zero"}
    entries = {
        "all weights": Entry(None, (3e-3,)),
        "one LoRA": Entry(pair, (3e-3, 6e-3), once),
        "ReLoRA": Entry(pair, (3e-3, 6e-3), relora),
        "one LoRA, warm start": Entry(pair, (6e-3,), {**once, "warm_start": 90, "cycle": 269}),
        "ReLoRA, warm start": Entry(pair, (6e-3,), {**relora, "warm_start": 90, "cycle": 45}),
    }
    rows, test = windows(text("train_a")), windows(text("val"))[:320]
    held_out = [collate(test[k : k + 64]) for k in range(0, len(test), 64)]
    return Question(model, lambda seed: batched(rows, collate, 360, 12, seed), held_out, "CAUSAL_LM", 3, entries)


QUESTIONS: dict[str, Callable[[Path], Question]] = {
    "classes": classes,
    "scratch": scratch,
    "language": language,
}


# ---------------------------------------------------------------------- one run
@torch.no_grad()
def measure(model: Any, question: Question) -> tuple[float, float]:
    """(loss, accuracy) on the held-out batches; accuracy of classes, or of the trained tokens."""
    model.eval()
    losses, right, count = [], 0, 0
    for batch in question.held_out:
        out = model(**batch)
        labels, logits = batch["labels"], out.logits
        if question.task == "CAUSAL_LM":
            labels, logits = labels[:, 1:], logits[:, :-1]
        counted = labels != -100
        right += int(((logits.argmax(-1) == labels) & counted).sum())
        count += int(counted.sum())
        losses.append(float(out.loss))
    model.train()
    return statistics.fmean(losses), right / count


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's state."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def training_bytes(model: Any, optimizer: torch.optim.Optimizer, added: int) -> int:
    """What training holds beyond the base: an adapter's weights, gradients, the optimiser's state."""
    grads = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    return added + grads + state_bytes(optimizer)


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
    for batch in steps:
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], 1.0)
        optimizer.step()
        peak = max(peak, training_bytes(model, optimizer, added))
        scheduler.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        seconds.append(time.perf_counter() - start)
        told(f"step {len(losses)}/{n} loss {loss.item():.3f}")
    held, accuracy = measure(model, question)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report = schedule.finish() if schedule is not None else {}
    return {
        "loss": held if math.isfinite(held) else None, "accuracy": accuracy, "losses": losses, "trained": trained,
        "seconds": statistics.median(seconds), "training_mb": peak / 2**20, "report": report,
    }  # fmt: skip


# ---------------------------------------------------------------------- all runs
def best_lr(results: dict[str, Any], key: str, entry: Entry) -> float:
    """The learning rate whose first seed has the lowest held-out loss."""
    return min(entry.lrs, key=lambda lr: results[f"{key}/{lr:g}/0"]["loss"] or math.inf)


def runs_of(results: dict[str, Any], key: str, question: Question, entry: Entry) -> Iterator[tuple[str, float, int]]:
    """(key, learning rate, seed) of what is to be run, the tries of the first seed before the others."""
    for lr in entry.lrs:
        yield f"{key}/{lr:g}/0", lr, 0
    for seed in range(1, question.seeds):
        lr = best_lr(results, key, entry)
        yield f"{key}/{lr:g}/{seed}", lr, seed


def summary(results: dict[str, Any], key: str, question: Question, entry: Entry) -> dict[str, Any] | None:
    """An entry over its seeds, at its best learning rate; None while runs are missing."""
    if any(f"{key}/{lr:g}/0" not in results for lr in entry.lrs):
        return None
    lr = best_lr(results, key, entry)
    found = [results.get(f"{key}/{lr:g}/{seed}") for seed in range(question.seeds)]
    if any(r is None for r in found):
        return None
    runs = [r for r in found if r is not None]
    return {"lr": lr, "runs": runs, "loss": [r["loss"] for r in runs], "accuracy": [r["accuracy"] for r in runs]}


def spread(values: list[float]) -> str:
    """A mean with the smallest and the largest value."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


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
            f"| {question} | {name} | {run['trained']:,} | {s['lr']:g} | {len(s['runs'])} | {spread(early)} | "
            f"{spread(s['loss'])} | {spread(s['accuracy'])} | {run['training_mb']:.0f} |"
        )
    return "\n".join(lines)


def early_loss(losses: list[float]) -> float:
    """The mean training loss over the steps between 15 % and 25 % of the run."""
    n = len(losses)
    return statistics.fmean(losses[int(0.15 * n) : int(0.25 * n)])


def draw(summaries: dict[str, dict[str, Any]], path: Path) -> None:
    """The training losses, smoothed; a line is a mean over seeds, a band their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(key.partition("/")[0] for key in summaries))
    figure = Figure(figsize=(5.2 * len(names), 4.6), layout="constrained")
    for axes, question in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, (key, s) in enumerate((k, s) for k, s in summaries.items() if k.startswith(f"{question}/")):
            curves = torch.tensor([smooth(r["losses"]) for r in s["runs"]])
            x, color = torch.arange(curves.shape[1]), f"C{number % 10}"
            dashes = "-" if number < 10 else "--"
            axes.plot(x, curves.mean(0), dashes, color=color, label=key.partition("/")[2], linewidth=1.4)
            if len(curves) > 1:
                axes.fill_between(x, curves.amin(0), curves.amax(0), color=color, alpha=0.15, linewidth=0)
        axes.set_title(question)
        axes.set_xlabel("optimiser step")
        axes.set_yscale("log")
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("training loss (smoothed)")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


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
    parser.add_argument("--data", type=Path, required=True, help="folder with e2e_nlg, banking10 and gsm8k")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "procedures.json")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "procedures.png")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing new after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = read_json(options.out).get("results", {})
    for name in (n for n in options.names if "/" in n):
        results = {k: r for k, r in results.items() if not k.startswith(f"{name}/")}
    wanted = {name.partition("/")[0] for name in options.names} or set(QUESTIONS)
    begun = time.monotonic()
    summaries: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        for title, make in QUESTIONS.items():
            question = make(options.data)
            for name, entry in question.entries.items():
                key = f"{title}/{name}"
                for place, lr, seed in runs_of(results, key, question, entry) if title in wanted else ():
                    if place in results or time.monotonic() - begun > 60 * options.minutes:
                        if place not in results:
                            break
                        continue
                    line = progress.add_task(place, total=None)
                    results[place] = run(
                        question, entry, lr, seed, lambda text, at=(line, place): progress.update(
                            at[0], description=f"{at[1]} {text}"
                        ),
                    )  # fmt: skip
                    progress.remove_task(line)
                    write_json(options.out, {"machine": machine(), "results": results})
                found = summary(results, key, question, entry)
                if found is not None:
                    summaries[key] = found
    draw(summaries, options.figure)
    print(table(summaries))


if __name__ == "__main__":
    main()
