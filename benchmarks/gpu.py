"""The table of run.py on one GPU, with tokens per second and peak memory: models of 1B and 7B shape, bfloat16 and NF4.

Weights are random, so nothing is downloaded. Both libraries run, and deltatune's Triton kernels beside its torch path
wherever a case has one (NF4 layers; mixed batches). Outputs and gradients are compared before anything is timed.

Runs unattended within --minutes. A piece that would start later, that is cut off by the clock, for which there is no
memory or that fails is listed as left out, never dropped silently; results are written after every piece, to
results/gpu.json. Triton's kernels are tried in a process of their own first, since a faulty one would spoil all later
pieces of its process.

    python benchmarks/gpu.py                       # one H100 or H200
    python benchmarks/gpu.py --device cpu --tiny   # to see that it runs (TRITON_INTERPRET=1: the kernels, too)
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import machine, saved_bytes, write_json
from run import METHODS, PARTS, Setup, adapted, libraries, loss_of, prompt, timed
from torch import nn

from deltatune import kernels
from deltatune.errors import ConfigError
from deltatune.kernels import gpu

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
#: column -> (library, mode of its kernels)
COLUMNS: dict[str, tuple[str, str]] = {
    "peft": ("peft", "fused"),
    "deltatune": ("deltatune", "fused"),
    "deltatune, Triton": ("deltatune", "triton"),
}
#: seconds beyond the time after which a piece is interrupted
GRACE = 15.0
Rows = dict[str, dict[str, list[float]]]


# ---------------------------------------------------------------------- what is measured on
def random_llama(shape: str, device: str, nf4: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Random weights, on the device from the start; linear layers but the head in NF4 if asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            vocabulary = 512 if shape == "tiny" else 32000
            model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SHAPES[shape]))
    finally:
        torch.set_default_dtype(torch.float32)
    if nf4:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and name != "lm_head":
                    setattr(parent, name, in_nf4(child, device, dtype))
    return model.requires_grad_(False).train()


def in_nf4(layer: nn.Linear, device: str, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
    new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return new.to(device)


@cache
def no_triton() -> str | None:
    """Why Triton's kernels cannot run here; None if they can."""
    try:
        gpu.require("triton")
    except ConfigError as error:
        return str(error)
    if not torch.cuda.is_available():
        return None
    command = [sys.executable, __file__, "--try-kernels"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "they took more than two minutes for a small model"
    lines = (done.stderr or done.stdout).strip().splitlines() or ["nothing was said"]
    return None if done.returncode == 0 else f"they failed on this GPU: {lines[-1]}"


def try_kernels(device: str) -> None:
    """The kernels on a small model, against the torch path; raises where they fail or are far from it."""
    gpu.require("triton")
    for nf4 in (False, True):
        base = random_llama("tiny", device, nf4)
        ids = prompt(Setup(lambda dtype: base, rows=4, length=40, device=device), base)  # noqa: B023
        for row, values in differences(base, ids, "tiny").items():
            (value,) = values["deltatune, Triton"]
            assert value < 0.1, f"{row}: {value}"


def columns(with_kernels: bool) -> Iterator[tuple[str, Any, str]]:
    """(column, library, mode) of what can run here."""
    modules = libraries()
    for column, (library, mode) in COLUMNS.items():
        if mode == "fused" or (with_kernels and no_triton() is None):
            yield column, modules[library], mode


# ---------------------------------------------------------------------- the clock
class CutOffError(Exception):
    """The time is over."""


@dataclass
class Run:
    """What was found so far, written after every piece; and when to stop."""

    out: Path
    minutes: float
    results: Rows = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = time.monotonic()

    def over(self) -> bool:
        return time.monotonic() - self.start > 60 * self.minutes

    @contextlib.contextmanager
    def alarm(self) -> Iterator[None]:
        """Interrupts a piece that runs on beyond the time."""

        def cut(*_: Any) -> None:
            raise CutOffError

        before = signal.signal(signal.SIGALRM, cut)
        signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes + GRACE)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def piece(self, name: str, measure: Callable[[], Rows]) -> None:
        """One piece of the table, if there is time and memory for it."""
        if self.over():
            self.left.append(f"{name} (no time)")
            return
        before = time.monotonic()
        try:
            found = measure()
        except CutOffError:
            found, why = {}, "cut off by the clock"
        except torch.OutOfMemoryError:
            found, why = {}, "out of memory"
        except Exception as error:  # the others go on
            traceback.print_exc()
            found, why = {}, f"failed: {type(error).__name__}: {error}"[:200]
        else:
            why = ""
        if why:
            self.left.append(f"{name} ({why})")
        for row, values in found.items():
            self.results.setdefault(row, {}).update(values)
        print(
            f"{time.monotonic() - self.start:5.0f} s: {name} {why or f'{time.monotonic() - before:.1f} s'}", flush=True
        )
        self.write()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def write(self) -> None:
        about = {**machine(), "peft": metadata.version("peft"), "bitsandbytes": metadata.version("bitsandbytes")}
        about["triton"] = no_triton() or metadata.version("triton")
        measured = {" ".join(map(str, key)): times for key, times in gpu.measured().items()}
        seconds = round(time.monotonic() - self.start)
        all_ = {"machine": about, "seconds": seconds, "results": self.results, "left_out": self.left}
        write_json(self.out, {**all_, "torch and Triton, s": measured})


