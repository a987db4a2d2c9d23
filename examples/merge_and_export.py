"""An adapter on its way out: saved, merged into a plain model, written as a LoRA. No downloads."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deltatune import AutoPeftModelForCausalLM, LoKrConfig, PeftModel, get_peft_model, save_as_lora


def main(steps: int = 10, output: str | None = None) -> dict[str, float]:
    """Returns the largest difference of logits for each way out."""
    folder = Path(output or tempfile.mkdtemp())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).save_pretrained(folder / "base")

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = LoKrConfig(r=4, alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-2)
    ids = torch.arange(10, 34).view(2, 12)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        live = model(input_ids=ids).logits
    model.save_pretrained(folder / "adapter")  # adapter_config.json and adapter_model.safetensors
    report = save_as_lora(folder / "as_lora", model)  # any method with a change of weights, as a LoRA
    print(f"as a LoRA: {report}")
    model.merge_and_unload().save_pretrained(folder / "merged")  # needs no adapter library any more

    ways = {
        "adapter": AutoPeftModelForCausalLM.from_pretrained(folder / "adapter"),
        "as_lora": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "as_lora"),
        "merged": AutoModelForCausalLM.from_pretrained(folder / "merged"),
    }
    differences = {}
    for name, loaded in ways.items():
        with torch.no_grad():
            differences[name] = (loaded.eval()(input_ids=ids).logits - live).abs().max().item()
        print(f"{folder / name}: logits differ by at most {differences[name]:.1e}")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="directory to write to; default: a temporary one")
    main(**vars(parser.parse_args()))
