"""Triton's kernels under its interpreter, against float64 and against the plain path.

Triton reads TRITON_INTERPRET when it is imported, so `test_triton.py` runs this file in a process of its own.
The interpreter cuts float32 to bfloat16 where a GPU rounds, so errors are up to twice as large here.
"""

import pytest
import torch
from torch import nn

from deltatune import LoraConfig, get_peft_model, kernels
from deltatune.kernels import gpu, triton_lora, triton_nf4
from deltatune.kernels.triton_lora import grouped_low_rank, parts_of
from deltatune.stores.nf4 import dequantize_nf4, quantize_nf4
from deltatune.stores.nf4_layer import Nf4Linear

#: relative error of a norm
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def assert_near(found, expected, dtype):
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    error = (found.detach().double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert float(error.detach()) < TOLERANCE[dtype]


# ---------------------------------------------------------------------- mixed batches
#: sizes, ranks, in, out, and into how many parts the inner axis is split
RUNS = {
    "odd sizes, an empty run, a lower rank": ((3, 0, 5, 1), (8, 8, 3, 8), 19, 21, 1),
    "one row": ((1,), (5,), 130, 33, 2),
    "one row each, much to add up": ((1, 1, 1), (16, 16, 16), 260, 40, 4),
    "longer runs than a tile": ((70, 20), (16, 16), 40, 65, 1),
    "ranks above a tile": ((2, 3), (24, 70), 70, 40, 2),
    "one low rank, padded": ((4, 2), (3, 3), 20, 18, 1),
}


@DTYPES
@pytest.mark.parametrize("case", RUNS.values(), ids=RUNS)
def test_grouped_low_rank(case, dtype):
    sizes, ranks, inputs, out, parts = case
    most = max(8, *ranks)
    assert parts_of(sizes, most, inputs) == parts
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), inputs).to(dtype)
    a = (torch.randn(len(sizes), most, inputs) / inputs**0.5).to(dtype)
    b = torch.randn(len(sizes), most, out).to(dtype).mT
    for n, r in enumerate(ranks):  # what lies beyond a rank must not be read
        a[n, r:] = b[n, :, r:] = float("nan")
    tensors = [t.requires_grad_() for t in (x, a, b)]
    y = grouped_low_rank(*tensors, sizes, ranks)
    g = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    rows = exact[0].split(sizes)
    pairs = [(exact[1][n, :r], exact[2][n, :, :r]) for n, r in enumerate(ranks)]
    expected = torch.cat([x @ a.mT @ b.mT for x, (a, b) in zip(rows, pairs, strict=True)])
    assert_near(y, expected, dtype)
    found = torch.autograd.grad(y, tensors, g)
    for one, two in zip(found, torch.autograd.grad(expected, exact, g.double()), strict=True):
        assert_near(one, two, dtype)


def test_grouped_takes_rows_that_are_not_contiguous():
    torch.manual_seed(0)
    x, a, b = torch.randn(20, 6).mT, torch.randn(2, 8, 20), torch.randn(2, 9, 8)
    expected = grouped_low_rank(x.contiguous(), a, b, (4, 2), (8, 8))
    assert torch.equal(grouped_low_rank(x, a, b, (4, 2), (8, 8)), expected)


BATCHES = {
    "even": ["a", "b", "a", "b"],
    "skewed": ["a", "a", "a", "b"],
    "three ranks and rows without": ["c", "__base__", "a", "b", "a"],
}


def gradients(model, x, **options):
    x = x.clone().requires_grad_()
    y = model(x, **options)
    model.zero_grad()
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def made(monkeypatch):
    """The kernels that ran."""
    names = []
    for module, name in ((triton_lora, "forward"), (triton_lora, "backward"), (triton_nf4, "product")):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=inner, _n=name, **k: names.append(_n) or _f(*a, **k))
    return names


