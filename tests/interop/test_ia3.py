"""IA³'s files move between Hugging Face peft and us, and weighted sums agree where peft's are sums of changes."""

from __future__ import annotations

import peft
import pytest
import torch

from deltatune import IA3Config, PeftModel, get_peft_model
from interop.nets import conv_net, tokens
from interop.roundtrip import both_ways, run
from tiny import bert, gpt2, llama, shake, t5

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]
CASES = {
    "attention": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "paper": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "random": {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"], "init_ia3_weights": False},
    "rules": {"target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
    "excluded": {"target_modules": ["v_proj"], "exclude_modules": ["0.self_attn.v_proj"], "feedforward_modules": []},
    "saved": {"target_modules": ["v_proj"], "feedforward_modules": [], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", CASES)
def test_llama(case, tmp_path):
    both_ways(llama, "IA3", tmp_path, task_type="CAUSAL_LM", **CASES[case])


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("layer", ["image", "point", "grouped", "cube", "head"])
def test_layers(layer, inputs, tmp_path):
    fields = {"target_modules": [layer], "feedforward_modules": [layer] if inputs else []}
    both_ways(conv_net, "IA3", tmp_path, tokens(), **fields)


def test_conv1d_of_gpt2(tmp_path):
    fields = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True}
    both_ways(gpt2, "IA3", tmp_path, task_type="CAUSAL_LM", **fields)


def test_a_head_beside_it(tmp_path):
    fields = {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]}
    both_ways(bert, "IA3", tmp_path, task_type="SEQ_CLS", **fields)


@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.5, -0.5]])
def test_weighted_sums(weights, tmp_path):
    """peft adds the gains themselves, which is the sum of the changes where the weights add up to 1."""
    fields = {**CASES["paper"], "task_type": "CAUSAL_LM"}
    ours = get_peft_model(llama(), IA3Config(**fields), adapter_name="one")
    ours.add_adapter("two", IA3Config(**fields))
    shake(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one").eval()
    theirs.load_adapter(tmp_path / "two", "two")
    for model in (ours, theirs):
        model.add_weighted_adapter(["one", "two"], weights, "new")
        model.set_adapter("new")
    assert torch.allclose(run(ours), run(theirs), atol=1e-5)
    assert isinstance(ours.peft_config["new"], IA3Config)
    ours.save_pretrained(tmp_path / "out", selected_adapters=["new"])
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "out" / "new").eval()
    assert torch.allclose(run(again), run(ours), atol=1e-5)


def test_what_the_structure_gave_is_named_in_the_file(tmp_path):
    for i, make in enumerate((llama, gpt2, bert)):
        ours = get_peft_model(make(), IA3Config())
        shake(ours)
        ours.save_pretrained(tmp_path / str(i))
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path / str(i)).eval()
        assert torch.allclose(run(theirs), run(ours), atol=1e-5)
        assert torch.equal(run(PeftModel.from_pretrained(make(), tmp_path / str(i))), run(ours))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_defaults_are_pefts(make):
    ours = get_peft_model(make(), IA3Config(task_type="CAUSAL_LM"))
    theirs = peft.get_peft_model(make(), peft.IA3Config(task_type="CAUSAL_LM"))

    def shapes(model):
        return {n: p.shape for n, p in model.named_parameters() if "ia3" in n}

    assert shapes(ours) == shapes(theirs)


def test_defaults_of_t5_are_pefts():
    ours = get_peft_model(t5(), IA3Config(task_type="SEQ_2_SEQ_LM"))
    theirs = peft.get_peft_model(t5(), peft.IA3Config(task_type="SEQ_2_SEQ_LM"))
    assert {n for n, _ in ours.named_parameters() if "ia3" in n} == {
        n for n, _ in theirs.named_parameters() if "ia3" in n
    }
