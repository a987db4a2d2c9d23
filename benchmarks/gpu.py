"""LoRA, dropout and DoRA against peft on one GPU: step time, tokens per second, peak memory; bfloat16 and NF4.

Models of 1B and 7B shape with random weights, so nothing is downloaded. Runs unattended within --minutes; what does not
fit the time is listed as left out, never dropped silently. Writes results/gpu.json.

    python benchmarks/gpu.py                       # one H100 or H200
    python benchmarks/gpu.py --device cpu --tiny   # to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import machine, saved_bytes, write_json
from run import METHODS, Setup, adapted, decode, libraries, loss_of, prompt, table, timed
from torch import nn

HERE = Path(__file__).parent
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def random_llama(shape: str, device: str, nf4: bool) -> nn.Module:
    """Random weights in bfloat16, on the device from the start; linear layers but the head in NF4 if asked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
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
                    setattr(parent, name, in_nf4(child, device))
    return model.requires_grad_(False).train()


def in_nf4(layer: nn.Linear, device: str) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return new.to(device)


def cases(shapes: list[str]) -> Iterator[tuple[str, bool]]:
    for shape in shapes:
        for nf4 in (False, True):
            yield shape, nf4


def peak(setup: Setup) -> float:
    """GB that were in use at most since the last reset; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if setup.device == "cuda" else 0.0


def steps(setup: Setup, base: nn.Module, label: str, deadline: float) -> tuple[dict[str, Any], list[str]]:
    """Rows of ratios to the base, tokens/s, peak GB and MB kept; and what there was no time for."""
    ids = prompt(setup, base)
    found: dict[str, Any] = {}
    left: list[str] = []
    for name, options in METHODS.items():
        for lib, module in libraries().items():
            if time.monotonic() > deadline:
                left.append(f"{label}, {name}, {lib}")
                continue
            model = adapted(module, base, setup.r, **options)
            with saved_bytes(model) as count:
                loss = loss_of(model, ids)
                kept = count() / 1e6
            loss.backward()
            del loss
            if setup.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times: list[tuple[float, float]] = []
            for _ in range(setup.rounds + 1):
                plain = timed(setup, lambda: loss_of(base, ids).backward())
                times.append((plain, timed(setup, lambda model=model: loss_of(model, ids).backward())))
                model.zero_grad(set_to_none=True)
            times = times[1:]
            per_second = setup.rows * setup.length / statistics.median(t for _, t in times)
            for row, values in (
                (f"{label} step: {name}", [t / p for p, t in times]),
                (f"{label} tokens/s: {name}", [per_second]),
                (f"{label} peak GB: {name}", [peak(setup)]),
                (f"{label} MB kept: {name}", [kept]),
            ):
                found.setdefault(row, {})[lib] = values
            del model
            gc.collect()
            if setup.device == "cuda":
                torch.cuda.empty_cache()
    return found, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers")
    parser.add_argument("--minutes", type=float, default=8.5, help="cases that would start later are left out")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; --device cpu --tiny shows that the script runs")
    deadline = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {}
    left: list[str] = []
    for shape, nf4 in cases(["tiny"] if options.tiny else ["1B", "7B"]):
        label = f"{shape} {'NF4' if nf4 else 'bf16'}"
        if time.monotonic() > deadline:
            left.append(label)
            continue
        base = random_llama(shape, options.device, nf4)
        size = {"rows": 2, "length": 16, "rounds": 1} if options.tiny else {"rows": 4, "length": 1024, "rounds": 5}
        setup = Setup(lambda dtype, base=base: base, device=options.device, tokens=4 if options.tiny else 16, **size)
        rows, missed = steps(setup, base, label, deadline)
        results |= rows
        left += missed
        if not nf4 and time.monotonic() < deadline:
            base.eval()
            results |= {f"{label} {name}": row for name, row in decode(setup).items()}
        write_json(options.out, {"machine": machine(), "results": results, "left_out": left})
        del base, setup
    print(table(results))
    print("left out for want of time:", ", ".join(left) or "nothing")


if __name__ == "__main__":
    main()