# ---------------------------------------------------------------------- pieces
def agreement(setup: Setup) -> Rows:
    """How far losses and gradients are from peft's in float32, adapters copied name by name."""
    found = PARTS["agreement"](setup)
    return {f"largest relative difference from peft: {name}": {"deltatune": [v]} for name, v in found.items()}


def kernels_agree(base: nn.Module, ids: torch.Tensor, label: str) -> Rows:
    """`differences`, where there are kernels."""
    return {} if no_triton() is not None else differences(base, ids, label)


def differences(base: nn.Module, ids: torch.Tensor, label: str) -> Rows:
    """Loss and gradients of LoRA and of a mixed batch with Triton's kernels, relative to those of the torch path."""
    import deltatune

    model = adapted(deltatune, base, 16)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    rows = ["default" if i % 3 else "other" for i in range(len(ids))]
    found: Rows = {}
    for name, options in {"LoRA": {}, "mixed batch": {"adapter_names": rows}}.items():
        grads: list[list[torch.Tensor]] = []
        for mode in ("fused", "triton"):
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            with kernels.use(mode):
                loss = model(inputs_embeds=embeds, labels=ids, use_cache=False, **options).loss
                trained = [p for p in model.parameters() if p.requires_grad]
                grads.append([loss, *torch.autograd.grad(loss, [embeds, *trained], allow_unused=True)])
        pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(*grads, strict=True) if a is not None]
        worst = max(float((a - b).norm() / a.norm().clamp_min(1e-20)) for a, b in pairs)
        found[f"{label} largest relative difference from the torch path: {name}"] = {"deltatune, Triton": [worst]}
    return found


def peak(setup: Setup) -> list[float]:
    """GB that were in use at most since the last reset, the base's weights included; nothing without a GPU."""
    return [torch.cuda.max_memory_allocated() / 1e9] if setup.device == "cuda" else []


def step(setup: Setup, base: nn.Module, label: str, column: str, library: Any, mode: str, method: str) -> Rows:
    """Forward and backward: the ratio to the base's, in alternation; tokens/s, peak GB and MB kept for backward."""
    ids = prompt(setup, base)
    model = adapted(library, base, setup.r, **METHODS[method])
    with kernels.use(mode):
        with saved_bytes(model) as count:
            loss = loss_of(model, ids)
            kept = count() / 1e6
        loss.backward()
        model.zero_grad(set_to_none=True)
        if setup.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times: list[tuple[float, float]] = []
        before = timed(setup, lambda: loss_of(base, ids).backward())
        for _ in range(setup.rounds + 1):
            own = timed(setup, lambda: loss_of(model, ids).backward())
            model.zero_grad(set_to_none=True)
            after = timed(setup, lambda: loss_of(base, ids).backward())
            times.append((own, (before + after) / 2))
            before = after
    del times[0]
    tokens = setup.rows * setup.length
    return {
        f"{label} step: {method}": {column: [own / plain for own, plain in times]},
        f"{label} tokens/s: {method}": {column: [tokens / own for own, _ in times]},
        f"{label} peak GB: {method}": {column: peak(setup)},
        f"{label} MB kept: {method}": {column: [kept]},
    }


def frozen(setup: Setup, base: nn.Module, label: str) -> Rows:
    """The base's own step, the limit of the others."""
    ids = prompt(setup, base)
    with saved_bytes(base) as count:
        loss = loss_of(base, ids)
        kept = count() / 1e6
    loss.backward()
    if setup.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [timed(setup, lambda: loss_of(base, ids).backward()) for _ in range(setup.rounds + 1)][1:]
    values = {
        "tokens/s": [setup.rows * setup.length / t for t in times],
        "peak GB": peak(setup),
        "MB kept": [kept],
    }
    return {f"{label} {what}: frozen": {"deltatune": v} for what, v in values.items()}


