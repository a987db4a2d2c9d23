"""Decoding a batch of 16 with 0, 1, 4, 8 and 16 different LoRAs (r=16, all linear layers), beside peft.

The ratio of a decoding step's time to the plain base's, in alternation, median with min and max over rounds.

    python benchmarks/mixed_batch.py [--peft]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, write_json

HERE = Path(__file__).parent
ROWS, PROMPT, TOKENS, RANK = 16, 16, 12, 16


def adapted(library: Any, model: Any, adapters: int) -> Any:
    """The model with `adapters` LoRAs away from their start."""
    config = {"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    wrapped = library.get_peft_model(model, library.LoraConfig(**config), "a0")
    for i in range(1, adapters):
        wrapped.add_adapter(f"a{i}", library.LoraConfig(**config))
    return wrapped.eval()


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, **options: Any) -> float:
    """Seconds per generated token."""
    fixed = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **fixed, **options)
    return (time.perf_counter() - start) / TOKENS


def measure(library: Any, rounds: int) -> dict[str, list[float]]:
    """Case -> ratios to the base, one per round."""
    base, _ = load_smollm2()
    ids = torch.randint(5, 40000, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    model = adapted(library, base, 16)
    cases = {n: [f"a{i % n}" for i in range(ROWS)] for n in (1, 4, 8, 16)}
    ratios: dict[str, list[float]] = {str(n): [] for n in cases} | {"live": []}
    for k in range(rounds + 1):
        with model.disable_adapter():
            plain = decode(model, ids)
        model.set_adapter("a0")
        found = {"live": decode(model, ids)}
        found |= {str(n): decode(model, ids, adapter_names=names) for n, names in cases.items()}
        with model.disable_adapter():
            plain = (plain + decode(model, ids)) / 2
        if k:  # the first round warms up
            for case, seconds in found.items():
                ratios[case].append(seconds / plain)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peft", action="store_true", help="measure peft too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mixed_batch.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import deltatune

    libraries = {"deltatune": deltatune}
    if options.peft:
        import peft

        libraries["peft"] = peft
    results = {}
    for name, library in libraries.items():
        ratios = measure(library, options.rounds)
        results[name] = {c: [round(r, 3) for r in rs] for c, rs in ratios.items()}
        for case, rs in ratios.items():
            label = "one live adapter" if case == "live" else f"{case} different by row"
            print(f"{name:10} {label:24} {statistics.median(rs):.2f} × the base ({min(rs):.2f} to {max(rs):.2f})")
    write_json(options.out, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
