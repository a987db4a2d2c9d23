"""Writes the files that `tests/formats/test_adapters_hub.py` reads, with the library `adapters` 1.3.

That library needs transformers 4.57, so this runs in an environment of its own:

    python -m venv /tmp/env && /tmp/env/bin/pip install torch==2.13.0 && /tmp/env/bin/pip install adapters==1.3.0
    /tmp/env/bin/python scripts/adapters_fixtures.py tests/formats/adapters_hub

Every folder holds one adapter with random weights as that library saves it, and `output.safetensors`: what the tiny
model `base-<kind>` beside it gives with the adapter.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from safetensors.torch import save_file

SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[5, 9, 22, 31, 8, 17], [12, 4, 3, 7, 30, 11]])
# one padded position: without any, that library's prefixes under SDPA's causal flag see the wrong keys
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])

#: name -> (configuration class, its options, kinds of model)
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "seq_bn": ("SeqBnConfig", {"reduction_factor": 4}, ("bert", "llama")),
    "seq_bn_options": (
        "SeqBnConfig",
        {"reduction_factor": 4, "use_gating": True, "scaling": "learned", "non_linearity": "gelu"},
        ("bert",),
    ),
    "seq_bn_residual": ("SeqBnConfig", {"reduction_factor": 4, "residual_before_ln": False}, ("bert", "llama")),
    "seq_bn_post_add": ("SeqBnConfig", {"reduction_factor": 4, "residual_before_ln": "post_add"}, ("bert",)),
    "seq_bn_norms": ("SeqBnConfig", {"reduction_factor": 4, "ln_before": True, "ln_after": True}, ("bert",)),
    "seq_bn_inside": (
        "SeqBnConfig",
        {"reduction_factor": 4, "mh_adapter": True, "ln_after": True, "adapter_residual_before_ln": True},
        ("bert", "llama"),
    ),
    "seq_bn_both": (
        "SeqBnConfig",
        {"reduction_factor": 4, "mh_adapter": True, "residual_before_ln": False},
        ("bert", "llama"),
    ),
    "double_inside": (
        "DoubleSeqBnConfig",
        {"reduction_factor": 4, "ln_after": True, "adapter_residual_before_ln": True},
        ("bert", "llama"),
    ),
    "seq_bn_inv": ("SeqBnInvConfig", {"reduction_factor": 4}, ("bert",)),
    "double_seq_bn": ("DoubleSeqBnConfig", {"reduction_factor": 4}, ("bert", "llama")),
    "par_bn": ("ParBnConfig", {"reduction_factor": 4}, ("bert", "llama")),
    "compacter": ("CompacterConfig", {"phm_dim": 2, "reduction_factor": 4}, ("bert",)),
    "compacter_plus": ("CompacterPlusPlusConfig", {"phm_dim": 2, "reduction_factor": 4}, ("bert",)),
    "lora": ("LoRAConfig", {"r": 4, "alpha": 8, "intermediate_lora": True, "output_lora": True}, ("bert", "llama")),
    "lora_qkv": ("LoRAConfig", {"r": 4, "alpha": 8, "attn_matrices": ["q", "k", "v"]}, ("bert",)),
    "ia3": ("IA3Config", {}, ("bert", "llama")),
    "prefix": ("PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 8}, ("bert", "llama")),
    "prefix_flat": ("PrefixTuningConfig", {"prefix_length": 3, "flat": True}, ("bert",)),
    "mam": ("MAMConfig", {}, ("bert",)),
    "unipelt": ("UniPELTConfig", {}, ("bert",)),
}


def base(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "bert":
        return adapters.BertAdapterModel(transformers.BertConfig(**SMALL, intermediate_size=32))
    config = transformers.LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, attn_implementation="eager")
    return adapters.LlamaAdapterModel(config)


def configuration(name: str, options: dict[str, Any]) -> Any:
    made = getattr(adapters, name)
    if name == "MAMConfig":
        prefix = adapters.PrefixTuningConfig(bottleneck_size=8, prefix_length=3)
        return made(prefix, adapters.ParBnConfig(reduction_factor=4))
    if name == "UniPELTConfig":
        prefix = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8, use_gating=True)
        bottleneck = adapters.SeqBnConfig(reduction_factor=4, use_gating=True)
        return made(prefix, bottleneck, adapters.LoRAConfig(r=4, use_gating=True))
    return made(**options)


@torch.no_grad()
def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for kind in ("bert", "llama"):
        model = base(kind)
        tensors = {
            k: v.contiguous().clone() for k, v in model.base_model.state_dict().items() if "prompt_tuning" not in k
        }
        (folder / f"base-{kind}").mkdir(parents=True)
        save_file(tensors, folder / f"base-{kind}" / "model.safetensors")
        config = {k: v for k, v in model.config.to_dict().items() if k in {*SMALL, "intermediate_size"}}
        config |= {"model_type": kind, "num_key_value_heads": 1} if kind == "llama" else {"model_type": kind}
        (folder / f"base-{kind}" / "config.json").write_text(json.dumps(config, indent=1))
    for name, (config_name, options, kinds) in CASES.items():
        for kind in kinds:
            model = base(kind).eval()
            model.add_adapter("task", config=configuration(config_name, options))
            generator = torch.Generator().manual_seed(1)
            for key, p in model.named_parameters():
                if "task" in key or "prefix_tunings" in key or "shared_parameters" in key:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            model.set_active_adapters("task")
            out = model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
            place = folder / f"{name}-{kind}"
            model.save_adapter(str(place), "task", with_head=False)
            to_safetensors(place)
            save_file(
                {"input_ids": IDS, "attention_mask": MASK, "output": out.contiguous()}, place / "output.safetensors"
            )
            model.set_active_adapters(None)
            moved = (model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state - out).abs().max()
            print(f"{place.name}: moves the output by {moved:.3f}")
            assert moved > 1e-3
    fusion(folder)


def to_safetensors(folder: Path) -> None:
    """That library cannot write tensors that share memory (prefixes) as safetensors: what a user would run too."""
    for pickle in folder.glob("pytorch_*.bin"):
        tensors = torch.load(pickle, weights_only=True)
        name = "adapter" if "adapter.bin" in pickle.name else "model_adapter_fusion"
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
        pickle.unlink()


def fusion(folder: Path) -> None:
    model = base("bert").eval()
    generator = torch.Generator().manual_seed(2)
    for name in ("a", "b"):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
    setup = adapters.composition.Fuse("a", "b")
    model.add_adapter_fusion(setup, "dynamic")
    for key, p in model.named_parameters():
        if ".a." in key or ".b." in key or "a,b" in key:
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.set_active_adapters(setup)
    out = model.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    place = folder / "fusion-bert"
    model.save_adapter_setup(str(place), setup)
    for part in (place, *place.iterdir()):
        if part.is_dir():
            to_safetensors(part)
    save_file({"input_ids": IDS, "attention_mask": MASK, "output": out.contiguous()}, place / "output.safetensors")
    print(place, sorted(p.name for p in place.rglob("*")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
