"""The fused path against the plain one, which is the definition."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltatune import LoraConfig, LoraFAConfig, get_peft_model, kernels
from deltatune.errors import ConfigError
from deltatune.kernels import low_rank, shared_input
from deltatune.kernels.dropout import FEW, dropper
from deltatune.kernels.low_rank import low_rank_linear


class Net(nn.Module):
    """Three layers that read one input, and one that reads their sum."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 10, bias=bias) for _ in range(3))
        self.out = nn.Linear(10, 12, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.q(x) + self.k(x) * self.v(x)))


def adapted(dtype: torch.dtype = torch.float64, cls: type = LoraConfig, bias: bool = True, **options: object):
    torch.manual_seed(0)
    config = cls(r=4, target_modules=["q", "k", "v", "out"], init_lora_weights=False, **options)
    return get_peft_model(Net(bias).to(dtype), config).train()


def gradients(model: nn.Module, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of everything that trains."""
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    model.zero_grad()
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.fixture
def calls(monkeypatch):
    """One entry for every layer that a kernel's node is made for."""
    made = []
    one, many = low_rank._LowRankLinear.apply, shared_input._LowRankLinears.apply
    monkeypatch.setattr(low_rank._LowRankLinear, "apply", lambda *args: made.append(1) or one(*args))
    monkeypatch.setattr(
        shared_input._LowRankLinears,
        "apply",
        lambda x, numbers, *tensors: made.extend(numbers[0]) or many(x, numbers, *tensors),
    )
    return made


OPTIONS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "fa": {"cls": LoraFAConfig}}


def as_plain(model, x, mode, calls, *, nodes, rtol):
    """Output and gradients in this mode are the plain path's, by so many nodes."""
    with kernels.use("plain"):
        expected = gradients(model, x)
    assert not calls
    with kernels.use(mode):
        found = gradients(model, x)
    assert len(calls) == nodes
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("mode", ["fused", "lean"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_plain_path(options, bias, mode, calls):
    model = adapted(bias=bias, **options)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    as_plain(model, x, mode, calls, nodes=4, rtol=1e-10)


def test_a_magnitude_of_zero_gets_its_gradient():
    model = adapted(use_dora=True)
    x = torch.randn(4, 12, dtype=torch.float64)
    with torch.no_grad():
        model.base_model.model.q.lora_magnitude_vector.default.weight[2:4] = 0
    with kernels.use("plain"):
        expected = gradients(model, x)
    for one, two in zip(expected, gradients(model, x), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("with_c", [False, True])
def test_gradcheck(with_c):
    torch.manual_seed(0)
    x, w, bias, a, b, c = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=bool(grad))
        for shape, grad in (((2, 3, 5), 1), ((4, 5), 0), ((4,), 0), ((2, 5), 1), ((4, 2), 1), ((4,), 1))
    )
    if with_c:
        torch.autograd.gradcheck(lambda x, a, b, c: low_rank_linear(x, (w, bias), a, b, 0.5, c=c), (x, a, b, c))
    torch.autograd.gradcheck(lambda x, a, b: low_rank_linear(x, (w, bias), a, b, 0.5), (x, a, b))
    y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, y, a, b: low_rank_linear(x, y, a, b, 0.5), (x, y, a, b))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_has_the_gradient_of_its_own_mask(p):
    """With the seed fixed the layer is linear in each factor, so numerical derivatives are exact."""

    def run(x, a, b):
        torch.manual_seed(3)
        return low_rank_linear(x, (w, None), a, b, 2.0, p=p)

    torch.manual_seed(0)
    w = torch.randn(4, 6, dtype=torch.float64)
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 7, 6), (2, 6), (4, 2))]
    assert torch.autograd.gradcheck(run, tensors)
    assert not torch.equal(run(*tensors), low_rank_linear(tensors[0], (w, None), *tensors[1:], 2.0))