def mixed(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 9))
    model = None
    for name, r in zip("abc", (8, 8, 3), strict=True):
        config = LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False, **options)
        if model is None:
            model = get_peft_model(net, config, name)
        else:
            model.add_adapter(name, config)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_mixed_batches_of_a_model(names, options, made):
    model, x = mixed(**options), torch.randn(len(names), 5, 16)
    with kernels.use("plain"):
        expected = gradients(model, x, adapter_names=names)
    assert not made
    with kernels.use("triton"):
        found = gradients(model, x, adapter_names=names)
    assert made == ["forward", "forward", "backward", "backward"]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with kernels.use("triton"), torch.no_grad():
        torch.testing.assert_close(model(x[:, :1], adapter_names=names), found[0][:, :1].detach())


def test_tokens_of_a_generation_run_the_kernels(made):
    model, names, x = mixed().eval(), BATCHES["even"], torch.randn(4, 1, 16)
    with torch.no_grad(), model.adapters.plan.steady():
        with kernels.use("triton"):
            found = [model(x, adapter_names=names) for _ in range(2)]
        assert made == ["forward"] * 4
        with kernels.use("plain"):
            expected = model(x, adapter_names=names)
    for y in found:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_for_the_kernels_takes_torchs_way(made):
    model, names = mixed().double(), BATCHES["skewed"]
    with kernels.use("triton"):
        model(torch.randn(4, 16, dtype=torch.float64), adapter_names=names)
        model.float()(torch.randn(4, 0, 16), adapter_names=names)
        assert not made
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(4, 16), adapter_names=names)
    assert made == ["forward"]  # the second layer's input is in bfloat16 already


# ---------------------------------------------------------------------- NF4
#: tokens, out, in, block, double quantisation, rank
WEIGHTS = {
    "one row, whole blocks": (1, 33, 64, 64, True, 5),
    "blocks across rows": (3, 21, 45, 64, False, 8),
    "many tokens, small blocks across rows": (40, 70, 130, 32, True, 20),
    "large blocks": (2, 64, 128, 128, True, 4),
}


@DTYPES
@pytest.mark.parametrize("case", WEIGHTS.values(), ids=WEIGHTS)
def test_nf4_product(case, dtype):
    tokens, out, inputs, block, double, r = case
    torch.manual_seed(0)
    q = quantize_nf4(torch.randn(out, inputs).to(dtype), block, double=double)
    w = dequantize_nf4(q)
    x, g, h, p, a, bias = (
        torch.randn(*shape).to(dtype)
        for shape in ((tokens, inputs), (tokens, out), (tokens, r), (r, out), (r, inputs), (out,))
    )
    d = torch.Tensor.double
    product = triton_nf4.product
    assert_near(product(x, q, bias, (h, p), 0.5), d(x) @ d(w).mT + d(bias) + 0.5 * d(h) @ d(p), dtype)
    assert_near(product(x, q), d(x) @ d(w).mT, dtype)
    assert_near(product(g, q, None, (h, a), 2.0, back=True), d(g) @ d(w) + 2 * d(h) @ d(a), dtype)


class Net(nn.Module):
    def __init__(self, make, inputs=48, hidden=40) -> None:
        super().__init__()
        self.one, self.two = make(inputs, hidden), make(hidden, 9)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def native(inputs, out):
    return Nf4Linear.of(nn.Linear(inputs, out), double=False)


def native_double(inputs, out):
    return Nf4Linear.of(nn.Linear(inputs, out, bias=False), 32)


