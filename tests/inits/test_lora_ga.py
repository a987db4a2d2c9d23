"""LoRA-GA: gradients, directions, scales, and the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltatune import ConfigError, LoraConfig, get_peft_model, prepare_init, preprocess_loraga
from deltatune.inits.lora_ga import GradientCollector, directions
from tiny import ids, llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config_of(**options) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=True,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=options,
    )


def batches(n: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 60, (2, 12), generator=generator) for _ in range(n)]
    return [{"input_ids": x, "labels": x} for x in rows]


def test_gradients_are_averaged_and_freed():
    model = llama()
    flags = {n: i % 2 == 0 for i, n in enumerate(dict(model.named_parameters()))}
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name])
    collector = GradientCollector(model, config_of())
    with collector.watch():
        for batch in batches():
            model(**batch).loss.backward()
            assert all(p.grad is None for p in model.parameters())
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    found = collector.gradients()
    plain = llama()
    for batch in batches():
        (plain(**batch).loss / 2).backward()
    for path, g in found.items():
        assert torch.allclose(g, plain.get_submodule(path).weight.grad, atol=1e-6), path


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_directions_are_orthonormal_and_apart(direction):
    g = torch.randn(24, 18)
    a, b = directions(g, 3, direction)
    assert torch.allclose(a @ a.mT, torch.eye(3), atol=1e-5)
    assert torch.allclose(b.mT @ b, torch.eye(3), atol=1e-5)
    # G maps every direction of A to one that B does not have
    assert float((b.mT @ g @ a.mT).abs().max()) < 1e-4
    vt = torch.linalg.svd(g)[2]
    taken = {i for row in (a @ vt.mT).abs() for i in (row > 0.99).nonzero().flatten().tolist()}
    expected = {"ArB2r": {0, 1, 2}, "A2rBr": {3, 4, 5}, "ArBr": {1, 3, 5}}
    assert taken == expected.get(direction, taken)
    assert taken <= set(range(6))


def test_wide_gradients_take_the_randomised_way():
    u, _ = torch.linalg.qr(torch.randn(200, 40))
    v, _ = torch.linalg.qr(torch.randn(150, 40))
    g = u * torch.logspace(0, -4, 40) @ v.mT
    a, b = directions(g, 2, "ArB2r")
    assert torch.allclose((a @ v).diagonal().abs(), torch.ones(2), atol=1e-3)
    assert torch.allclose((b.mT @ u[:, 2:4]).diagonal().abs(), torch.ones(2), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 32**0.25 / 4), ({"stable_gamma": 64}, 32**0.25 / 8), ({"scale": "unit"}, 1), ({"scale": "gd_scale"}, 1 / 8)],
)
def test_scales(options, size):
    config = config_of(**options)
    prepare_init(llama(), config, batches())
    start = config.prepared["model.layers.0.self_attn.q_proj"]  # (32, 32), s = 16 / sqrt(4) = 8
    assert torch.allclose(start.a.norm(dim=1), torch.full((4,), float(size)), rtol=1e-4)
    assert torch.allclose(start.b.norm(dim=0), torch.full((4,), float(size)), rtol=1e-4)


def test_the_weight_scale():
    config = config_of(scale="weight_svd")
    prepare_init(llama(), config, batches())
    path = "model.layers.1.mlp.down_proj"
    values = torch.linalg.svdvals(llama().get_submodule(path).weight)[:4]
    size = (values / 8).sqrt().mean()
    assert torch.allclose(config.prepared[path].a.norm(dim=1), size.detach().expand(4), rtol=1e-4)


def test_the_first_step_follows_the_gradient_better_than_loras():
    """cos(change of s · B A in one SGD step, -G), averaged over networks."""

    def cosine(init: str | bool, seed: int) -> float:
        torch.manual_seed(seed)
        net, x, y = nn.Sequential(nn.Linear(24, 20)), torch.randn(8, 24), torch.randn(8, 20)
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=init)

        def loss(model: nn.Module, batch: object) -> torch.Tensor:
            return (model(x) - y).square().mean()

        weight = net[0].weight
        g = torch.autograd.grad(loss(net, None), weight)[0]
        if init == "lora_ga":
            config.lora_ga_config = config_of(scale="unit").lora_ga_config
            prepare_init(net, config, [x], loss=loss)
        model = get_peft_model(net, config)
        delta = model.adapters.deltas("default")[0]
        a, b = delta.lora_A.weight, delta.lora_B.weight
        before = (b @ a).detach()
        loss(model, None).backward()
        step = (b - 1e-3 * b.grad) @ (a - 1e-3 * a.grad) - before
        return float(nn.functional.cosine_similarity(step.flatten(), -g.flatten(), dim=0).detach())

    vanilla, ours = (sum(cosine(init, seed) for seed in range(8)) / 8 for init in (True, "lora_ga"))
    assert ours > vanilla + 0.1


def test_preprocessing_with_a_cache(tmp_path):
    cache = str(tmp_path / "g.safetensors")
    model, config = llama(), config_of()

    def train_step() -> None:
        for batch in batches():
            model(**batch).loss.backward()

    base = llama()(input_ids=ids()).logits
    preprocess_loraga(model, config, train_step, cache_file=cache)
    again = config_of()
    preprocess_loraga(llama(), again, lambda: pytest.fail("the cache is there"), cache_file=cache)
    assert all(torch.equal(config.prepared[n].a, again.prepared[n].a) for n in config.prepared)
    prepared = config_of()
    prepare_init(llama(), prepared, batches())
    assert all(torch.allclose(config.prepared[n].b, prepared.prepared[n].b, atol=1e-4) for n in config.prepared)
    assert torch.allclose(get_peft_model(model, config)(input_ids=ids()).logits, base, atol=1e-5)
    other = config_of()
    other.target_modules = {"k_proj"}
    with pytest.raises(ConfigError, match="has no gradient of"):
        preprocess_loraga(llama(), other, train_step, cache_file=cache)


def test_what_cannot_be_done_is_said():
    unlabelled = [{"input_ids": ids()}]
    with pytest.raises(ConfigError, match="returned no loss; put labels"):
        prepare_init(llama(), config_of(), unlabelled)
    with pytest.raises(ConfigError, match="no batch gave"):
        preprocess_loraga(llama(), config_of(), lambda: None)
    wide = config_of()
    wide.r = 9
    with pytest.raises(ConfigError, match="has only 16"):
        prepare_init(llama(), wide, batches())
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        preprocess_loraga(llama(), config_of(), lambda: None, cache_file="x.pt")
    with pytest.raises(ConfigError, match="init_lora_weights='lora_ga'"):
        preprocess_loraga(llama(), LoraConfig(), lambda: None)
    broken = llama()
    broken.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(ConfigError, match="not finite"):
        prepare_init(broken, config_of(), batches())
