"""The whole table against peft, in alternation, one process: counts first, then times as ratios with min and max.

    make bench                                    # SmolLM2-135M, about 5 minutes on two quiet cores
    python benchmarks/run.py --parts bytes step   # some of it
    python benchmarks/run.py --tiny               # a few seconds, to see that it runs

Both libraries get the same base weights, adapters copied name by name, the same batch and the same dtype; outputs and
gradients are compared before anything is timed. Writes results/run.json and results/run.svg.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, read_json, saved_bytes, write_json
from torch import nn

HERE = Path(__file__).parent
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, dropout 0.05": {"lora_dropout": 0.05},
    "DoRA": {"use_dora": True},
}
#: row -> what issue 8 asks for; ratios over the frozen base, MB, seconds
TARGETS: dict[str, float] = {
    "step: LoRA": 1.07, "step: LoRA, dropout 0.05": 1.12, "step: DoRA": 1.15,
    "MB float32: LoRA": 725, "MB float32: LoRA, dropout 0.05": 730, "MB float32: DoRA": 735, "MB float32: LoRA-FA": 578,
    "MB bfloat16: LoRA": 470, "MB bfloat16: LoRA, dropout 0.05": 475,
    "decode: one live": 1.10, "decode: 4 different": 1.20, "decode: 8 different": 1.30, "decode: 16 different": 1.40,
    "import (s over torch)": 0.15, "wrap 7B on meta (s)": 0.15,
    "load 1st adapter (ms)": 30, "load 20th adapter (ms)": 30, "load 100th adapter (ms)": 30,
    "switch (us)": 10, "disable (us)": 10,
}  # fmt: skip


@dataclass
class Setup:
    """What is measured: the base, its batch, and how often."""

    make: Callable[[str], nn.Module]
    rows: int = 4
    length: int = 128
    rounds: int = 5
    r: int = 16
    adapters: int = 16
    tokens: int = 8
    device: str = "cpu"


def libraries() -> dict[str, Any]:
    import peft

    import deltatune

    return {"deltatune": deltatune, "peft": peft}


def twin(base: nn.Module) -> nn.Module:
    """Another module tree over the same tensors."""
    same = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, same)


def adapted(library: Any, base: nn.Module, r: int, cls: str = "LoraConfig", **options: Any) -> Any:
    torch.manual_seed(0)
    fixed = {"r": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return library.get_peft_model(twin(base), getattr(library, cls)(**{**fixed, **options})).train()


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()  # so that a frozen model has a graph too
    loss: torch.Tensor = model(inputs_embeds=embeds, labels=ids, use_cache=False).loss
    return loss


def synchronise(setup: Setup) -> None:
    if setup.device == "cuda":
        torch.cuda.synchronize()


def timed(setup: Setup, function: Callable[[], Any]) -> float:
    synchronise(setup)
    start = time.perf_counter()
    function()
    synchronise(setup)
    return time.perf_counter() - start


def prompt(setup: Setup, base: nn.Module) -> torch.Tensor:
    high = min(40000, base.config.vocab_size)  # type: ignore[union-attr]
    ids = torch.randint(5, high, (setup.rows, setup.length), generator=torch.Generator().manual_seed(0))
    return ids.to(setup.device)


# ---------------------------------------------------------------------- parts
def agreement(setup: Setup) -> dict[str, float]:
    """The largest relative difference of the loss and of any gradient, ours from peft's, on equal adapters."""
    base = setup.make("float32")
    ids = prompt(setup, base)
    found: dict[str, float] = {}
    for name, options in METHODS.items():
        options = {k: v for k, v in options.items() if k != "lora_dropout"}  # draws differ
        models = {n: adapted(lib, base, setup.r, **options) for n, lib in libraries().items()}
        theirs = dict(models["peft"].named_parameters())
        for key, p in models["deltatune"].named_parameters():
            if p.requires_grad:
                p.data.copy_(theirs[key].data)
        losses = {n: loss_of(m, ids) for n, m in models.items()}
        for loss in losses.values():
            loss.backward()
        worst = abs(float((losses["deltatune"] / losses["peft"]).detach()) - 1)
        for key, p in models["deltatune"].named_parameters():
            if p.requires_grad:
                g = theirs[key].grad
                worst = max(worst, float((p.grad - g).norm() / g.norm().clamp_min(1e-12)))
        found[name] = worst
        print(f"agreement with peft, {name}: {worst:.1e}")
    return found