@pytest.mark.parametrize("p", [0.001, 0.05, FEW, 0.5])
def test_dropout_is_independent_with_the_right_probability(p):
    n, runs = 40_000, 25
    kept = torch.stack([dropper(torch.Size([n]), torch.device("cpu"), p, seed)(torch.ones(n)) for seed in range(runs)])
    gone = 1 - kept
    sigma = math.sqrt(p * (1 - p))
    assert abs(float(gone.mean()) - p) < 5 * sigma / math.sqrt(n * runs)
    for lag in (1, 2, 7, 576):  # neighbours, and the same column of the next row
        pairs = float((gone[:, :-lag] * gone[:, lag:]).mean())
        assert abs(pairs - p * p) < 6 * p / math.sqrt(n * runs)
    per_place = gone.sum(0)  # binomial over seeds: no position is favoured
    assert abs(float(per_place.float().var()) - runs * p * (1 - p)) < 0.05 * runs * p * (1 - p) + 1e-3
    assert abs(float(gone[:, : n // 2].mean() - gone[:, n // 2 :].mean())) < 8 * sigma / math.sqrt(n * runs)


def test_dropout_of_a_seed_is_the_same_and_rescaled():
    model = adapted(torch.float32, lora_dropout=0.1)
    x = torch.randn(64, 12)
    outs = []
    for _ in range(2):
        torch.manual_seed(5)
        outs.append(gradients(model, x))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    with torch.no_grad():
        layer = model.base_model.model.q
        mean = torch.stack([layer(x) for _ in range(600)]).mean(0)
        layer.eval()
        torch.testing.assert_close(mean, layer(x), atol=0.25, rtol=0.05)


def test_one_storage_is_kept_for_all_readers_of_an_input():
    model = adapted(torch.bfloat16, lora_dropout=0.1)
    assert model.base_model.model.q.lora_A.default.weight.dtype == torch.float32
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(500, 12, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    # x once; k(x) and v(x) for their product; tanh's output, which the last layer reads; h of rank 4, four times
    assert sum(kept.values()) == 2 * 500 * (12 + 10 + 10 + 10 + 4 * 4)
    y.sum().backward()


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(options, reentrant):
    model = adapted(**options)
    x = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(1)
    expected = gradients(model, x)
    torch.manual_seed(1)
    found = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast(options):
    model = adapted(torch.float32, **options)
    x = torch.randn(6, 12)
    exact = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
    assert found[0].dtype == torch.bfloat16
    for one, two in zip(exact[2:], found[2:], strict=True):
        assert two.dtype == torch.float32
        assert float((one - two).norm() / one.norm()) < 0.05


def test_a_layer_that_is_not_plain_gets_its_output_first(calls):
    """A forward of accelerate's, a quantised weight or autocast: the layer makes its product itself."""
    plain, patched = adapted(bias=True), adapted(bias=True)
    for layer in patched.base_model.model.children():
        inner = type(layer)._plain.forward
        layer._inner_forward = lambda x, layer=layer, inner=inner: inner(layer, x)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    with kernels.use("plain"):
        expected = gradients(plain, x)
    for one, two in zip(expected, gradients(patched, x), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-11)
    assert len(calls) == 4


def test_compiles_whole():
    model = adapted(torch.float32)
    x = torch.randn(6, 12)
    expected = gradients(model, x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for one, two in zip(expected, gradients(compiled, x), strict=True):
        torch.testing.assert_close(one, two)


def test_transforms_take_the_plain_path(calls):
    model = adapted()
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(4, 12, dtype=torch.float64)
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(params)
    assert not calls
    gradients(model, x)
    assert calls
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name])


def test_a_method_with_its_own_factors_keeps_them():
    from deltatune.methods.lora import LoraDelta

    class Doubled(LoraDelta):
        def factors(self):
            a, b = super().factors()
            return a, 2 * b

    model = adapted()
    delta = model.adapters.deltas("default")[0]
    before = model(x := torch.randn(2, 12, dtype=torch.float64))
    delta.__class__ = Doubled
    after = model(x)
    assert not torch.allclose(before, after)
    with kernels.use("plain"):
        torch.testing.assert_close(model(x), after)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="fused, lean, plain"), kernels.use("quick"):
        pass


# ---------------------------------------------------------------------- layers that read one input
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"cls": LoraFAConfig}], ids=["lora", "dora", "fa"])
def test_readers_of_one_input_share_a_node(options, calls):
    model = adapted(**options)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    nodes = set()
    y = model(x.requires_grad_())
    pending = [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += [after for after, _ in node.next_functions]
    assert sorted(n.name() for n in nodes if "LowRank" in n.name()) == [
        "_LowRankLinearBackward",
        "_LowRankLinearsBackward",
    ]
    assert not model.adapters.plan.own.ahead
    y.sum().backward()


def test_a_layer_called_with_something_else_makes_its_own_output(calls):
    """What was made ahead is for one input, unchanged, in one state."""
    model = adapted()
    net = model.base_model.model
    x, other = torch.randn(2, 3, 12, dtype=torch.float64)
    alone = [net.k(other), net.k(x)]
    net.q(x)
    assert torch.equal(net.k(other), alone[0])
    net.q(x)
    with model.disable_adapter():
        base = net.k(x)
    assert not torch.allclose(base, alone[1])
    net.q(x)
    changed = x.clone()
    x.mul_(2)
    torch.testing.assert_close(net.k(x), net.k(changed * 2))
    copy.deepcopy(model)  # with an output that was never fetched
    net.q(x)
    copy.deepcopy(model)


def test_a_hook_on_a_later_reader_sees_its_own_call(calls):
    model = adapted()
    net = model.base_model.model
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = net.k(2 * x)
    net.k.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    net.q(x)
    torch.testing.assert_close(net.k(x), expected)
    assert len(calls) == 4  # k alone, then q with v, and k again


def test_shared_inputs_have_the_right_second_path():
    """gradcheck of the node, with an output that nothing reads."""
    from deltatune.kernels.shared_input import Layer, low_rank_linears

    torch.manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, pairs, cs = some(2, 3), [(some(2, 3), some(n, 2)) for n in (4, 3)], [some(4), some(3)]
    ws = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 3)]

    def run(x, a1, b1, c1, a2, b2, c2):
        layers = [Layer(ws[0], None, a1, b1, 0.5, c1), Layer(ws[1], None, a2, b2, 2.0, c2)]
        return tuple(low_rank_linears(x, layers))

    inputs = (x, *pairs[0], cs[0], *pairs[1], cs[1])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradcheck(lambda *args: run(*args)[1], inputs)


