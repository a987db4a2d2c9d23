"""Every init on every kind of layer: starts as the base, leaves the base alone, is saved, is exported as a LoRA."""

from __future__ import annotations

import json

import pytest
import torch

from deltatune import ConfigError, LoraConfig, PeftModel, get_peft_model, prepare_init, save_as_lora
from deltatune.inits import INITS, find_init
from laws import MATRICES, shake
from tiny import ids, llama

FROM_DATA = ["corda", "eva", "lora_ga"]
NAMES = ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "mica", "loftq", *FROM_DATA]
#: kinds of layers whose input cannot be seen
UNSEEN = {"embedding": "looked up", "multihead": "read by its module"}


def config_of(init: str, **fields) -> LoraConfig:
    value = {"default": True}.get(init, init)
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["layer"], "init_lora_weights": value, **fields})


def adapted(init: str, kind, dtype=torch.float32) -> tuple[PeftModel, torch.Tensor]:
    torch.manual_seed(0)
    net, x = kind.net().to(dtype).eval(), kind.x()
    x = x.to(dtype) if x.is_floating_point() else x
    config = config_of(init)
    if init in FROM_DATA:
        prepare_init(net, config, [x, x.flip(0)], loss=lambda model, batch: model(batch).square().sum())
    return get_peft_model(net, config), x


def test_every_init_is_here():
    assert {find_init(n)[0].make for n in NAMES} | {INITS["random"].make} == {i.make for i in INITS.values()}


