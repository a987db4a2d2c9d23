"""Soft prompts on real models and real data, against the frozen model: the table in docs/results.md.

SmolLM2-135M answers whether a message of the SMS Spam Collection is spam; MiniLM classifies the same messages with a
new head, and tags the named entities of WNUT-2017 (`--wnut17`, a folder with train.jsonl and test.jsonl of `tokens` and
`tags`). The frozen model is SmolLM2 as it is, and MiniLM with only its new head trained. A killed run goes on where it
stopped.

    python benchmarks/prompt_table.py --wnut17 ../shared/data/wnut17
    python benchmarks/prompt_table.py "Prefix tuning"      # this one again
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, read_json, write_json
from rich.progress import Progress
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import deltatune
from deltatune import get_peft_model
from deltatune.train.data import Collator, DataSpec, encode, load_examples
from deltatune.train.datasets_builtin import builtin_dataset
from deltatune.train.models import load_tokenizer, resolve_model

HERE = Path(__file__).parent
TEXT = "Decide whether the text message is spam or ham. Answer with one word."
Batch = dict[str, Tensor]


@dataclass
class Entry:
    """One line: the data it learns, a configuration class, its options and a learning rate."""

    data: str
    config: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {
    "Prompt tuning": Entry(
        "answers", "PromptTuningConfig", 1e-2, {"num_virtual_tokens": 20, "prompt_tuning_init": "TEXT"}
    ),
    "Prefix tuning": Entry("answers", "PrefixTuningConfig", 1e-2, {"num_virtual_tokens": 10}),
    "Head alone (frozen)": Entry("messages", "FullConfig", 2e-3, {"target_modules": ["classifier"]}),
    "P-tuning": Entry("messages", "PromptEncoderConfig", 2e-3, {"num_virtual_tokens": 20, "encoder_hidden_size": 128}),
    "P-tuning v2": Entry("messages", "PTuningV2Config", 1e-2, {"num_virtual_tokens": 20}),
    "Head alone (frozen), entities": Entry("entities", "FullConfig", 1e-2, {"target_modules": ["classifier"]}),
    "P-tuning, entities": Entry(
        "entities", "PromptEncoderConfig", 1e-2, {"num_virtual_tokens": 20, "encoder_hidden_size": 128}
    ),
    "P-tuning v2, entities": Entry("entities", "PTuningV2Config", 1e-2, {"num_virtual_tokens": 20}),
}


@dataclass
class Task:
    """A model's maker, its training steps, its held-out batches, and what is measured on them."""

    make: Callable[[], Any]
    task_type: str
    steps: list[Batch]
    held_out: list[Batch]
    metric: str
    score: Callable[[list[tuple[Tensor, Tensor]]], float]
    tokenizer: Any = None


def steps_of(rows: Sequence[Any], collate: Callable[[list[Any]], Batch], count: int, size: int) -> list[Batch]:
    """`count` batches in a fixed random order, going round the rows as often as needed."""
    order: list[int] = []
    generator = torch.Generator().manual_seed(0)
    while len(order) < count * size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [collate([rows[i] for i in order[k : k + size]]) for k in range(0, count * size, size)]


