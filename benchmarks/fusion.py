"""AdapterFusion of three adapters trained on three real tasks, against their average, on MiniLM.

Stage one trains a Pfeiffer adapter and a head on each of three tasks: bank questions (ten intents), assistant requests
(the first thirty intents of CLINC150) and spam. Stage two takes few rows of the first task: the three adapters are
frozen, and a new head trains with (a) the average of the adapters, (b) their fusion, (c) the task's own adapter alone,
(d) no adapter.

    python benchmarks/fusion.py --bank ../shared/data/banking10 --requests ../shared/data/clinc150_small
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, write_json
from prompt_table import minilm, steps_of
from transformers import AutoModelForSequenceClassification

from deltatune import Average, Fuse, FusionConfig, PfeifferConfig, get_peft_model
from deltatune.schedules import attach
from deltatune.train.datasets_builtin import builtin_dataset
from deltatune.train.models import load_tokenizer, resolve_model

HERE = Path(__file__).parent
Rows = list[tuple[str, int]]
NAMES = ("bank", "requests", "spam")


def rows_of(folder: Path, split: str, labels: int) -> Rows:
    lines = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
    return [(r["text"], r["label"]) for r in lines if r["label"] < labels]


def spam() -> Rows:
    data = builtin_dataset("sms_spam")
    return [(str(r["text"]), int(str(r["label"]) == "spam")) for r in data.train]


def collator(tokenizer: Any) -> Callable[[list[Any]], dict[str, torch.Tensor]]:
    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = tokenizer([t for t, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return {**batch, "labels": torch.tensor([y for _, y in rows])}

    return collate


def train(model: Any, batches: list[dict[str, torch.Tensor]], lr: float, adapter: str | None = None) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    attached = attach(model, optimizer, total_steps=len(batches), adapter_name=adapter) if adapter else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / len(batches))
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if attached is not None:
        attached.finish()


@torch.no_grad()
def accuracy(model: Any, batches: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    hits = [h for b in batches for h in (model(**b).logits.argmax(-1) == b["labels"]).tolist()]
    return statistics.fmean(hits)


def head(model: Any) -> Any:
    """The base's own head trains beside whatever else does."""
    for p in model.get_base_model().classifier.parameters():
        p.requires_grad_(True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, required=True)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=60, help="rows of the first task in stage two")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fusion.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(resolve_model("all-minilm-l6-v2"))
    collate = collator(tokenizer)
    tasks = {
        "bank": (rows_of(args.bank, "train", 10), 10),
        "requests": (rows_of(args.requests, "train", 30), 30),
        "spam": (spam(), 2),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (rows, labels) in tasks.items():
            model = head(get_peft_model(minilm(AutoModelForSequenceClassification, labels)(), PfeifferConfig()))
            train(model, steps_of(rows, collate, args.steps, 16), 2e-3)
            model.save_pretrained(f"{folder}/{name}")
            print(
                f"{name}: {len(rows)} rows, accuracy on them {accuracy(model, [collate(rows[:200])]):.3f}", flush=True
            )
        test = rows_of(args.bank, "test", 10)
        held_out = [collate(test[k : k + 50]) for k in range(0, len(test), 50)]
        results: dict[str, list[float]] = {"average": [], "fusion": [], "own adapter": [], "no adapter": []}
        for seed in range(args.seeds):
            order = torch.randperm(len(tasks["bank"][0]), generator=torch.Generator().manual_seed(seed))
            few = [tasks["bank"][0][i] for i in order[: args.rows].tolist()]
            batches = steps_of(few, collate, args.steps, 16)
            for way, found in results.items():
                torch.manual_seed(seed)
                model = stage_two(way, folder)
                train(model, batches, 1e-3, ",".join(NAMES) if way == "fusion" else None)
                found.append(accuracy(model, held_out))
                print(f"seed {seed}, {way}: {found[-1]:.3f}", flush=True)
    table = {way: {"mean": statistics.fmean(a), "all": a} for way, a in results.items()}
    write_json(args.out, {"machine": machine(), "rows": args.rows, "steps": args.steps, "results": table})


def stage_two(way: str, folder: str) -> Any:
    """The three frozen adapters under one of the four ways, with a new head."""
    from deltatune import PeftModel

    base = minilm(AutoModelForSequenceClassification, 10)()
    model = PeftModel.from_pretrained(base, f"{folder}/bank", adapter_name="bank")
    for name in NAMES[1:]:
        model.load_adapter(f"{folder}/{name}", name)
    if way == "average":
        model.set_adapter(Average(*NAMES))
    elif way == "own adapter":
        model.set_adapter("bank")
    elif way == "fusion":
        model.add_adapter(",".join(NAMES), FusionConfig(adapters=list(NAMES)))
        model.set_adapter(Fuse(*NAMES))
    else:
        model.base_model.disable_adapter_layers()
    return head(model)


if __name__ == "__main__":
    main()
