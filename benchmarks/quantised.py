"""QLoRA on a real model, by recipe, and what each way of merging leaves of it: the tables in docs/quantization.md.

    python benchmarks/quantised.py losses       # trains three runs (one is killed and resumed), merges, evaluates
    python benchmarks/quantised.py losses --task e2e --e2e FOLDER
    python benchmarks/quantised.py errors       # quantisation error of the real weights
    python benchmarks/quantised.py stream       # peak memory of a merge from disk to disk
    python benchmarks/quantised.py memory       # each term of the memory formula against a measurement

A part that is in the JSON already is not done again; name it with --again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, read_json, write_json

HERE = Path(__file__).parent
RECIPE = """
name: {name}
model: smollm2-135m-instruct
dtype: {dtype}
quantization: {quantization}
method: {{peft_type: LORA, r: 16, lora_alpha: 32, target_modules: all-linear}}
data: {data}
train: {{max_steps: {steps}, batch_size: {rows}, learning_rate: 1e-3, warmup_ratio: 0.05, save_strategy: steps,
  save_steps: {save}, logging_steps: 5, merge_aware: {aware}}}
eval: {{before: false, generate: false, samples: 0}}
report: {{plot: false, model_card: false}}
output_dir: {folder}
"""
RUNS = {
    "LoRA, 16 bit": ("bfloat16", "null", "false"),
    "QLoRA": ("float32", "4bit", "false"),
    "QLoRA, merge-aware": ("float32", "4bit", "true"),
}
#: label -> (run, into, rounding)
MERGES = {
    "QLoRA, merged into 16 bit": ("QLoRA", "dense", None),
    "QLoRA, merged into 4 bit, nearest": ("QLoRA", "same", "nearest"),
    "QLoRA, merged into 4 bit, dithered": ("QLoRA", "same", "dithered"),
    "QLoRA, merge-aware, merged into 4 bit": ("QLoRA, merge-aware", "same", None),
}
#: task -> (rows per step, steps)
TASKS = {"sms": (2, 60), "e2e": (8, 45)}


class Task:
    """One table: its runs are in a folder of their own.

    Args:
        e2e: the folder with the E2E data (train.jsonl and val.jsonl), for that task.
    """

    def __init__(self, name: str, work: Path, e2e: Path | None) -> None:
        self.name, self.work = name, work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.data = "{path: sms_spam, max_length: 512, limit: 400, eval_limit: 32}"
        if name == "e2e":
            if e2e is None:
                raise SystemExit("--task e2e needs --e2e FOLDER, with train.jsonl and val.jsonl")
            for split in ("train", "val"):
                self._flatten(e2e / f"{split}.jsonl", self.work / f"{split}.jsonl")
            self.data = (
                f"{{path: {self.work}/train.jsonl, eval_path: {self.work}/val.jsonl, format: prompt_completion}}"
            )

    @staticmethod
    def _flatten(source: Path, to: Path) -> None:
        with source.open() as lines, to.open("w") as out:
            for row in map(json.loads, lines):
                answer = row["ref"] if "ref" in row else row["refs"][0]
                out.write(json.dumps({"prompt": row["mr"] + "\n", "completion": answer}) + "\n")

    def recipe(self, run: str) -> Path:
        dtype, quantization, aware = RUNS[run]
        rows, steps = TASKS[self.name]
        short = slug(run)
        file = self.work / f"{short}.yaml"
        file.write_text(
            RECIPE.format(
                name=short, dtype=dtype, quantization=quantization, aware=aware, data=self.data, rows=rows,
                steps=steps, save=steps // 3, folder=self.work / short,
            )
        )  # fmt: skip
        return file

    def folder(self, run: str) -> Path:
        from deltatune.train.recipe import load_recipe

        return load_recipe(self.recipe(run)).run_dir

    def train(self, run: str, *, kill: bool) -> dict[str, Any]:
        """Runs the recipe in a process of its own; with `kill`, once until its first checkpoint and then again."""
        command = [sys.executable, "-m", "deltatune.cli", "train", str(self.recipe(run))]
        folder, resumed = self.folder(run), 0
        if kill and not folder.exists():
            first = folder / f"checkpoint-{TASKS[self.name][1] // 3}"
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and not first.exists():
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            resumed = max((int(p.name.partition("-")[2]) for p in folder.glob("checkpoint-*")), default=0)
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = read_json(folder / "results.json")
        return {"loss": result["after"]["loss"], "seconds": time.perf_counter() - start, "resumed_at": resumed}

    def merged(self, run: str, into: str, rounding: str | None) -> dict[str, Any]:
        """Merges a run, loads what was written with transformers alone, and evaluates it."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from deltatune.train.loading import find_target
        from deltatune.train.merging import merge

        folder = self.work / "merged"
        shutil.rmtree(folder, ignore_errors=True)
        done = merge(find_target(str(self.folder(run))), folder, into=into, rounding=rounding)
        dtype = "auto" if into == "same" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        loss = self.loss_of(model, AutoTokenizer.from_pretrained(folder))
        gap = done.difference
        assert gap is not None
        shutil.rmtree(folder)
        return {"loss": loss, "bytes": done.bytes, "max_logit": gap.max, "mean_logit": gap.mean, "lost": gap.lost}

    def loss_of(self, model: Any, tokenizer: Any) -> float:
        """On the same held-out rows as the runs."""
        from rich.console import Console

        from deltatune.train.evaluate import evaluate
        from deltatune.train.recipe import load_recipe
        from deltatune.train.session import prepare_data

        recipe = load_recipe(self.recipe("QLoRA"))
        data = prepare_data(recipe, tokenizer)
        quiet = Console(quiet=True)
        rows = data.examples.eval
        found = evaluate(model, tokenizer, rows, recipe.data, batch_size=16, generate=False, console=quiet)
        return float(found["loss"])


