"""IA³, selective tuning, ReFT and ladders on real models and real data: the table that it prints.

SmolLM2-135M (bfloat16) answers whether a message of the SMS Spam Collection is spam; MiniLM classifies the messages
with a new head, and tags the named entities of WNUT-2017 (`--wnut17`, as for prompt_table.py). Every method starts from
the same base, sees the same batches and is measured on the same held-out rows. Methods of two stages take both within
the same steps: FISH Mask looks at 32 rows first, diff pruning prunes half-way, FAR primes for a tenth of the steps.
With `--tune` an entry's learning rate is tripled for as long as that lowers the loss on rows which are neither trained
on nor reported. For entities the new head, with thirteen tags to tell apart, learns at a rate of its own,
the same for every method, and the method at half of its entry's. A killed run goes on where it stopped.

    python benchmarks/selective_table.py --task messages --tune
    python benchmarks/selective_table.py --wnut17 ../shared/data/wnut17
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import method_table
import torch
from common import load_smollm2, machine, read_json, saved_bytes, write_json
from prompt_table import Batch, Task, entities, exact, measure, messages
from rich.progress import Progress

import deltatune
from deltatune import get_peft_model, prepare_init
from deltatune.inits.data import needs_data
from deltatune.methods.adamix import consistent_loss
from deltatune.methods.diff_pruning import diff_groups, expected_l0, prune
from deltatune.methods.far import reconfigure

HERE = Path(__file__).parent
#: task -> how many of its steps are taken, with how many rows each, and of its held-out batches
STEPS = {"answers": (30, 2, 2), "messages": (40, 8, 4), "entities": (100, 16, 4)}
#: task type -> the learning rate of its new head, where that is not the method's
HEAD_LR = {"TOKEN_CLS": 1e-2}
#: how many rows that are not trained on choose learning rates
DEVELOPMENT = 192


@dataclass
class Entry:
    """A configuration class, its options and a learning rate; `only` names the tasks it is for."""

    config: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = tuple(STEPS)


MINILM = ("messages", "entities")
ENTRIES: dict[str, Entry] = {
    "Head alone": Entry("FullConfig", 2e-3, {"target_modules": ["classifier"]}, MINILM),
    "LoRA (for comparison)": Entry("LoraConfig", 2e-3, {"target_modules": "all-linear"}),
    "IA³": Entry("IA3Config", 1e-2),
    "LN tuning": Entry("LNTuningConfig", 5e-3),
    "BitFit": Entry("BitFitConfig", 5e-3, {}, MINILM),
    "BitFit, added biases": Entry("BitFitConfig", 5e-3, {"added_modules": r".*(proj)"}, ("answers",)),
    "SHiRA": Entry("ShiraConfig", 2e-3, {"target_modules": "all-linear", "r": 8}),
    "FISH Mask": Entry("FishMaskConfig", 2e-3, {"keep_ratio": 0.005}),
    "Diff pruning": Entry("DiffPruningConfig", 5e-4),
    "FAR": Entry("FarConfig", 5e-4),
    "LoReFT": Entry("LoReftConfig", 5e-3, {"r": 8, "prefix_positions": 4, "suffix_positions": 4}),
    "DiReFT": Entry("DiReftConfig", 5e-3, {"r": 8, "prefix_positions": 4, "suffix_positions": 4}),
    "Ladder (residual)": Entry("LadderConfig", 2e-3, {"reduction_factor": 4, "residual": True}, MINILM),
    "Ladder, 135M (residual)": Entry("LadderConfig", 2e-3, {"reduction_factor": 8, "residual": True}, ("answers",)),
}


def answers() -> Task:
    base, tokenizer = load_smollm2("bfloat16")
    steps, held_out = method_table.batches(tokenizer)
    return Task(lambda: base, "CAUSAL_LM", steps, held_out, "exact answers", exact, tokenizer)


class Stages:
    """What a method of two stages does before training and between its steps."""

    def __init__(self, config: Any, model: Any, lr: float, head_lr: float | None, steps: int) -> None:
        self.config, self.model, self.lr, self.head_lr, self.steps = config, model, lr, head_lr, steps

    def groups(self) -> list[dict[str, Any]]:
        """What trains, at which rate."""
        if getattr(self.config, "stage", "") == "search":
            groups = diff_groups(self.model, lr=self.lr)
        else:
            groups = [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": self.lr}]
        if self.head_lr is None:
            return groups
        head = {id(p): p for name, p in self.model.named_parameters() if p.requires_grad and "classifier" in name}
        groups = [{**g, "params": [p for p in g["params"] if id(p) not in head]} for g in groups]
        return [*(g for g in groups if g["params"]), {"params": list(head.values()), "lr": self.head_lr}]

    def loss(self, batch: Batch) -> torch.Tensor:
        if type(self.config).__name__ == "AdaMixConfig":
            return consistent_loss(self.model, batch)
        loss: torch.Tensor = self.model(**batch).loss
        searching = getattr(self.config, "stage", "") == "search"
        return loss + 1.25e-7 * expected_l0(self.model) if searching else loss

    def turn(self, k: int) -> bool:
        """Goes to the next stage before step `k`; True if the parameters are new."""
        kind = type(self.config).__name__
        if kind == "DiffPruningConfig" and k == self.steps // 2:
            return bool(prune(self.model, 0.005))
        return kind == "FarConfig" and k == self.steps // 10 and bool(reconfigure(self.model, 0.1))


def run(name: str, entry: Entry, task: Task, progress: Progress) -> dict[str, Any]:
    """Trains one method from the untouched base and measures it before and after."""
    base = task.make()
    torch.manual_seed(0)
    head = {} if entry.config == "FullConfig" else {"task_type": task.task_type}  # that one names the head itself
    config = getattr(deltatune, entry.config)(**entry.options, **head)
    if needs_data(config):
        rows = len(task.steps[0]["labels"])
        prepare_init(base, config, task.steps[: 32 // rows], progress=False)
    model = get_peft_model(base, config)
    before = measure(model, task)
    count = len(task.steps)
    stages = Stages(config, model, entry.lr, HEAD_LR.get(task.task_type), count)
    line, seconds, kept, groups = progress.add_task(name, total=count), [], 0, stages.groups()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [g["lr"] for g in groups]
    lr = rates[0]
    model.train()
    for k, batch in enumerate(task.steps):
        if stages.turn(k):
            optimizer = torch.optim.AdamW(stages.groups(), weight_decay=0.0)
            rates = [g["lr"] for g in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (k + 1) / 6) * (1 - k / count)
        start = time.perf_counter()
        if k == count - 1:  # as the last stage is
            with saved_bytes(model) as counted:
                loss = stages.loss(batch)
                kept = counted()
        else:
            loss = stages.loss(batch)
        loss.backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        progress.update(line, advance=1, description=f"{name} loss {loss.item():.3f}")
    trainable, total = model.get_nb_trainable_parameters()
    after = measure(model, task)
    model.unload()
    for p in base.parameters():
        p.requires_grad_(False)
    return {
        "model": type(base).__name__, "metric": task.metric, "config": entry.config, "lr": lr, "steps": count,
        "trainable": trainable, "share": trainable / total, "loss_before": before[0], "loss_after": after[0],
        "before": before[1], "after": after[1], "seconds": statistics.median(seconds), "saved_mb": kept / 2**20,
    }  # fmt: skip


def development(batches: list[Batch], trained: list[Batch]) -> list[Batch]:
    """The rows of `batches` that no training step has, each once."""
    seen = {row for batch in trained for row in texts(batch)}
    found: list[Batch] = []
    for batch in batches:
        new = [i for i, row in enumerate(texts(batch)) if not (row in seen or seen.add(row))]
        new = new[: DEVELOPMENT - sum(len(b["labels"]) for b in found)]
        if new:
            found.append({k: v[new] for k, v in batch.items()})
    return found


def texts(batch: Batch) -> list[tuple[int, ...]]:
    """The tokens of every row."""
    pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in pairs]


def search(name: str, entry: Entry, task: Task, progress: Progress) -> tuple[Entry, dict[float, float]]:
    """The entry with the rate that `task`, whose held-out batches are not reported, takes best; rate -> loss."""
    tried: dict[float, float] = {}
    while True:
        tried[entry.lr] = run(f"{name}, lr {entry.lr:g}", entry, task, progress)["loss_after"]
        best = min(tried, key=lambda rate: tried[rate])
        if best != entry.lr:
            return replace(entry, lr=best), tried
        entry = replace(entry, lr=float(f"{3 * entry.lr:.2g}"))


def table(results: dict[str, Any], entries: dict[str, Entry]) -> str:
    """The results as Markdown, task by task and in the order of the entries."""
    lines = [
        "| method | data | trained parameters | loss before | loss after | metric | before | after | s per step | "
        "MB saved for backward | lr |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for task in STEPS:
        for name in entries:
            r = results.get(f"{task}: {name}")
            if r is not None:
                lines.append(
                    f"| {name} | {task} | {r['trainable']:,} ({100 * r['share']:.3f} %) | {r['loss_before']:.3f} | "
                    f"{r['loss_after']:.3f} | {r['metric']} | {r['before']:.3f} | {r['after']:.3f} | "
                    f"{r['seconds']:.2f} | {r['saved_mb']:.1f} | {r['lr']:g} |"
                )
    return "\n".join(lines)


def main(entries: dict[str, Entry] = ENTRIES, text: str = __doc__, out: str = "selective_table.json") -> None:
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods to measure again")
    parser.add_argument("--task", choices=STEPS, action="append", help="only this one")
    parser.add_argument("--wnut17", type=Path, help="the folder of WNUT-2017; without it entities are left out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / out)
    parser.add_argument("--tune", action="store_true", help="search each learning rate")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    makers: dict[str, Callable[[], Task]] = {"answers": answers, "messages": messages}
    if options.wnut17 is not None:
        makers["entities"] = lambda: entities(options.wnut17)
    unknown = [n for n in options.names if n not in entries]
    if unknown:
        raise SystemExit(f"no entry {unknown[0]!r}; there are: {', '.join(entries)}")
    with Progress() as progress:
        for task_name, make in makers.items():
            if options.task and task_name not in options.task:
                continue
            done = read_json(options.out).get("results", {})
            wanted = [n for n in options.names or entries if task_name in entries[n].only]
            missing = "tried" if options.tune else "after"
            todo = [n for n in wanted if options.names or not done.get(f"{task_name}: {n}", {}).get(missing)]
            if not todo:
                continue
            task, (count, rows, held_out) = make(), STEPS[task_name]
            steps = [{k: v[:rows] for k, v in batch.items()} for batch in task.steps[:count]]
            choice = replace(task, steps=steps, held_out=development(task.steps, steps))
            task = replace(task, steps=steps, held_out=task.held_out[:held_out])
            for name in todo:
                entry, tried = entries[name], {}
                if task.task_type in HEAD_LR:
                    entry = replace(entry, lr=entry.lr / 2)
                if options.tune:
                    entry, tried = search(name, entry, choice, progress)
                found = run(name, entry, task, progress) | {"tried": tried}
                results = {**read_json(options.out).get("results", {}), f"{task_name}: {name}": found}
                write_json(options.out, {"machine": machine(), "results": results})
    print(table(read_json(options.out).get("results", {}), entries))


if __name__ == "__main__":
    main()