@torch.no_grad()
def decode(setup: Setup, base: nn.Module, label: str, column: str, library: Any, mode: str) -> Rows:
    """Seconds per token of 16 rows over the base's; `n different` gives each run of 16/n rows an adapter."""
    ids = prompt(Setup(setup.make, rows=16, length=16, device=setup.device), base)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options |= {"max_new_tokens": setup.tokens, "min_new_tokens": setup.tokens}
    model = adapted(library, base, setup.r)
    names = ["default", *(f"a{i}" for i in range(1, setup.adapters))]
    for name in names[1:]:
        model.add_adapter(name, copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("default")
    model.eval()
    cases: dict[str, dict[str, Any]] = {"one live": {}}
    for n in (4, 8, 16):
        cases[f"{n} different"] = {"adapter_names": [names[i * n // 16] for i in range(16)]}
    found: Rows = {}

    def plain() -> float:
        with model.disable_adapter():
            return timed(setup, lambda: model.generate(ids, **options))

    with kernels.use(mode):
        before = plain()
        for k in range(min(setup.rounds, 2) + 1):
            for case, extra in cases.items():
                own = timed(setup, lambda extra=extra: model.generate(ids, **options, **extra))
                after = plain()
                if k:
                    values = {"decode": 2 * own / (before + after), "decoded tokens/s": 16 * setup.tokens / own}
                    for what, value in values.items():
                        found.setdefault(f"{label} {what}: {case}", {}).setdefault(column, []).append(value)
                before = after
    return found


def choices(device: str, shape: str) -> Rows:
    """One NF4 layer and one mixed batch, timed by torch and by Triton at several sizes: what "measure" would choose."""
    import deltatune

    wide, narrow = SHAPES[shape]["intermediate_size"], SHAPES[shape]["hidden_size"]
    for inputs, out in ((narrow, narrow), (narrow, wide), (wide, narrow)):
        layer = in_nf4(nn.Linear(inputs, out, bias=False, device=device, dtype=torch.bfloat16), device, torch.bfloat16)
        config = deltatune.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
        model = deltatune.get_peft_model(nn.Sequential(layer), config)
        for name in ("a", "b", "c"):
            model.add_adapter(name, config)
        for tokens in (16, 256, 4096):
            x = torch.randn(16, tokens // 16, inputs, device=device, dtype=torch.bfloat16)
            for grads in (False, True):
                with kernels.use("measure"), torch.set_grad_enabled(grads):
                    model(x)
                    model(x, adapter_names=[["default", "a", "b", "c"][i // 4] for i in range(16)])
                    model(x, adapter_names=["default"] * 9 + ["a"] * 4 + ["b"] * 2 + ["c"])
    return {}


# ---------------------------------------------------------------------- all of it
def case(run: Run, shape: str, nf4: bool, setup: Setup) -> None:
    """Steps and decoding of one model."""
    label = f"{shape} {'NF4' if nf4 else 'bf16'}"
    if run.over():
        run.left.append(f"{label} (no time)")
        return
    base = random_llama(shape, setup.device, nf4)
    run.piece(f"{label}, kernels agree", lambda: kernels_agree(base, prompt(setup, base)[:, :64], label))
    run.piece(f"{label}, frozen", lambda: frozen(setup, base, label))
    for method in METHODS:
        for column, library, mode in columns(with_kernels=nf4):
            run.piece(f"{label}, {method}, {column}", partial(step, setup, base, label, column, library, mode, method))
    base.eval()
    for column, library, mode in columns(with_kernels=True):
        run.piece(f"{label}, decode, {column}", partial(decode, setup, base, label, column, library, mode))


def table(results: Rows) -> str:
    def show(values: list[float] | None) -> str:
        if not values:
            return "–"
        text = f"{statistics.median(values):.4g}"
        return text if len(values) == 1 else f"{text} ({min(values):.4g} to {max(values):.4g})"

    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" + "|---:" * len(COLUMNS) + "|"]
    return "\n".join(
        [*lines, *(f"| {n} | {' | '.join(show(r.get(c)) for c in COLUMNS)} |" for n, r in results.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers")
    parser.add_argument("--minutes", type=float, default=8.25, help="pieces that would start later are left out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--try-kernels", action="store_true", help="only see that Triton's kernels work here")
    options = parser.parse_args()
    if options.try_kernels:
        try_kernels(options.device)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; --device cpu --tiny shows that the script runs")
    run = Run(options.out, options.minutes)
    with run.alarm():
        try:
            measure(run, options.device, options.tiny)
        except CutOffError:  # while a model was made
            run.left.append("all that comes after (cut off by the clock)")
    run.write()
    print(table(run.results))
    for key, (first, second) in gpu.measured().items():
        print(f"{' '.join(map(str, key))}: torch {1e6 * first:.0f} µs, Triton {1e6 * second:.0f} µs")
    print("Triton's kernels:", no_triton() or "measured")
    print("left out:", "; ".join(run.left) or "nothing")
    if any("failed" in reason for reason in run.left):
        raise SystemExit(1)


def measure(run: Run, device: str, is_tiny: bool) -> None:
    """The pieces, those that only a GPU can tell first."""
    size = {"rows": 2, "length": 16, "rounds": 1, "tokens": 4}
    if not is_tiny:
        size = {"rows": 4, "length": 1024, "rounds": 4, "tokens": 12}
    small = "tiny" if is_tiny else "1B"
    exact = Setup(lambda dtype: random_llama(small, device, dtype=getattr(torch, dtype)), device=device, **size)
    run.piece("agreement", lambda: agreement(exact))
    if device == "cuda" and no_triton() is None:
        run.piece("which way is faster", lambda: choices(device, "tiny" if is_tiny else "7B"))
    for shape in ["tiny"] if is_tiny else ["1B", "7B"]:
        for nf4 in (False, True):
            case(run, shape, nf4, Setup(lambda dtype: nn.Identity(), device=device, **size))
    for part in ("life",) if is_tiny else ("import", "life"):
        run.piece(f"{small}, {part}", partial(PARTS[part], exact))


if __name__ == "__main__":
    main()
