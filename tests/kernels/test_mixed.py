"""Mixed batches: even runs, uneven ones, several ranks, rows without adapter; against one adapter at a time."""

import pytest
import torch
from torch import nn

from deltatune import LoraConfig, get_peft_model
from deltatune.core import edits

BATCHES = {
    "even, in order": ["a", "a", "b", "b"],
    "even, mixed up": ["b", "a", "a", "b"],
    "skewed": ["a", "a", "a", "b"],
    "three ranks": ["c", "a", "a", "b"],
    "rows without": ["a", "__base__", "b", "a", "__base__"],
    "one": ["b", "__base__", "b"],
    "none": ["__base__", "__base__"],
}


def adapted(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)).to(dtype)
    configs = {
        n: LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False)
        for n, r in zip("abc", (8, 8, 3), strict=True)
    }
    model = get_peft_model(net, configs["a"], "a")
    for name in "bc":
        model.add_adapter(name, configs[name])
    return model.eval()


def one_by_one(model, x, names):
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_equals_one_adapter_at_a_time(names, positions):
    model = adapted()
    x = torch.randn(len(names), positions, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=names), one_by_one(model, x, names), rtol=1e-4, atol=1e-5)
    params = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(y.square().sum() + 0 * sum(p.sum() for p in params), params)
        for y in (model(x, adapter_names=names), one_by_one(model, x, names))
    )
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_uneven_runs_share_one_grouped_product(monkeypatch):
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped product")
    made = []
    inner = edits.F.grouped_mm
    monkeypatch.setattr(edits.F, "grouped_mm", lambda *a, **k: made.append(1) or inner(*a, **k))
    model = adapted()
    x = torch.randn(4, 16)
    model(x, adapter_names=BATCHES["skewed"])
    assert len(made) == 4  # two for each of two layers
    model(x, adapter_names=BATCHES["even, in order"])
    assert len(made) == 4


def test_ranks_are_padded_to_whole_blocks():
    model = adapted()
    first, second = (model.adapters.deltas(n)[0] for n in "ac")
    a, b = first.stack([first.factors(), second.factors()], torch.float32)
    assert a.shape == (2, 8, 16)
    assert b.shape == (2, 24, 8)
    torch.testing.assert_close(b[1] @ a[1], second.factors()[1] @ second.factors()[0])


def test_rows_are_sorted_once_a_call():
    model = adapted()
    state = model.adapters.rows(BATCHES["even, mixed up"], 1)
    with model.adapters.plan.call(state), torch.no_grad():
        model.base_model.model(torch.randn(4, 16))
        known = dict(state.rows._known)
        model.base_model.model(torch.randn(4, 16))
    assert known.keys() == state.rows._known.keys()
    assert all(state.rows._known[key] is value for key, value in known.items())


def test_compiles_whole():
    model, names, x = adapted(), ["c", "a", "a", "b", "__base__"], torch.randn(5, 3, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    params = [p for p in model.parameters() if p.requires_grad]
    found, expected = (run(x, adapter_names=names) for run in (compiled, model))
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad(y.square().sum(), params, allow_unused=True) for y in (found, expected))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
