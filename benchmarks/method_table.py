"""Every method that adapts weights, on a real model and real data: the table in docs/results.md.

60 steps of 2 messages of the SMS Spam Collection on SmolLM2-135M in bfloat16, adapters in float32. Each method
starts from the same base, sees the same batches, and is measured on the same held-out messages. A killed run goes on
where it stopped.

    python benchmarks/method_table.py            # all that are missing, then the table
    python benchmarks/method_table.py LORA DORA  # these again
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, read_json, saved_bytes, write_json
from rich.progress import Progress

import deltatune
from deltatune import get_peft_model, prepare_init
from deltatune.train.data import Collator, DataSpec, encode, load_examples

HERE = Path(__file__).parent
STEPS, ROWS, EVAL = 60, 2, 32
#: longer messages are left out, so that 18 methods take minutes and not hours on two cores
LONGEST = 48
#: q, k, v, o and the feed-forward layers, so that every method has the same places
ALL = {"target_modules": "all-linear"}


@dataclass
class Entry:
    """One line of the table: a configuration class, its options and a learning rate."""

    config: str
    lr: float = 2e-3
    options: dict[str, Any] = field(default_factory=lambda: dict(ALL))


ENTRIES: dict[str, Entry] = {
    "LoRA": Entry("LoraConfig"),
    "rsLoRA": Entry("LoraConfig", options={**ALL, "use_rslora": True}),
    "DoRA": Entry("LoraConfig", options={**ALL, "use_dora": True}),
    "LoRA, PiSSA init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "pissa"}, lr=5e-4),
    "LoRA, OLoRA init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "olora"}, lr=2e-4),
    "LoRA, orthogonal init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "orthogonal"}),
    "LoRA, LoftQ init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "loftq"}, lr=1e-3),
    "LoRA, EVA init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "eva"}),
    "LoRA, CorDA init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "corda"}, lr=5e-4),
    "LoRA, LoRA-GA init": Entry("LoraConfig", options={**ALL, "init_lora_weights": "lora_ga"}, lr=5e-4),
    "LoRA-FA": Entry("LoraFAConfig"),
    "LoRA Dropout": Entry("LoraDropoutConfig"),
    "LoRA-drop (stage 1)": Entry("LoraDropConfig"),
    "AdaLoRA": Entry("AdaLoraConfig", lr=5e-3, options={**ALL, "total_step": STEPS}),
    "VeRA": Entry("VeraConfig", lr=2e-2),
    "LoHa": Entry("LoHaConfig"),
    "LoKr": Entry("LoKrConfig", lr=5e-3),
    "KronA": Entry("KronaConfig"),
    "HiRA": Entry("HiraConfig", lr=5e-3),
    "Intrinsic SAID": Entry("SaidConfig", lr=2e-2),
    "Trainable tokens": Entry("TrainableTokensConfig", lr=5e-3, options={"token_indices": "the data's"}),
    "Full copies (last block)": Entry("FullConfig", lr=2e-4, options={"target_modules": ["layers.29"]}),
}


def batches(tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """(training batches, evaluation batches), the same for every method."""
    spec = DataSpec(path="sms_spam", max_length=512, seed=0)
    examples = load_examples(spec)
    collate = Collator(tokenizer)
    train = [e for e in encode(examples.train, tokenizer, spec) if len(e) <= LONGEST]
    held_out = [e for e in encode(examples.eval, tokenizer, spec) if len(e) <= LONGEST][:EVAL]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    order = (order * (STEPS * ROWS // len(order) + 1))[: STEPS * ROWS]
    steps = [collate([train[i] for i in order[k : k + ROWS]]) for k in range(0, STEPS * ROWS, ROWS)]
    return steps, [collate(held_out[k : k + 16]) for k in range(0, len(held_out), 16)]


@torch.no_grad()
def loss_of(model: Any, held_out: list[Any]) -> float:
    model.eval()
    return statistics.fmean(float(model(**batch).loss) for batch in held_out)


def run(name: str, entry: Entry, base: Any, data: tuple[list[Any], list[Any]], progress: Progress) -> dict[str, Any]:
    """Trains one method from the untouched base and measures it; the base is given back as it was."""
    torch.manual_seed(0)
    options = dict(entry.options)
    if "token_indices" in options:  # the 200 tokens that the training batches hold most often
        counts = torch.bincount(torch.cat([b["input_ids"].flatten() for b in data[0]]))
        options["token_indices"] = counts.topk(200).indices.tolist()
    config = getattr(deltatune, entry.config)(task_type="CAUSAL_LM", **options)
    if entry.options.get("init_lora_weights") in ("eva", "corda", "lora_ga"):
        prepare_init(base, config, data[0][:8], progress=False)
    model = get_peft_model(base, config)
    trainable, total = model.get_nb_trainable_parameters()
    before = loss_of(model, data[1])
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=entry.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / 4) * (1 - k / STEPS))
    model.train()
    seconds, kept = [], 0
    task = progress.add_task(name, total=STEPS)
    for k, batch in enumerate(data[0]):
        start = time.perf_counter()
        if k == 0:
            with saved_bytes(model) as count:
                loss = model(**batch).loss
                kept = count()
        else:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        progress.update(task, advance=1, description=f"{name} loss {loss.item():.3f}")
    after = loss_of(model, data[1])
    model.unload()
    for p in base.parameters():
        p.requires_grad_(False)
    return {
        "config": entry.config,
        "lr": entry.lr,
        "trainable": trainable,
        "share": trainable / total,
        "before": before,
        "after": after,
        "seconds": statistics.median(seconds[1:]),
        "saved_mb": kept / 2**20,
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, in the order of `ENTRIES`."""
    lines = [
        "| method | trained parameters | share | loss before | loss after | s per step | MB saved for backward | lr |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in ENTRIES:
        if name in results:
            r = results[name]
            lines.append(
                f"| {name} | {r['trainable']:,} | {100 * r['share']:.3f} % | {r['before']:.3f} | {r['after']:.3f} | "
                f"{r['seconds']:.2f} | {r['saved_mb']:.0f} | {r['lr']:g} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="methods to measure again")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "method_table.json")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept = read_json(options.out)
    results = kept.get("results", {})
    todo = options.names or [n for n in ENTRIES if n not in results]
    unknown = [n for n in todo if n not in ENTRIES]
    if unknown:
        raise SystemExit(f"no entry {unknown[0]!r}; there are: {', '.join(ENTRIES)}")
    if todo:
        base, tokenizer = load_smollm2("bfloat16")
        data = batches(tokenizer)
        with Progress() as progress:
            for name in todo:
                results[name] = run(name, ENTRIES[name], base, data, progress)
                write_json(options.out, {"machine": machine(), "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