def slug(name: str) -> str:
    return name.lower().replace(", ", "-").replace(" ", "-")


def losses(kept: dict[str, Any], out: Path, task: Task) -> None:
    table = kept.setdefault("losses", {}).setdefault(task.name, {})
    for name in RUNS:
        if name not in table:
            table[name] = task.train(name, kill=name == "QLoRA")
            write_json(out, kept)
            print(task.name, name, table[name], flush=True)
    for label, how in MERGES.items():
        if label not in table:
            table[label] = task.merged(*how)
            write_json(out, kept)
            print(task.name, label, table[label], flush=True)


# ---------------------------------------------------------------------- errors of storage
def errors(kept: dict[str, Any], out: Path, r: int = 16) -> None:
    """Relative error ‖W - W'‖ / ‖W‖ over the linear layers of one block, plain and beside a pair of rank r."""
    import bitsandbytes.functional as bnb

    from deltatune.inits.loftq import alternate, product
    from deltatune.stores import find_store
    from deltatune.stores.nf4 import round_trip

    base, _ = load_smollm2("float32")
    layers = [base.model.layers[i] for i in (14,)]
    weights = [m.weight.detach() for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert all(find_store(w).exact for w in weights)

    def fp4(w: torch.Tensor) -> torch.Tensor:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(w.contiguous(), quant_type="fp4", blocksize=64))

    def int8(w: torch.Tensor) -> torch.Tensor:
        codes, scale, _ = bnb.int8_vectorwise_quant(w.half().contiguous())
        return codes.float() * scale.float().unsqueeze(1) / 127

    table = kept.setdefault("errors", {})
    for name, quantise in (("NF4", round_trip), ("FP4", fp4), ("int8", int8)):
        rows = {}
        for label, options in (
            ("plain", None),
            ("LoftQ, 1 round", (1, False)),
            ("LoftQ, 5 rounds", (5, False)),
            ("QPiSSA, 1 round", (1, True)),
            ("QPiSSA, 5 rounds", (5, True)),
        ):
            lost = whole = 0.0
            for w in weights:
                if options is None:
                    near = quantise(w)
                else:
                    low, q = alternate(w, r, options[0], quantise, principal_first=options[1])
                    near = q + product(low)
                lost += float((w - near).square().sum())
                whole += float(w.square().sum())
            rows[label] = (lost / whole) ** 0.5
        table[name] = rows
        write_json(out, kept)
        print(name, rows, flush=True)