def of_bitsandbytes(inputs, out):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(inputs, out, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


METHODS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("make", [native, native_double, of_bitsandbytes])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_nf4_layers_of_a_model(options, make, made):
    torch.manual_seed(0)
    # bitsandbytes' CPU kernel needs blocks that end with rows
    inputs, hidden = (64, 128) if make is of_bitsandbytes else (48, 40)
    config = LoraConfig(r=5, target_modules=["one", "two"], init_lora_weights=False, **options)
    model, x = get_peft_model(Net(make, inputs, hidden), config).train(), torch.randn(2, 3, inputs)
    expected, found = [], []
    for mode, into in (("fused", expected), ("triton", found)):
        torch.manual_seed(1)
        with kernels.use(mode):
            into += gradients(model, x)
        assert made == (["product"] * 4 if mode == "triton" else [])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    model.eval()
    made.clear()
    with torch.no_grad(), kernels.use("triton"):
        found = model(x)
    assert made == ["product"] * 2
    with kernels.use("plain"):  # with gradients: bitsandbytes repacks and rounds its weights at an inference on a CPU
        torch.testing.assert_close(found, model(x.requires_grad_()).detach(), rtol=1e-4, atol=1e-5)


def test_autocast_to_the_dtype_that_is_there_already(made):
    torch.manual_seed(0)
    config = LoraConfig(r=5, target_modules=["one", "two"], init_lora_weights=False)
    model, x = get_peft_model(Net(native).bfloat16(), config).train(), torch.randn(2, 3, 48, dtype=torch.bfloat16)
    expected = gradients(model, x)
    with kernels.use("triton"), torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
    assert made == ["product"] * 4
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == two.dtype
        assert float(((one - two).norm() / two.norm()).detach()) < 0.05


def test_a_bitsandbytes_layer_in_another_type_is_left_alone(made):
    torch.manual_seed(0)
    bnb = pytest.importorskip("bitsandbytes")

    def fp4(inputs, out):
        return bnb.nn.Linear4bit(inputs, out, compute_dtype=torch.float32, quant_type="fp4").to("cpu")

    model = get_peft_model(Net(fp4), LoraConfig(target_modules=["one", "two"])).train()
    with kernels.use("triton"):
        model(torch.randn(2, 48))
    model = get_peft_model(Net(of_bitsandbytes), LoraConfig(target_modules=["one", "two"])).train()
    for layer in (model.base_model.model.one, model.base_model.model.two):
        layer.compute_type_is_set = True
    with kernels.use("triton"):
        model(torch.randn(2, 48, dtype=torch.bfloat16))
    assert not made


# ---------------------------------------------------------------------- compiled code
def test_compiled_in_one_graph(made):
    torch.manual_seed(0)
    config = LoraConfig(r=5, target_modules=["one", "two"], init_lora_weights=False, lora_dropout=0.3)
    model, x = get_peft_model(Net(native), config).train(), torch.randn(2, 3, 48)
    with kernels.use("triton"):
        torch.manual_seed(1)
        with kernels.use("plain"):
            expected = gradients(model, x)
        torch.manual_seed(1)
        found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert made == ["product"] * 4
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_mixed_batches_compile_in_one_graph(made):
    model, names, x = mixed(), BATCHES["three ranks and rows without"], torch.randn(5, 3, 16)
    with kernels.use("plain"):
        expected = gradients(model, x, adapter_names=names)
    with kernels.use("triton"):
        found = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x, adapter_names=names)
    assert made == ["forward", "forward", "backward", "backward"]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_operators_are_registered_rightly():
    torch.manual_seed(0)
    x, a, b = torch.randn(6, 70), torch.randn(2, 8, 70), torch.randn(2, 8, 9).mT
    tensors = [t.requires_grad_() for t in (x, a, b)]
    torch.library.opcheck(triton_lora._grouped, (*tensors, [4, 2], [8, 3]))
    q = quantize_nf4(torch.randn(9, 70), double=True)
    numbers = (q.packed, q.absmax, q.offset, q.absmax2, list(q.shape), q.dtype, q.block)
    h, b, bias = (torch.randn(*s, requires_grad=True) for s in ((6, 4), (9, 4), (9,)))
    torch.library.opcheck(triton_nf4._linear, (x, h, b, bias, *numbers))


def test_no_measurement_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(kernels.ConfigError, match="none is here"), kernels.use("measure"):
        pass
    assert not gpu.measured()
