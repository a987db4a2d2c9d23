"""The questions of `procedures.py`: a model, its data, and the entries that are compared on them.

Every entry of a question tries equally many learning rates, each twice the one before. They are LoRA's rates for all
but those whose own rule asks for others: LoRA+ gives A's rate; LoRA-Pro in Adam's form and procedures that train whole
weights take rates of full fine-tuning.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2
from torch import Tensor

from deltatune.train.models import load_tokenizer, resolve_model

Batch = dict[str, Tensor]
STARTS, RESTARTS, GRADIENTS, WHOLES = "starts and rates", "restarts", "gradients", "whole weights, layers, budgets"


@dataclass
class Entry:
    """One line: a method's configuration, a procedure's options, and the learning rates to try.

    Attributes:
        family: the panel of the figure; None is drawn in all of them.
    """

    family: str | None
    method: dict[str, Any] | None
    lrs: tuple[float, ...]
    procedure: dict[str, Any] = field(default_factory=dict)


@dataclass
class Question:
    """A fresh model, its training batches for a seed, what chooses the learning rate and what is reported.

    Attributes:
        more: learning rates that are tried beyond an entry's own where the best is the lowest or the highest.
    """

    model: Callable[[int], Any]
    steps: Callable[[int], list[Batch]]
    validation: list[Batch]
    held_out: list[Batch]
    task: str
    seeds: int
    more: int
    entries: dict[str, Entry]


def batched(rows: list[Any], collate: Callable[[list[Any]], Batch], count: int, size: int, seed: int) -> list[Batch]:
    """`count` batches in a random order of the seed's, going round the rows as often as needed."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < count * size:
        order += torch.randperm(len(rows), generator=generator).tolist()
    return [collate([rows[i] for i in order[k : k + size]]) for k in range(0, count * size, size)]