def kept_for_backward(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """MB that autograd keeps, a count and not a measurement."""
    found: dict[str, dict[str, list[float]]] = {}
    for dtype in ("float32", "bfloat16"):
        base = setup.make(dtype).requires_grad_(False).train()
        ids = prompt(setup, base)
        cases: dict[str, tuple[str, dict[str, Any]]] = {m: ("LoraConfig", o) for m, o in METHODS.items()}
        cases["LoRA-FA"] = ("LoraFAConfig", {})
        with saved_bytes(base) as count:
            loss_of(base, ids)
            found[f"MB {dtype}: frozen"] = {"deltatune": [count() / 1e6]}
        for name, (cls, options) in cases.items():
            row = found[f"MB {dtype}: {name}"] = {}
            for lib, module in libraries().items():
                if hasattr(module, cls):
                    model = adapted(module, base, setup.r, cls, **options)
                    with saved_bytes(model) as count:
                        loss_of(model, ids)
                        row[lib] = [count() / 1e6]
        from deltatune import kernels

        with (
            kernels.use("lean"),
            saved_bytes(model := adapted(libraries()["deltatune"], base, setup.r, use_dora=True)) as c,
        ):
            loss_of(model, ids)
            found[f"MB {dtype}: DoRA, lean"] = {"deltatune": [c() / 1e6]}
    return found


def step(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Forward and backward over the frozen base's, which stands before and after each."""
    base = setup.make("float32" if setup.device == "cpu" else "bfloat16").requires_grad_(False).train()
    ids = prompt(setup, base)
    models = {
        (name, lib): adapted(module, base, setup.r, **options)
        for name, options in METHODS.items()
        for lib, module in libraries().items()
    }
    found: dict[str, dict[str, list[float]]] = {f"step: {m}": {"deltatune": [], "peft": []} for m in METHODS}
    before = timed(setup, lambda: loss_of(base, ids).backward())
    for k in range(setup.rounds + 1):
        for (name, lib), model in models.items():
            seconds = timed(setup, lambda model=model: loss_of(model, ids).backward())
            model.zero_grad(set_to_none=True)
            after = timed(setup, lambda: loss_of(base, ids).backward())
            if k:
                found[f"step: {name}"][lib].append(2 * seconds / (before + after))
            before = after
    return found


@torch.no_grad()
def decode(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Seconds per token of 16 rows over the base's; `n different` gives each run of 16/n rows an adapter."""
    base = setup.make("float32" if setup.device == "cpu" else "bfloat16")
    ids = prompt(Setup(setup.make, rows=16, length=16, device=setup.device), base)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options |= {"max_new_tokens": setup.tokens, "min_new_tokens": setup.tokens}
    found: dict[str, dict[str, list[float]]] = {}
    for lib, module in libraries().items():
        model = adapted(module, base, setup.r)
        model.set_adapter("default")
        config = model.peft_config["default"]
        for i in range(1, setup.adapters):
            model.add_adapter(f"a{i}", copy.deepcopy(config))
        model.eval()
        names = ["default", *(f"a{i}" for i in range(1, setup.adapters))]
        cases: dict[str, Any] = {"one live": {}}
        for n in (1, 4, 8, 16):
            cases[f"{n} different"] = {"adapter_names": [names[i * n // 16] for i in range(16)]}
        with model.disable_adapter():
            before = timed(setup, lambda model=model: model.generate(ids, **options))
        for k in range(setup.rounds + 1):
            for case, extra in cases.items():
                seconds = timed(setup, lambda model=model, extra=extra: model.generate(ids, **options, **extra))
                with model.disable_adapter():
                    after = timed(setup, lambda model=model: model.generate(ids, **options))
                if k:
                    row = found.setdefault(f"decode: {case}", {}).setdefault(lib, [])
                    row.append(2 * seconds / (before + after))
                before = after
    return found


def start_up(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """What `import` costs beside torch, with what a first wrap needs."""
    code = (
        "import time, torch; t = time.perf_counter(); from {} import LoraConfig, get_peft_model; "
        "print(time.perf_counter() - t)"
    )
    row: dict[str, list[float]] = {}
    # as installed: with compiled bytecode, which the first round leaves behind
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for k in range(4):
        for lib in libraries():
            command = [sys.executable, "-c", code.format(lib)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
            if not k:
                continue
            row.setdefault(lib, []).append(float(done.stdout.split()[-1]))
    return {"import (s over torch)": row}


def life(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Wrapping a 7B-shaped model without memory; loading, switching, saving and merging on the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found: dict[str, dict[str, list[float]]] = {}

    def add(row: str, lib: str, value: float) -> None:
        found.setdefault(row, {}).setdefault(lib, []).append(value)

    base = setup.make("float32")
    rounds = min(3, setup.rounds)
    for _ in range(rounds):
        for lib, module in libraries().items():
            with torch.device("meta"):
                large = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
            config = module.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
            add("wrap 7B on meta (s)", lib, timed(setup, lambda: module.get_peft_model(large, config)))  # noqa: B023
    for lib, module in libraries().items():
        model = adapted(module, base, setup.r)
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                add("save (s)", lib, timed(setup, lambda: model.save_pretrained(folder)))  # noqa: B023
            for i in range(20 if lib == "peft" else 100):  # peft would take minutes for so many
                ms = 1e3 * timed(setup, lambda: model.load_adapter(folder, f"n{i}"))  # noqa: B023
                for nth, near in ((1, range(3)), (20, range(17, 20)), (100, range(90, 100))):
                    if i in near:
                        add(f"load {nth}{'st' if nth == 1 else 'th'} adapter (ms)", lib, ms)
        many = 50
        for _ in range(rounds):
            add("switch (us)", lib, 1e6 / many * timed(setup, lambda: [model.set_adapter("n1") for _ in range(many)]))  # noqa: B023
            add("disable (us)", lib, 1e6 / many * timed(setup, lambda: [_off(model) for _ in range(many)]))  # noqa: B023
            model.set_adapter("default")
            add("merge (s)", lib, timed(setup, model.merge_adapter))
            add("unmerge (s)", lib, timed(setup, model.unmerge_adapter))
    return found


def billion(dtype: str, tiny: bool = False) -> nn.Module:
    """A model of Llama-3.2-1B's shape with random weights; the values do not matter here, so a million are repeated."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    sizes |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    if tiny:
        sizes |= {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **sizes)).to(getattr(torch, dtype))
    model.to_empty(device="cpu").tie_weights()
    some = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(model.dtype)
    for tensor in {*model.parameters(), *model.buffers()}:
        flat = tensor.data.view(-1)
        for start in range(0, len(flat), len(some)):
            flat[start : start + len(some)].copy_(some[: len(flat) - start])
    return model


def lifecycle(setup: Setup) -> dict[str, dict[str, list[float]]]:
    """Saving, loading, merging and unmerging of r=16 on all linear layers of a 1B-shaped model, seconds each."""
    found: dict[str, dict[str, list[float]]] = {}
    for dtype in ("bfloat16", "float32"):
        base = billion(dtype, tiny=setup.tokens < Setup.tokens)
        for lib, module in libraries().items():  # peft last: it merges in place and does not restore every bit
            for verb, seconds in _verbs(setup, adapted(module, base, setup.r)):
                found.setdefault(f"1B {dtype}: {verb} (s)", {}).setdefault(lib, []).append(seconds)
            gc.collect()
        del base
        gc.collect()
    return found


def _verbs(setup: Setup, model: Any) -> Iterator[tuple[str, float]]:
    """What each verb takes: three times, and once where nothing is left of the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        for k in range(3):
            yield "save", timed(setup, lambda: model.save_pretrained(folder))
            yield "load", timed(setup, lambda: model.load_adapter(folder, f"n{k}"))  # noqa: B023
            yield "merge", timed(setup, model.merge_adapter)
            yield "unmerge", timed(setup, model.unmerge_adapter)
    yield "merge and unload", timed(setup, model.merge_and_unload)


def _off(model: Any) -> None:
    with model.disable_adapter():
        pass


PARTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "agreement": agreement, "bytes": kept_for_backward, "import": start_up, "life": life,
    "lifecycle": lifecycle, "step": step, "decode": decode,
}  # fmt: skip


# ---------------------------------------------------------------------- showing
def line(name: str, row: dict[str, list[float]]) -> str:
    def show(values: list[float] | None) -> str:
        if not values:
            return "–"
        middle = statistics.median(values)
        text = f"{middle:.4g}"
        return text if len(values) == 1 else f"{text} ({min(values):.4g} to {max(values):.4g})"

    target = TARGETS.get(name)
    wanted = "–" if target is None else f"≤ {target:g}"
    return f"| {name} | {wanted} | {show(row.get('peft'))} | {show(row.get('deltatune'))} |"


def table(results: dict[str, dict[str, list[float]]]) -> str:
    head = ["| | target | peft | deltatune |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *(line(n, r) for n, r in results.items())])


def figure(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Ratios to the base of steps and of decoding, as bars with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = {n: r for n, r in results.items() if n.startswith(("step", "decode"))}
    if not rows:
        return
    fig, ax = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2))
    for k, lib in enumerate(("deltatune", "peft")):
        at = [i + 0.2 * (2 * k - 1) for i in range(len(rows))]
        middle = [statistics.median(r[lib]) for r in rows.values()]
        low = [m - min(r[lib]) for m, r in zip(middle, rows.values(), strict=True)]
        high = [max(r[lib]) - m for m, r in zip(middle, rows.values(), strict=True)]
        ax.barh(at, middle, 0.38, xerr=[low, high], label=lib)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.axvline(1, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.set_xlabel("time over the frozen base's")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path)


def tiny(dtype: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(getattr(torch, dtype))


def measure(setup: Setup, parts: list[str], out: Path) -> None:
    kept = read_json(out)
    for part in parts:
        kept.setdefault("parts", {})[part] = {"machine": machine(), "results": PARTS[part](setup)}
        write_json(out, kept)
        if part != "agreement":
            print(table(kept["parts"][part]["results"]), flush=True)
    together = {n: r for p in PARTS if p != "agreement" for n, r in kept["parts"].get(p, {}).get("results", {}).items()}
    figure(together, out.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setup = Setup(lambda dtype: load_smollm2(dtype)[0], rounds=options.rounds)
    if options.tiny:
        setup = Setup(tiny, rows=2, length=16, rounds=1, tokens=3)
    name = "run_tiny.json" if options.tiny else "run.json"
    out = options.out or (Path(tempfile.gettempdir()) if options.tiny else HERE / "results") / name
    measure(setup, options.parts, out)
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
