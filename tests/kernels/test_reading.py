"""Generation: a call that was worked out at the first token equals the ordinary one."""

from concurrent import futures

import pytest
import torch
from torch import nn

from deltatune import LoraConfig, get_peft_model
from deltatune.core import combine


@pytest.fixture
def answers(monkeypatch):
    """What every hosted call got: its output from `read`, or None."""
    found = []
    inner = combine.read

    def read(*args):
        found.append(inner(*args))
        return found[-1]

    monkeypatch.setattr("deltatune.core.hosts.read", read)
    return found


def adapted(dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)).to(dtype)
    config = LoraConfig(r=8, target_modules=["0", "2"], init_lora_weights=False, **options)
    model = get_peft_model(net, config, "a")
    for name, r in (("b", 8), ("c", 3)):
        config = LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False, **options)
        model.add_adapter(name, config)
    return model.eval()


NAMES = {
    "in order": (["a", "a", "b", "b"], True),
    "mixed up": (["b", "a", "a", "b"], True),
    "one for all": (["a", "a", "a", "a"], True),
    "two ranks": (["a", "c", "c", "a"], True),
    "rows without": (["a", "__base__", "b", "__base__"], True),
    "uneven": (["a", "a", "a", "b"], False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("names", "quick"), NAMES.values(), ids=NAMES)
@torch.no_grad()
def test_rows(names, quick, dtype, answers):
    model = adapted(dtype)
    x = torch.randn(4, 3, 16, dtype=dtype)
    expected = model(x, adapter_names=names)
    assert not answers
    plan = model.adapters.plan
    state = model.adapters.rows(names, 3)
    with plan.call(state), plan.steady():
        found = [model.base_model.model(x), model.base_model.model(x), model.base_model.model(x[:, :1])]
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for y in found:
        torch.testing.assert_close(y, expected[:, : y.shape[1]], atol=tolerance, rtol=tolerance)
    assert [y is not None for y in answers] == [quick] * 6


@torch.no_grad()
def test_one_adapter(answers):
    model = adapted()
    x = torch.randn(4, 3, 16)
    plan = model.adapters.plan
    expected = {}
    for name in "abc":
        model.set_adapter(name)
        expected[name] = model(x)
    with plan.steady():
        for name in "abca":  # another state is another call
            model.set_adapter(name)
            torch.testing.assert_close(model(x), expected[name])
        model.set_adapter(["a", "b"])  # their sum is no single pair
        together = model(x)
    assert [y is not None for y in answers] == [True] * 8 + [False] * 2
    torch.testing.assert_close(model(x), together)


def test_not_while_training_or_dropping(answers):
    model = adapted(lora_dropout=0.5)
    x = torch.randn(4, 16)
    with model.adapters.plan.steady():
        model(x).sum().backward()
        assert set(answers) == {None}
        with torch.no_grad():
            assert torch.equal(model(x), model(x))
            assert answers[-1] is not None
            model.train()
    with model.adapters.plan.steady(), torch.no_grad():
        assert not torch.equal(model(x), model(x))


@torch.no_grad()
def test_weights_are_read_again_in_the_next_generation():
    model = adapted()
    x = torch.randn(2, 16)
    with model.adapters.plan.steady():
        before = model(x)
    model.adapters.deltas("a")[0].lora_A.weight.mul_(2)
    with model.adapters.plan.steady():
        after = model(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x))


def test_generations_of_several_threads_end_one_by_one():
    """Whichever ends last, nothing that was worked out stays."""
    plan = adapted().adapters.plan
    with futures.ThreadPoolExecutor(1) as other:
        theirs = plan.steady()
        with plan.steady():
            assert not other.submit(lambda: plan.is_steady).result()
            other.submit(theirs.__enter__).result()
            assert plan.is_steady
        assert not plan.is_steady
        assert other.submit(lambda: plan.is_steady).result()
        other.submit(theirs.__exit__, None, None, None).result()
        assert not other.submit(lambda: plan.is_steady).result()
    assert not plan.is_steady