def in_turn(rows: list[Any], collate: Callable[[list[Any]], Batch], size: int) -> list[Batch]:
    """All rows, in batches of `size`."""
    return [collate(rows[k : k + size]) for k in range(0, len(rows), size)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def around(lr: float, factor: float = 2.0) -> tuple[float, ...]:
    """Three rates."""
    return lr / factor, lr, lr * factor


LINEAR = {"target_modules": "all-linear"}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
ADALORA = {"peft_type": "ADALORA", "init_r": 12, "target_r": 8, "lora_alpha": 32, "orth_reg_weight": 0.1}
WHOLE = {"peft_type": "FULL", "in_place": True}


def common_entries(places: dict[str, Any], lr: float, whole: float, steps: int, rates: Any) -> dict[str, Entry]:
    """The entries of a fine-tuning question.

    Args:
        places: target modules. lr: LoRA's middle rate. whole: that of all weights. rates: of a middle rate, all to try.
    """
    pair, part = {**LORA, **places}, steps // 4
    return {
        "LoRA": Entry(None, pair, rates(lr)),
        "LoRA, PiSSA init": Entry(STARTS, {**pair, "init_lora_weights": "pissa"}, rates(lr)),
        "LoRA, LoRA-GA init": Entry(STARTS, {**pair, "init_lora_weights": "lora_ga"}, rates(lr)),
        "LoRA+, ratio 16": Entry(STARTS, pair, rates(lr / 4), {"name": "lora_plus", "ratio": 16}),
        "LoRA+, ratio 4": Entry(STARTS, pair, rates(lr / 2), {"name": "lora_plus", "ratio": 4}),
        "ReLoRA": Entry(
            RESTARTS,
            pair,
            rates(lr),
            {"name": "relora", "cycle": part + 1, "restart_warmup": max(part // 6, 1), "train_rest": False},
        ),
        "PeriodicLoRA": Entry(RESTARTS, pair, rates(lr), {"name": "periodic_lora", "stage": part, "curve": "given"}),
        "COLA, 3 links": Entry(RESTARTS, pair, rates(lr), {"name": "cola", "links": 3, "warmup": max(part // 6, 1)}),
        "Delta-LoRA": Entry(RESTARTS, pair, rates(lr), {"name": "delta_lora", "ratio": 2, "after": part}),
        "LoRA-Pro": Entry(GRADIENTS, pair, rates(4 * whole), {"name": "lora_pro"}),
        "Riemannian": Entry(GRADIENTS, pair, rates(lr), {"name": "riemannian"}),
        "LoRA-FA": Entry(GRADIENTS, {**pair, "peft_type": "LORA_FA"}, rates(lr)),
        "LoRA-FA, projected": Entry(GRADIENTS, {**pair, "peft_type": "LORA_FA"}, rates(lr), {"name": "lora_fa"}),
        "AdaLoRA": Entry(
            WHOLES,
            {**ADALORA, **places, "tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(steps // 20, 1)},
            rates(2 * lr),
        ),
        "AdapterDrop": Entry(WHOLES, pair, rates(lr), {"name": "adapter_drop"}),
        "LISA": Entry(WHOLES, WHOLE, rates(whole), {"name": "lisa", "layers": 2, "every": max(steps // 20, 1)}),
        "Full, then LoRA": Entry(
            WHOLES,
            pair,
            rates(lr),
            {"name": "full_then_lora", "share": 0.2, "full_rate": whole / lr, "warmup": steps // 20},
        ),
    }


# ---------------------------------------------------------------------- real models
def short_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows of E2E of up to 200 characters, about 55 tokens: this question is the slowest."""
    rows = read_rows(folder / "e2e_nlg" / f"{name}.jsonl")
    return [r for r in rows if len(r["mr"]) + len(r["ref"] if "ref" in r else r["refs"][0]) <= 200]


def language(folder: Path) -> Question:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m-instruct"))
    rows, validation, test = (short_rows(folder, name) for name in ("train", "val", "test"))

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

    entries = common_entries(LINEAR, 2e-3, 2e-4, 20, lambda lr: (lr, 2 * lr))
    del entries["LoRA+, ratio 4"], entries["LoRA-FA"]  # these are in `classes`
    entries["LongLoRA, 2 groups"] = Entry(
        WHOLES, {**LORA, **LINEAR}, (2e-3, 4e-3), {"name": "longlora", "groups": 2, "train": ["norm"]}
    )
    return Question(
        lambda seed: load_smollm2()[0],
        lambda seed: batched(rows, collate, 20, 2, seed),
        in_turn(validation, collate, 10),
        in_turn(test[:: len(test) // 24][:24], collate, 12),
        "CAUSAL_LM",
        1,
        0,
        entries,
    )


def classes(folder: Path) -> Question:
    from transformers import AutoModelForSequenceClassification

    path = resolve_model("all-minilm-l6-v2").path
    tokenizer = load_tokenizer(resolve_model("all-minilm-l6-v2"))
    rows = read_rows(folder / "banking10" / "train.jsonl")
    validation, train = rows[::5], [r for i, r in enumerate(rows) if i % 5]
    test = read_rows(folder / "banking10" / "test.jsonl")

    def collate(some: list[dict[str, Any]]) -> Batch:
        batch = tokenizer([r["text"] for r in some], padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**batch, "labels": torch.tensor([r["label"] for r in some])}

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(path, num_labels=10)

    return Question(
        model,
        lambda seed: batched(train, collate, 100, 8, seed),
        in_turn(validation, collate, 40),
        in_turn(test, collate, 50),
        "SEQ_CLS",
        3,
        1,
        common_entries({"target_modules": ["query", "value"]}, 1e-2, 1e-3, 100, around),
    )


# ---------------------------------------------------------------------- a small Llama on bytes
def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, **sizes))


def problems(folder: Path, name: str) -> bytes:
    rows = read_rows(folder / "gsm8k" / f"{name}.jsonl")
    return "\n\n".join(f"{r['question']}\n{r['answer']}" for r in rows).encode()


def restaurants(folder: Path, name: str) -> bytes:
    rows = read_rows(folder / "e2e_nlg" / f"{name}.jsonl")
    return "\n\n".join(f"{r['mr']}\n{r['ref'] if 'ref' in r else r['refs'][0]}" for r in rows).encode()


def windows(data: bytes, width: int) -> list[Tensor]:
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return list(ids[: len(ids) // width * width].view(-1, width))


def of_bytes(some: list[Tensor]) -> Batch:
    ids = torch.stack(some)
    return {"input_ids": ids, "labels": ids}


def small(folder: Path) -> Question:
    """A Llama that knows maths problems learns restaurants: its embedding is 3 % of it, and there is no new head."""
    place = Path(tempfile.gettempdir()) / "deltatune_procedures_small.pt"

    def model(seed: int) -> Any:
        torch.manual_seed(0)
        net = llama(6)
        if not place.exists():
            train_whole(net, batched(windows(problems(folder, "train_a"), 96), of_bytes, 400, 12, 0))
            torch.save(net.state_dict(), place)
        net.load_state_dict(torch.load(place))
        return net

    found = common_entries(LINEAR, 8e-3, 2e-3, 120, around)
    names = ("LoRA", "LoRA, PiSSA init", "LoRA, LoRA-GA init", "LoRA+, ratio 16", "LoRA+, ratio 4", "LISA")
    entries = {name: found[name] for name in names}
    for name, r, lr in (("LoRA, LISA's memory", SAME_MEMORY, 8e-3), ("LoRA, LISA's state", SAME_STATE, 4e-3)):
        entries[name] = Entry(WHOLES, {**LORA, **LINEAR, "r": r, "lora_alpha": 2 * r}, around(lr))
    entries["all weights"] = Entry(WHOLES, WHOLE, around(2e-3))
    rows, validation, test = (windows(restaurants(folder, name), 96) for name in ("train", "val", "test"))
    return Question(
        model,
        lambda seed: batched(rows, of_bytes, 120, 8, seed),
        in_turn(validation[:64], of_bytes, 64),
        in_turn(test[:256], of_bytes, 64),
        "CAUSAL_LM",
        3,
        2,
        entries,
    )


#: ranks of a LoRA on all linear layers of `small` that trains in LISA's memory: with what is saved for backward (LoRA
#: keeps the input of every layer, LISA that of two blocks), and without it, as where activations are checkpointed
SAME_MEMORY, SAME_STATE = 3, 23


def train_whole(net: Any, steps: list[Batch]) -> None:
    """Ordinary training of all weights."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    net.train()
    for number, batch in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (number + 1) / 20) * (1 - number / len(steps))
        net(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def scratch(folder: Path) -> Question:
    """A Llama of 0.4 million parameters from nothing; rank 4 of a width of 128, seven restarts (five after warming)."""

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        return llama(2)

    steps = 500
    pair = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    relora = {"name": "relora", "cycle": 63, "restart_warmup": 10}
    # for one low-rank run that trains the rest in full as ReLoRA does: no restart before the end
    once = {"name": "relora", "cycle": steps - 1, "restart_warmup": 10, "reset": "zero"}
    warm = {"warm_start": 125, "warm_start_rate": 0.5}
    entries = {
        "one LoRA": Entry(None, pair, (8e-3, 1.6e-2), once),
        "ReLoRA": Entry(RESTARTS, pair, (8e-3, 1.6e-2), relora),
        "one LoRA, warm start": Entry(RESTARTS, pair, (8e-3, 1.6e-2), {**once, **warm, "cycle": steps - 126}),
        "ReLoRA, warm start": Entry(RESTARTS, pair, (8e-3, 1.6e-2), {**relora, **warm, "cycle": 63}),
        "all weights": Entry(RESTARTS, None, (4e-3, 8e-3)),
    }
    rows, test = windows(problems(folder, "train_a"), 64), windows(problems(folder, "val"), 64)
    return Question(
        model,
        lambda seed: batched(rows, of_bytes, steps, 8, seed),
        in_turn(test[:128], of_bytes, 64),
        in_turn(test[128:512], of_bytes, 64),
        "CAUSAL_LM",
        3,
        1,
        entries,
    )


QUESTIONS: dict[str, Callable[[Path], Question]] = {
    "small": small,
    "classes": classes,
    "language": language,
    "scratch": scratch,
}
