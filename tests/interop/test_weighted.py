"""Combined and converted adapters: where Hugging Face peft is exact we agree with it, and it reads what we write."""

from __future__ import annotations

import peft
import pytest
import torch

from deltatune import LoKrConfig, LoraConfig, PeftModel, convert_to_lora, get_peft_model, save_as_lora
from tiny import ids, llama, shake

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
FIELDS = {"lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def both(tmp_path, ranks=(4, 4)):
    """The same two LoRA adapters, here and in peft."""
    ours = get_peft_model(llama(), LoraConfig(r=ranks[0], **FIELDS), adapter_name="one")
    ours.add_adapter("two", LoraConfig(r=ranks[1], use_rslora=True, **FIELDS))
    shake(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    return ours, theirs.eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("svd", {}),
        ("svd", {"svd_rank": 2}),
        ("cat", {}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 5}),
        ("ties_svd", {"density": 0.4, "svd_rank": 5}),
        ("ties_svd", {"density": 0.4, "svd_rank": 5, "majority_sign_method": "frequency"}),
    ],
)
def test_same_as_peft_where_peft_works_on_the_changes(kind, options, tmp_path):
    ours, theirs = both(tmp_path, ranks=(4, 3))
    for model in (ours, theirs):
        model.add_weighted_adapter(["one", "two"], [0.8, 0.5], "new", kind, **options)
        model.set_adapter("new")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "ties", "svd"])
def test_peft_reads_what_was_combined(kind, tmp_path):
    ours, _ = both(tmp_path)
    ours.add_weighted_adapter(["one", "two"], [0.8, -0.5], "new", kind, density=0.5 if kind == "ties" else None)
    ours.set_adapter("new")
    ours.save_pretrained(tmp_path / "out", selected_adapters=["new"])
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "out" / "new").eval()
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)
    again = PeftModel.from_pretrained(llama(), tmp_path / "out" / "new")
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("rank", [3, 0.7])
def test_conversion_as_peft_does_it(rank, tmp_path):
    ours = get_peft_model(llama(), LoKrConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    shake(ours)
    ours.save_pretrained(tmp_path / "lokr")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "lokr")
    config, state = convert_to_lora(ours, rank)
    their_config, their_state = peft.convert_to_lora(theirs, rank)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in their_state.items()}
    for key in [k for k in state if "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        assert torch.allclose(state[other] @ state[key], their_state[other] @ their_state[key], atol=1e-5)
    assert config.task_type == "CAUSAL_LM"
    assert their_config.peft_type == config.peft_type


def test_peft_reads_what_was_converted(tmp_path):
    ours = get_peft_model(llama(), LoraConfig(r=4, use_dora=True, modules_to_save=["lm_head"], bias="none", **FIELDS))
    shake(ours)
    save_as_lora(tmp_path, ours)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)