class Scaled(nn.Module):
    """Changes what its layers give in place, as models with `nn.ReLU(inplace=True)` do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x)
        k = self.k(x)
        q *= 0.5
        return torch.relu_(self.out(q * k.add_(1)))


@pytest.mark.parametrize(
    ("mode", "options"),
    [("fused", {}), ("fused", {"lora_dropout": 1e-12}), ("fused", {"use_dora": True}), ("lean", {"use_dora": True})],
    ids=["lora", "dropout", "dora", "lean"],
)
def test_outputs_may_be_changed_in_place(mode, options, calls):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q", "k", "out"], init_lora_weights=False, **options)
    model = get_peft_model(Scaled().double(), config).train()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    as_plain(model, x, mode, calls, nodes=3, rtol=1e-9)


@pytest.mark.parametrize("mode", ["fused", "lean"])
def test_outputs_may_be_changed_in_place_where_hooks_keep_them(mode):
    """Autograd itself does not notice it then: a checkpoint keeps what it makes again, and that is changed too."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q", "k", "out"], init_lora_weights=False, use_dora=True)
    model = get_peft_model(Scaled().double(), config).train()
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    with kernels.use("plain"):
        expected = gradients(model, x)
    with kernels.use(mode):
        again = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))
        with torch.autograd.graph.save_on_cpu():
            moved = gradients(model, x)
    for one, two, three in zip(expected, again, moved, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(three, one, rtol=1e-9, atol=1e-10)


def test_outputs_that_magnitudes_need_are_kept_until_backward():
    """And a second backward of the same graph makes them again."""
    model = adapted(use_dora=True)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.shape == (3, 5, 10):
            kept.append(weakref.ref(t))
        return t

    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).square().sum()
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss, trained)
    assert kept
    assert all(ref() is None for ref in kept)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("mode", ["fused", "lean"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_backward_within_autocast_has_the_types_of_its_forward(options, mode):
    model = adapted(torch.float32, **options)
    x = torch.randn(3, 5, 12)
    with kernels.use(mode):
        expected = gradients(model, x)
        model.zero_grad()
        loss = model(x).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
    for one, p in zip(expected[2:], (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(p.grad, one, rtol=0.05, atol=0.5)


def test_an_output_made_ahead_is_not_used_after_a_step():
    model = adapted()
    net = model.base_model.model
    x = torch.randn(3, 12, dtype=torch.float64)
    before = net.k(x)
    net.q(x)
    with torch.no_grad():
        for p in net.k.parameters():
            if p.requires_grad:
                p.mul_(2)
    after = net.k(x)
    assert not torch.allclose(after, before)
    assert torch.allclose(after, net.k(x))


def test_a_layer_that_is_not_called_gets_no_gradient():
    model = adapted()
    net = model.base_model.model
    net.q(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {
        "q.lora_A.default.weight",
        "q.lora_B.default.weight",
    }


class Half(Net):
    """Calls one of the layers that read the input only sometimes."""

    def forward(self, x: torch.Tensor, whole: bool = False) -> torch.Tensor:
        q = self.q(x)
        return q + self.k(x) if whole else q


def test_an_output_that_no_layer_has_asked_for_goes_with_the_call():
    torch.manual_seed(0)
    model = get_peft_model(Half(), LoraConfig(target_modules=["q", "k"], r=4))
    model(torch.randn(3, 12)).sum().backward()
    assert not model.adapters.plan.own.ahead
