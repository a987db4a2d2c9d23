"""What is kept for backward: a ladder beside the base, against methods whose gradient goes through it.

SmolLM2-135M in bfloat16 without its head, one batch of 4 rows of 64 tokens. Bytes that autograd keeps for backward, and
bytes of gradients and AdamW's moments: both are counted and not timed, so a second run prints the same numbers.

    python benchmarks/ladder_memory.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import load_smollm2, machine, saved_bytes, write_json

import deltatune
from deltatune import get_peft_model

HERE = Path(__file__).parent
ALL = {"target_modules": "all-linear"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "Full copies of every block": ("FullConfig", {"target_modules": r"model\.layers\.\d+"}),
    "LoRA, all linear layers": ("LoraConfig", ALL),
    "LoRA, query and value": ("LoraConfig", {}),
    "LN tuning": ("LNTuningConfig", {}),
    "IA³": ("IA3Config", {}),
    "Ladder, d/4": ("LadderConfig", {"reduction_factor": 4}),
    "Ladder, d/8": ("LadderConfig", {"reduction_factor": 8}),
    "Ladder, d/8, every third rung": (
        "LadderConfig",
        {"reduction_factor": 8, "layers_to_transform": list(range(2, 30, 3))},
    ),
}


def run(base: Any, config: str, options: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
    """Counts one step's bytes; the base is given back as it was."""
    model = get_peft_model(base, getattr(deltatune, config)(task_type="CAUSAL_LM", **options)).train()
    with saved_bytes(model) as count:
        hidden = model.get_base_model().model(input_ids=x)[0]
        kept = count()
    del hidden
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(p.numel() * p.element_size() * 3 for p in trained)  # the gradient and two moments
    trainable, total = model.get_nb_trainable_parameters()
    model.unload()
    return {
        "trainable": trainable,
        "share": trainable / total,
        "kept_mb": kept / 2**20,
        "state_mb": state / 2**20,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| method | trained parameters | MB kept for backward | MB of gradients and moments |",
        "|---|---:|---:|---:|",
    ]
    for name, r in results.items():
        share = 100 * r["share"]
        lines.append(f"| {name} | {r['trainable']:,} ({share:.2f} %) | {r['kept_mb']:.1f} | {r['state_mb']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    base, _ = load_smollm2("bfloat16")
    x = torch.randint(2, 40000, (4, 64), generator=torch.Generator().manual_seed(0))
    results = {name: run(base, config, options, x) for name, (config, options) in METHODS.items()}
    write_json(HERE / "results" / "ladder_memory.json", {"machine": machine(), "results": results})
    print(table(results))


if __name__ == "__main__":
    main()
