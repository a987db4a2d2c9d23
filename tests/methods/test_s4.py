"""S4: groups, equal budgets, and what each method of a group is."""

from __future__ import annotations

import pytest
import torch

from deltatune import PeftModel, S4Config, get_peft_model
from deltatune.errors import ConfigError
from deltatune.methods.s4 import spindle
from tiny import bert, gpt2, ids, llama, shake, t5

MAKE = {
    "bert": lambda: bert(num_hidden_layers=6),
    "gpt2": lambda: gpt2(n_layer=4),
    "t5": lambda: t5(num_layers=4),
    "llama": lambda: llama(num_hidden_layers=4),
}
BUDGET = 3000


def call(model, name):
    extra = {"decoder_input_ids": ids(3, 5)} if name == "t5" else {}
    return model(input_ids=ids(), **extra).logits


def test_groups_are_a_spindle():
    assert spindle(12) == [2, 4, 4, 2]
    assert [sum(spindle(n)) for n in range(4, 40)] == list(range(4, 40))
    assert spindle(4) == [1, 1, 1, 1]
    assert all(s[0] <= s[1] and s[3] <= s[2] for s in map(spindle, range(4, 40)))


@pytest.mark.parametrize("name", MAKE)
def test_every_layer_trains_the_same_number(name, tmp_path):
    config = S4Config(budget=BUDGET)
    model = get_peft_model(MAKE[name](), config)
    layers = config.layers(MAKE[name]())
    by_layer = {layer.path: 0 for layer in layers}
    for n, p in model.get_base_model().named_parameters():
        if p.requires_grad:
            by_layer[next(path for path in by_layer if n.startswith(f"{path}."))] += p.numel()
    assert by_layer == {layer.path: layer.total for layer in layers}
    assert all(abs(n - BUDGET) <= 0.02 * BUDGET for n in by_layer.values())
    shake(model)
    live = call(model, name)
    with model.disable_adapter(), torch.no_grad():  # torch's fused attention asks what needs gradients
        assert torch.equal(call(model, name), call(MAKE[name](), name))
    live.square().sum().backward()
    zero = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert not zero
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(MAKE[name](), tmp_path)
    assert fresh.load_report.clean
    assert torch.equal(call(fresh, name), live)


def test_a_method_that_is_left_out_takes_its_count_along():
    methods = [["adapter"], ["lora"], ["prefix"], ["bitfit", "prefix"]]
    layers = S4Config(budget=BUDGET, methods=methods).layers(MAKE["gpt2"]())
    assert [layer.methods for layer in layers] == methods
    full = layers[-1].total
    assert full - layers[-1].count("prefix") == layers[-1].count("bitfit") > 0
    assert [set(layer.sizes) for layer in layers] == [{"adapter"}, {"lora"}, {"prefix"}, {"prefix"}]


def test_without_prefixes_and_biases_it_starts_as_the_base():
    methods = [["adapter", "lora"]] * 4
    model = get_peft_model(MAKE["llama"](), S4Config(budget=BUDGET, methods=methods))
    with model.disable_adapter():
        base = call(model, "llama")
    assert torch.equal(call(model, "llama"), base)


def test_it_learns():
    torch.manual_seed(0)
    x = torch.randint(2, 60, (16, 6))
    y = (x[:, 0] > 30).long()
    model = get_peft_model(bert(num_hidden_layers=4), S4Config(budget=BUDGET, task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(input_ids=x, labels=y).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_refused():
    with pytest.raises(ConfigError, match="this one has 2 layers; give groups"):
        get_peft_model(llama(), S4Config(budget=BUDGET))
    with pytest.raises(ConfigError, match=r"groups \[1, 1, 1, 2\] make 5 layers, and a stack of the model has 4"):
        get_peft_model(MAKE["llama"](), S4Config(budget=BUDGET, groups=[1, 1, 1, 2]))
    with pytest.raises(ConfigError, match="budget=100 cannot be met within 2 %"):
        get_peft_model(MAKE["llama"](), S4Config(budget=100))
    with pytest.raises(ConfigError, match="'lorra', which is not one of .*did you mean 'lora'"):
        S4Config(methods=[["lorra"]])
    with pytest.raises(ConfigError, match=r"as \[2, 4, 4, 2\], not 2"):
        S4Config(groups=2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="S4 finds its places by layers"):
        S4Config(target_modules=["q_proj"])