def exact(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Share of rows of which every trained token is the most likely one."""
    right = total = 0
    for logits, labels in pairs:
        wanted, given = labels[:, 1:], logits.argmax(-1)[:, :-1]
        right += int(((given == wanted) | (wanted == -100)).all(1).sum())
        total += len(labels)
    return right / total


def accuracy(pairs: list[tuple[Tensor, Tensor]]) -> float:
    return statistics.fmean(float(a) for logits, labels in pairs for a in (logits.argmax(-1) == labels))


def entity_f1(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Micro F1 over words inside entities (tag 0 is outside)."""
    hit = said = there = 0
    for logits, labels in pairs:
        given, real = logits.argmax(-1), labels != -100
        hit += int(((given == labels) & (labels > 0)).sum())
        said += int(((given > 0) & real).sum())
        there += int((labels > 0).sum())
    return 2 * hit / max(1, said + there)


def answers() -> Task:
    base, tokenizer = load_smollm2()
    spec = DataSpec(path="sms_spam", max_length=384, seed=0)
    examples = load_examples(spec)
    collate = Collator(tokenizer)
    train = encode(examples.train, tokenizer, spec)
    held_out = encode(examples.eval[:64], tokenizer, spec)
    batches = [collate(held_out[k : k + 16]) for k in range(0, len(held_out), 16)]
    steps = steps_of(train, collate, 60, 4)
    return Task(lambda: base, "CAUSAL_LM", steps, batches, "exact answers", exact, tokenizer)


def minilm(kind: Any, labels: int) -> Callable[[], Any]:
    path = resolve_model("all-minilm-l6-v2").path

    def make() -> Any:
        torch.manual_seed(0)  # the new head is the same for every method
        return kind.from_pretrained(path, num_labels=labels)

    return make


def messages() -> Task:
    tokenizer = load_tokenizer(resolve_model("all-minilm-l6-v2"))
    data = builtin_dataset("sms_spam")
    names = sorted({str(r["label"]) for r in data.train})

    def collate(rows: list[Any]) -> Batch:
        texts = [str(r["text"]) for r in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
        return {**batch, "labels": torch.tensor([names.index(str(r["label"])) for r in rows])}

    held_out = [collate(data.test[k : k + 50]) for k in range(0, len(data.test), 50)]
    make = minilm(AutoModelForSequenceClassification, len(names))
    return Task(make, "SEQ_CLS", steps_of(data.train, collate, 90, 16), held_out, "accuracy", accuracy)


def entities(folder: Path) -> Task:
    tokenizer = load_tokenizer(resolve_model("all-minilm-l6-v2"))
    rows = {s: [json.loads(line) for line in (folder / f"{s}.jsonl").open()] for s in ("train", "test")}
    tags = ["O", *sorted({t for r in rows["train"] for t in r["tags"]} - {"O"})]

    def collate(some: list[Any]) -> Batch:
        words = [r["tokens"] for r in some]
        batch = tokenizer(
            words, is_split_into_words=True, padding=True, truncation=True, max_length=96, return_tensors="pt"
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for i, row in enumerate(some):
            seen: set[int] = set()
            for j, word in enumerate(batch.word_ids(i)):
                if word is not None and word not in seen:  # a word's first token carries its tag
                    labels[i, j] = tags.index(row["tags"][word])
                    seen.add(word)
        return {**batch, "labels": labels}

    test = rows["test"][:400]
    held_out = [collate(test[k : k + 50]) for k in range(0, len(test), 50)]
    make = minilm(AutoModelForTokenClassification, len(tags))
    return Task(make, "TOKEN_CLS", steps_of(rows["train"], collate, 150, 16), held_out, "entity F1", entity_f1)


@torch.no_grad()
def measure(model: Any, task: Task) -> tuple[float, float]:
    """(loss, metric) on the held-out batches."""
    model.eval()
    outs = [(model(**batch), batch["labels"]) for batch in task.held_out]
    return statistics.fmean(float(o.loss) for o, _ in outs), task.score([(o.logits, y) for o, y in outs])


def run(name: str, entry: Entry, task: Task, progress: Progress) -> dict[str, Any]:
    """Trains one method from the untouched base and measures it before and after."""
    base = task.make()
    frozen = measure(base, task)
    torch.manual_seed(0)
    options = dict(entry.options)
    if options.get("prompt_tuning_init") == "TEXT":
        options |= {"prompt_tuning_init_text": TEXT, "tokenizer_name_or_path": task.tokenizer.name_or_path}
    if entry.config != "FullConfig":  # that one names the head itself
        options["task_type"] = task.task_type
    model = get_peft_model(base, getattr(deltatune, entry.config)(**options))
    if entry.config == "PrefixTuningConfig":
        text = " ".join([TEXT] * 2)
        deltatune.initialize_kv_prefix_from_text(model, task.tokenizer, text=text, use_chat_template=False)
    params = [p for p in model.parameters() if p.requires_grad]
    count = len(task.steps)
    optimizer = torch.optim.AdamW(params, lr=entry.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 6) * (1 - k / count))
    model.train()
    seconds = []
    line = progress.add_task(name, total=count)
    for batch in task.steps:
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        progress.update(line, advance=1, description=f"{name} loss {loss.item():.3f}")
    after = measure(model, task)
    trainable, total = model.get_nb_trainable_parameters()
    model.unload()
    return {
        "model": type(base).__name__, "task": task.task_type, "metric": task.metric, "config": entry.config,
        "lr": entry.lr, "steps": count, "trainable": trainable, "share": trainable / total,
        "loss_before": frozen[0], "loss_after": after[0], "before": frozen[1], "after": after[1],
        "seconds": statistics.median(seconds),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, in the order of `ENTRIES`."""
    lines = [
        "| method | model | trained parameters | steps | loss before | loss after | metric | before | after | s/step |",
        "|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for name in (n for n in ENTRIES if n in results):
        r = results[name]
        lines.append(
            f"| {name} | {r['model']} | {r['trainable']:,} ({100 * r['share']:.3f} %) | {r['steps']} | "
            f"{r['loss_before']:.3f} | {r['loss_after']:.3f} | {r['metric']} | {r['before']:.3f} | {r['after']:.3f} | "
            f"{r['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods to measure again")
    parser.add_argument("--wnut17", type=Path, help="the folder of WNUT-2017; without it entities are left out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prompt_table.json")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = read_json(options.out).get("results", {})
    todo = options.names or [n for n in ENTRIES if n not in results]
    unknown = [n for n in todo if n not in ENTRIES]
    if unknown:
        raise SystemExit(f"no entry {unknown[0]!r}; there are: {', '.join(ENTRIES)}")
    makers: dict[str, Callable[[], Task]] = {"answers": answers, "messages": messages}
    if options.wnut17 is not None:
        makers["entities"] = lambda: entities(options.wnut17)
    tasks: dict[str, Task] = {}
    with Progress() as progress:
        for name in todo:
            entry = ENTRIES[name]
            if entry.data not in makers:
                continue
            if entry.data not in tasks:
                tasks = {entry.data: makers[entry.data]()}  # one model in memory at a time
            results[name] = run(name, entry, tasks[entry.data], progress)
            write_json(options.out, {**read_json(options.out), "machine": machine(), "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
