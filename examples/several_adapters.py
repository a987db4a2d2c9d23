"""Two adapters of different methods on one model: trained in one step, chosen row by row. No downloads."""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltatune import LoHaConfig, LoraConfig, get_peft_model


def main(steps: int = 40) -> list[float]:
    """Teaches each adapter to continue with its own token; returns the last losses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"), adapter_name="sevens")
    model.add_adapter("eights", LoHaConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))

    # Both train although only one is active: activity and training are separate here.
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    names = ["sevens"] * 4 + ["eights"] * 4
    wanted = torch.tensor([7] * 4 + [8] * 4)
    for step in range(steps):
        ids = torch.randint(10, 100, (8, 6))
        logits = model(input_ids=ids, adapter_names=names).logits[:, -1]  # one call, one adapter per row
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").view(2, 4).mean(1)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2d}  sevens {losses[0].item():.3f}  eights {losses[1].item():.3f}")

    model.eval()
    with torch.no_grad():
        ids = torch.randint(10, 100, (3, 6))
        mixed = model(input_ids=ids, adapter_names=["sevens", "eights", "__base__"]).logits[:, -1]
        print("a mixed batch continues with", mixed.argmax(-1).tolist(), "(the last row is the plain base)")
        model.set_adapter("eights")
        alone = model(input_ids=ids).logits[1, -1]
        print("eights alone gives the same row:", torch.allclose(alone, mixed[1], atol=1e-5))
    model.set_adapter(["sevens", "eights"])  # both run, their changes add up
    model.rename_adapter("eights", "acht")
    model.delete_adapter("sevens")
    print("adapters left:", list(model.peft_config))
    return losses.tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    main(**vars(parser.parse_args()))