def memory(kept: dict[str, Any], out: Path) -> None:
    """The formula's terms for the 135M model, and what is stored and saved in fact."""
    from deltatune import LoraConfig, get_peft_model, quantize_model
    from deltatune.stores import Packed, quantised
    from deltatune.train.memory import working_bytes
    from deltatune.train.qlora_memory import LLAMAS, Shape, terms

    base, _ = load_smollm2("bfloat16")
    c = base.config
    shape = Shape(
        c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.vocab_size,
        c.num_attention_heads, c.num_key_value_heads, c.tie_word_embeddings,
    )  # fmt: skip
    quantize_model(base)
    model = get_peft_model(base, LoraConfig(r=64, target_modules="all-linear"))
    rows, length = 1, 256
    formula = terms(shape, r=64, rows=rows, length=length, adapter_bytes=4, unpacked_bytes=12)
    packed = [w for m in base.modules() if isinstance(w := quantised(m), Packed)]
    trained = [p for p in model.parameters() if p.requires_grad]
    others = {id(p): p for p in base.parameters() if not p.requires_grad}
    model.activation_checkpointing_enable()
    working = working_bytes(model, rows, length, length, torch.bfloat16)
    few = terms(shape, rows=rows, length=length, trained=1, unpacked_bytes=12)["activations"]
    formula["one block"] = few - 2 * shape.blocks * rows * length * shape.hidden
    working_few = working_bytes(model, rows, length, 1, torch.bfloat16)
    ids = torch.randint(0, c.vocab_size, (rows, 8))
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim)
    gradients = sum(p.grad.nbytes for p in trained)
    measured = {
        "codes": sum(w.tensors["packed"].nbytes for w in packed),
        "constants": sum(w.nbytes - w.tensors["packed"].nbytes for w in packed),
        "rest": sum(p.nbytes for p in others.values()),
        "adapter": sum(p.nbytes for p in trained),
        "gradients": gradients,
        "optimizer": state,
        "activations": working,
        "one block": working_few - gradients,  # the peak is at the end then, when all gradients are there
    }
    llamas = {name: terms(shape, r=64, rows=1, length=512) for name, shape in LLAMAS.items()}
    kept["memory"] = {"formula": formula, "measured": measured, "rows": rows, "length": length, "llamas": llamas}
    write_json(out, kept)
    for name, value in measured.items():
        print(f"{name:<32}{formula[name]:>14,}{value:>14,}  {value / formula[name] - 1:+.1%}")


def stream(kept: dict[str, Any], out: Path, work: Path) -> None:
    """Peak memory of a merge from disk to disk against the base's shards."""
    from deltatune import LoraConfig, get_peft_model

    work.mkdir(parents=True, exist_ok=True)
    base, _ = load_smollm2("float32")
    base.save_pretrained(work / "base", max_shard_size="150MB")
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(work / "adapter")
    del base, model
    program = """
import re, sys, psutil
from pathlib import Path
import transformers, deltatune.train.streaming as s
from deltatune.train.loading import Target
from transformers import LlamaForCausalLM
work = Path(sys.argv[1])
before = psutil.Process().memory_info().rss
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here, not at the parent's
s.merge_stream(Target("adapter", str(work / "base"), adapter=work / "adapter"), work / "merged")
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024 - before)
"""
    done = subprocess.run([sys.executable, "-c", program, str(work)], check=True, capture_output=True, text=True)
    shards = [p.stat().st_size for p in (work / "base").glob("*.safetensors")]
    kept["stream"] = {"peak": int(done.stdout.split()[-1]), "shards": shards, "largest": max(shards)}
    write_json(out, kept)
    print(kept["stream"], f"{kept['stream']['peak'] / max(shards):.2f} of the largest shard")
    shutil.rmtree(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["losses", "errors", "memory", "stream"])
    parser.add_argument("--task", choices=list(TASKS), default="sms", help="of the losses")
    parser.add_argument("--e2e", type=Path, help="folder with the E2E data")
    parser.add_argument("--again", action="store_true", help="forget what is there of this part")
    parser.add_argument("--work", type=Path, default=Path("runs/quantised"), help="where runs are written")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quantised.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_json(options.out)
    if options.again:
        (kept.get("losses", {}) if options.part == "losses" else kept).pop(
            options.task if options.part == "losses" else options.part, None
        )
    kept["machine"] = machine()
    if options.part == "losses":
        losses(kept, options.out, Task(options.task, options.work, options.e2e))
    elif options.part == "stream":
        stream(kept, options.out, options.work / "stream")
    else:
        {"errors": errors, "memory": memory}[options.part](kept, options.out)


if __name__ == "__main__":
    main()
