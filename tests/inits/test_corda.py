"""CorDA: the oriented decomposition, its files, peft's names."""

from __future__ import annotations

import pytest
import torch

from deltatune import AdapterLoadError, ConfigError, LoraConfig, get_peft_model, prepare_init, preprocess_corda
from deltatune.inits.corda import components
from tiny import ids, llama

TARGETS = ["q_proj", "k_proj", "down_proj"]


def config_of(**options) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="corda", corda_config=options)


def batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(2, 60, (1, 40), generator=generator)} for _ in range(n)]


def run(model) -> None:
    for batch in batches():
        model(**batch)


def test_all_components_together_are_the_weight():
    w, x = torch.randn(20, 16), torch.randn(50, 16) * torch.linspace(2, 0.1, 16)
    u, s, vt = components(w, x.mT @ x, 16, smallest=False)
    assert torch.allclose(u * s @ vt, w, atol=1e-3)
    big, small = (components(w, x.mT @ x, 4, smallest=flag) for flag in (False, True))
    # what the data see of the components they are chosen by
    seen = [float((x @ (u * s @ vt).mT).norm()) for u, s, vt in (big, small)]
    assert seen[0] > 5 * seen[1]
    assert bool((big[1].min() > small[1].max()).all())


def test_preprocessing_equals_preparing():
    starts = []
    for way in (lambda m, c: prepare_init(m, c, batches()), lambda m, c: preprocess_corda(m, c, lambda: run(m))):
        model, config = llama(), config_of()
        way(model, config)
        starts.append(config.prepared)
        base = llama()(input_ids=ids()).logits
        assert torch.allclose(get_peft_model(model, config)(input_ids=ids()).logits, base, atol=1e-6)
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][n].a, starts[1][n].a) for n in starts[0])


def test_the_two_modes_differ():
    found = []
    for method in ("ipm", "kpm"):
        model, config = llama(), config_of(corda_method=method)
        prepare_init(model, config, batches())
        start = config.prepared["model.layers.0.mlp.down_proj"]
        found.append(float((start.b @ start.a).norm()))
    assert found[0] > 2 * found[1]


def test_padding_does_not_count():
    data = batches(1)
    padded = {k: torch.cat([torch.zeros(1, 5, dtype=torch.long), v], 1) for k, v in data[0].items()}
    padded["attention_mask"] = (torch.arange(45) >= 5).long()[None]
    padded["position_ids"] = (torch.arange(45) - 5).clamp_min(0)[None]
    plain, masked = config_of(), config_of()
    prepare_init(llama(), plain, data)
    prepare_init(llama(), masked, [padded])
    for name in plain.prepared:
        a, b = (c.prepared[name].b @ c.prepared[name].a for c in (plain, masked))
        assert torch.allclose(a, b, atol=1e-4)


def test_files_are_read_instead_of_data(tmp_path):
    cache, covariances = tmp_path / "c.safetensors", tmp_path / "cov.safetensors"
    config = config_of(cache_file=str(cache), covariance_file=str(covariances))
    prepare_init(llama(), config, batches())
    assert cache.is_file()
    assert covariances.is_file()
    again = config_of(cache_file=str(cache))
    preprocess_corda(llama(), again)
    assert prepare_init(llama(), config_of(cache_file=str(cache)), batches()) == 0
    assert all(torch.equal(again.prepared[n].b, config.prepared[n].b) for n in config.prepared)
    wider = config_of(covariance_file=str(covariances), corda_method="kpm")
    wider.r = 6
    preprocess_corda(llama(), wider)
    assert {s.a.shape[0] for s in wider.prepared.values()} == {6}
    other = config_of(cache_file=str(cache))
    other.r = 6
    with pytest.raises(ConfigError, match="rank 4 for"):
        preprocess_corda(llama(), other)
    for option in ("cache_file", "covariance_file"):
        elsewhere = config_of(**{option: str(cache if option == "cache_file" else covariances)})
        elsewhere.target_modules = {"o_proj"}
        with pytest.raises(ConfigError, match="has no"):
            preprocess_corda(llama(), elsewhere)


def test_another_model_may_be_hooked():
    mine, other = config_of(), config_of()
    twin = llama()
    preprocess_corda(llama(), mine, lambda: run(twin), hooked_model=twin)
    model = llama()
    preprocess_corda(model, other, lambda: run(model))
    assert all(torch.equal(mine.prepared[n].a, other.prepared[n].a) for n in mine.prepared)


def test_half_precision_covariances_are_close():
    exact, half = config_of(), config_of(use_float16_for_covariance=True)
    prepare_init(llama(), exact, batches())
    prepare_init(llama(), half, batches())
    for name in exact.prepared:
        a, b = (c.prepared[name].b @ c.prepared[name].a for c in (exact, half))
        assert float((a - b).norm() / a.norm()) < 0.2


def test_what_cannot_be_done_is_said(tmp_path):
    with pytest.raises(ConfigError, match="needs run_model"):
        preprocess_corda(llama(), config_of())
    with pytest.raises(ConfigError, match="no batch ran"):
        preprocess_corda(llama(), config_of(), lambda: None)
    with pytest.raises(ConfigError, match="init_lora_weights='corda'"):
        preprocess_corda(llama(), LoraConfig(init_lora_weights="eva"))
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        prepare_init(llama(), config_of(cache_file="cache.pt"), batches())
    with pytest.raises(ConfigError, match="prune_temporary_fields"):
        prepare_init(llama(), config_of(prune_temporary_fields=False), batches())
    with pytest.raises(ConfigError, match="cannot be inverted"):
        components(torch.randn(3, 3), torch.zeros(3, 3), 2, smallest=False)
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(b"nothing")
    with pytest.raises(AdapterLoadError, match="damaged"):
        preprocess_corda(llama(), config_of(cache_file=str(damaged)))
    wide = config_of()
    wide.r = 40
    with pytest.raises(ConfigError, match="has only 32"):
        prepare_init(llama(), wide, batches())
    broken = llama()
    broken.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="not finite"):
        prepare_init(broken, config_of(), batches())


def test_adapters_that_are_attached_do_not_disturb():
    model = get_peft_model(llama(), LoraConfig(init_lora_weights=False, target_modules=TARGETS))
    beside, plain = config_of(), config_of()
    prepare_init(model, beside, batches())
    prepare_init(llama(), plain, batches())
    assert all(torch.equal(beside.prepared[n].a, plain.prepared[n].a) for n in plain.prepared)
    before = model(input_ids=ids()).logits
    model.add_adapter("corda", beside)
    model.set_adapter(["default", "corda"])
    assert torch.allclose(model(input_ids=ids()).logits, before, atol=1e-5)