@pytest.mark.parametrize("kind", MATRICES, ids=lambda k: k.name)
@pytest.mark.parametrize("init", NAMES)
def test_starts_as_the_base_and_goes_without_a_trace(init, kind, tmp_path):
    if init in ("corda", "eva") and kind.name in UNSEEN:
        with pytest.raises(ConfigError, match=UNSEEN[kind.name]):
            adapted(init, kind)
        return
    model, x = adapted(init, kind)
    torch.manual_seed(0)
    fresh = kind.net().eval()
    with torch.no_grad():  # nn.MultiheadAttention runs another kernel where gradients are asked for
        base = fresh(x)
        assert torch.allclose(model(x), base, atol=1e-6)
        shake(model)
        live = model(x)
        assert not torch.allclose(live, base, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        report = save_as_lora(tmp_path / "lora", model)
    assert max(site.rank for site in report.sites.values()) <= 8
    model.save_pretrained(tmp_path / "own")
    plain = model.unload().state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in fresh.state_dict().items())

    torch.manual_seed(7)  # nothing of a file's start may depend on chance
    again = PeftModel.from_pretrained(fresh, tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(again(x), live)
    again.unload()
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["init_lora_weights"] is True
    assert torch.allclose(PeftModel.from_pretrained(fresh, tmp_path / "lora")(x), live, atol=1e-5)


@pytest.mark.parametrize("init", NAMES)
def test_bfloat16_bases_start_in_float32(init):
    model, x = adapted(init, MATRICES[0], torch.bfloat16)
    with model.disable_adapter():
        base = model(x)
    assert torch.allclose(model(x), base, atol=2e-2)
    assert {t.dtype for t in model.adapters.parameters("default")} == {torch.float32}


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_goes_with_dora(init):
    torch.manual_seed(0)
    net, x = MATRICES[0].net().eval(), MATRICES[0].x()
    base = net(x)
    model = get_peft_model(net, config_of(init, use_dora=True))
    assert torch.allclose(model(x), base, atol=1e-5)
    shake(model)
    live = model(x)
    model.merge_adapter()
    assert torch.allclose(model(x), live, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base)


def test_both_factors_move_at_the_first_step():
    for init in ("pissa", "olora", "loftq", "lora_ga", "corda", "orthogonal"):
        model, x = adapted(init, MATRICES[0])
        model(x).square().sum().backward()
        delta = model.adapters.deltas("default")[0]
        assert float(delta.lora_A.weight.grad.norm()) > 1e-4, init
        assert float(delta.lora_B.weight.grad.norm()) > 1e-4, init


def test_loading_computes_no_decomposition_that_the_file_holds(tmp_path, monkeypatch):
    model = get_peft_model(llama(), LoraConfig(init_lora_weights="pissa", r=4, target_modules=["q_proj"]))
    shake(model)
    model.save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("an SVD was computed")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(llama(), tmp_path, **options)
        assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model.load_adapter(tmp_path, "second")


def test_ranks_and_scales_of_patterns():
    config = config_of(
        "pissa",
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 6},
        alpha_pattern={"q_proj": 2},
        use_rslora=True,
    )
    base = llama()(input_ids=ids()).logits
    model = get_peft_model(llama(), config)
    assert torch.allclose(model(input_ids=ids()).logits, base, atol=1e-6)
    ranks = {d.lora_A.weight.shape[0] for d in model.adapters.deltas("default")}
    assert ranks == {4, 6}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"init_lora_weights": "pisa"}, "did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_16"}, "unknown"),
        ({"init_lora_weights": "pissa_niter"}, "number of iterations"),
        ({"init_lora_weights": "pissa_niter_x"}, "number of iterations"),
        ({"init_lora_weights": "olora_2"}, "unknown"),
        ({"init_lora_weights": "mica_2"}, "unknown"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "odd"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"layer": 5}}, "odd"),
        ({"init_lora_weights": "eva", "eva_config": {"rh": 1}}, "did you mean 'rho'"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho must be at least 1"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 0}}, "tau must be"),
        ({"init_lora_weights": "eva", "eva_config": 3}, "dictionary"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}}, "corda_method"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArB"}}, "ArB2r"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unitt"}}, "did you mean 'unit'"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"stable_gamma": 0}}, "positive"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "2, 4 or 8"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "at least 1"),
    ],
)
def test_impossible_options_are_refused_at_once(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        LoraConfig(**{"target_modules": ["layer"], **fields})


@pytest.mark.parametrize(
    ("init", "fields", "sentence"),
    [
        ("pissa", {"r": 13}, "has only 12"),
        ("olora", {"r": 13}, "has only 12"),
        ("loftq", {"r": 13}, "has only 12"),
        ("corda", {}, "call prepare_init"),
        ("lora_ga", {}, "call prepare_init"),
        ("pissa", {"eva_config": {"rho": 2}}, "only init_lora_weights='eva' reads"),
        ("default", {"loftq_config": {"loftq_bits": 4}}, "only init_lora_weights='loftq' reads"),
    ],
)
def test_impossible_starts_leave_the_model_alone(init, fields, sentence):
    net = MATRICES[0].net()
    before = dict(net.named_parameters())
    with pytest.raises(ConfigError, match=sentence):
        get_peft_model(net, config_of(init, **fields))
    assert dict(net.named_parameters()) == before
    assert all(p.requires_grad for p in net.parameters())


def test_an_init_of_ones_own(monkeypatch, tmp_path):
    from deltatune.inits import Start, register_init

    monkeypatch.setattr("deltatune.inits.INITS", dict(INITS))

    def ones(request):
        return Start(torch.ones(request.r, 12), torch.ones(16, request.r), offset=True)

    register_init("ones")(ones)
    with pytest.raises(ConfigError, match="gives a Start with offset; say so to register_init"):
        get_peft_model(MATRICES[0].net(), config_of("ones"))
    register_init("ones", offset=True)(ones)
    torch.manual_seed(0)
    net, x = MATRICES[0].net().eval(), MATRICES[0].x()
    base = net(x)
    model = get_peft_model(net, config_of("ones"))
    assert torch.allclose(model(x), base, atol=1e-5)
    shake(model)
    live = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x), live)


def test_a_base_without_numbers_is_refused():
    with torch.device("meta"):
        net = MATRICES[0].net()
    with pytest.raises(ConfigError, match="meta device"):
        get_peft_model(net, config_of("pissa"))


def test_options_are_saved_as_peft_saves_them(tmp_path):
    config = config_of("eva", eva_config={"rho": 3.0})
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["eva_config"]["rho"] == 3.0
    assert "prepared" not in saved
    assert LoraConfig.from_pretrained(tmp_path).eva_config == config.eva_config
