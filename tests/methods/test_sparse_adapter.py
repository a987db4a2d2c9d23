"""SparseAdapter: what is kept, that the rest stays zero, and the scores."""

from __future__ import annotations

import pytest
import torch

from deltatune import BottleneckConfig, PeftModel, SparseAdapterConfig, get_peft_model, prepare_init
from deltatune.errors import ConfigError
from methods.transformers_zoo import ZOO, inputs, make
from tiny import bert, ids, llama, shake

SMALL = {"reduction_factor": 4}
BATCH = {"input_ids": ids(), "labels": torch.tensor([0, 1, 0])}


def maps(model, name="default"):
    """path of a map -> its dense weight."""
    found = {}
    for edit in model.adapters.edits[name]:
        for which, part in (("down", edit.down), ("up", edit.up)):
            weight = torch.zeros(part.shape).flatten()
            if part.values is not None:
                weight[part.indices.weight.long()] = part.values.weight.detach()
            found[f"{edit.host.path}.bottleneck_{which}"] = weight.view(part.shape)
    return found


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture(name, tmp_path):
    model = get_peft_model(make(name), SparseAdapterConfig(**SMALL, score="magnitude", non_linearity="gelu"))
    shake(model)
    live = model(**inputs(name)).logits
    live.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(make(name), tmp_path)
    assert fresh.load_report.clean
    assert torch.equal(fresh(**inputs(name)).logits, live)


@pytest.mark.parametrize("score", ["random", "magnitude", "synflow"])
@pytest.mark.parametrize("keep", [0.05, 0.4])
def test_so_many_are_kept_and_the_rest_stays_zero(score, keep):
    model = get_peft_model(bert(), SparseAdapterConfig(**SMALL, score=score, keep=keep))
    start = maps(model)
    total = sum(w.numel() for w in start.values())
    assert sum(int((w != 0).sum()) for w in start.values()) == round(keep * total)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, w in maps(model).items():
        assert not (w[start[name] == 0]).any()
    assert any(not torch.equal(w, start[n]) for n, w in maps(model).items())


def test_all_of_it_kept_is_the_dense_adapter():
    sparse = get_peft_model(llama(), SparseAdapterConfig(**SMALL, score="magnitude", keep=1.0))
    dense = get_peft_model(llama(), BottleneckConfig(**SMALL))
    with torch.no_grad():
        for name, w in maps(sparse).items():
            dense.get_base_model().get_submodule(name).default.weight.copy_(w)
    assert torch.allclose(sparse(input_ids=ids()).logits, dense(input_ids=ids()).logits, atol=1e-6)


def test_magnitude_keeps_the_largest_of_all_maps_together():
    model = get_peft_model(bert(), SparseAdapterConfig(**SMALL, score="magnitude", keep=0.1))
    kept = torch.cat([w[w != 0].abs() for w in maps(model).values()])
    torch.manual_seed(0)
    shares = [float((w != 0).float().mean()) for w in maps(model).values()]
    assert len(set(shares)) > 1  # one threshold, not a share of each
    assert kept.min() > 0.02  # of N(0, 0.02), a tenth lies beyond 1.64 σ


class Told(SparseAdapterConfig):
    """Keeps what `choose` was given."""

    def choose(self, scores, weights):
        self.told = scores, weights
        super().choose(scores, weights)


def test_snip_scores_are_first_order_changes_of_the_loss():
    base = bert().double()
    flags = [p.requires_grad for p in base.parameters()]
    config = Told(**SMALL, keep=0.02)
    with pytest.raises(ConfigError, match="score='snip' looks at data: call prepare_init"):
        get_peft_model(base, config)
    assert prepare_init(base, config, [BATCH], progress=False) == 1
    assert [p.requires_grad for p in base.parameters()] == flags
    assert all(p.grad is None for p in base.parameters())
    assert not any("bottleneck" in n for n, _ in base.named_modules())
    scores, weights = config.told
    flat = torch.cat([s.flatten() for s in scores.values()])
    assert sum(config.kept.values()) == round(0.02 * len(flat))
    chosen = torch.cat([scores[n].flatten()[config.prepared[n][0]] for n in scores])
    assert chosen.min() >= flat.sort(descending=True).values[len(chosen) - 1]
    dense = get_peft_model(base, BottleneckConfig(**SMALL))
    with torch.no_grad():
        for name, w in weights.items():
            dense.get_base_model().get_submodule(name).default.weight.copy_(w)
        before = dense(**BATCH).loss
        for name, s in scores.items():
            weight, i = dense.get_base_model().get_submodule(name).default.weight.view(-1), int(s.argmax())
            saved = weight[i].item()
            weight[i] = saved * 0.9
            change = (dense(**BATCH).loss - before).abs().item() / 0.1
            weight[i] = saved
            assert change == pytest.approx(s.flatten()[i].item(), rel=0.02), name


def test_grasp_scores_are_weights_times_what_a_step_does_to_the_gradient():
    """w · H g, with H g by differences: (∇L(w + εg) - ∇L(w - εg)) / 2ε."""
    base = bert().double()
    config = Told(**SMALL, keep=0.1, score="grasp", non_linearity="gelu")
    batches = [BATCH, {"input_ids": ids() + 1, "labels": torch.tensor([1, 1, 0])}]
    assert prepare_init(base, config, batches, progress=False) == 2
    assert not any("bottleneck" in n for n, _ in base.named_modules())
    scores, weights = config.told
    dense = get_peft_model(base, BottleneckConfig(**SMALL, non_linearity="gelu")).double()
    params = [dense.get_base_model().get_submodule(name).default.weight for name in weights]

    def grads_at(direction, step):
        with torch.no_grad():
            for p, w, g in zip(params, weights.values(), direction, strict=True):
                p.copy_(w.double() + step * g)
        return torch.autograd.grad(sum(dense(**b).loss for b in batches), params)

    g = grads_at([torch.zeros_like(p) for p in params], 0.0)
    far, near = grads_at(g, 1e-3), grads_at(g, -1e-3)
    wanted = torch.cat([(w * (a - b) / 2e-3).flatten() for w, a, b in zip(weights.values(), far, near, strict=True)])
    found = torch.cat([s.flatten() for s in scores.values()])
    assert (found < 0).any()
    assert torch.allclose(found.double(), wanted, atol=1e-3 * float(wanted.abs().max()))
    chosen = torch.cat([scores[n].flatten()[config.prepared[n][0]] for n in scores])
    assert chosen.min() >= found.sort(descending=True).values[len(chosen) - 1]


def test_snip_sees_what_the_data_say():
    """Where only one adapter can change the loss, its weights are kept."""
    base = bert()
    config = SparseAdapterConfig(**SMALL, keep=0.1, leave_out=[0])
    prepare_init(base, config, [BATCH], progress=False)
    assert all(".1." in name for name in config.kept)


def test_it_learns():
    torch.manual_seed(0)
    x = torch.randint(2, 60, (16, 6))
    y = (x[:, 0] > 30).long()
    config = SparseAdapterConfig(reduction_factor=2, keep=0.3, task_type="SEQ_CLS")
    base = bert()
    prepare_init(base, config, [{"input_ids": x, "labels": y}], progress=False)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model(input_ids=x, labels=y).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"keep is a share in \(0, 1\], not 0"):
        SparseAdapterConfig(keep=0)
    with pytest.raises(ConfigError, match=r"score 'snipp' is not one of .*did you mean 'snip'"):
        SparseAdapterConfig(score="snipp")
    with pytest.raises(ConfigError, match="starts U at zero, so score='snip' would rank zeros"):
        SparseAdapterConfig(init_weights="mam_adapter")
    with pytest.raises(ConfigError, match="score='magnitude' needs no data"):
        prepare_init(bert(), SparseAdapterConfig(score="magnitude"), [BATCH], progress=False)
    with pytest.raises(ConfigError, match="kept says nothing about"):
        get_peft_model(bert(), SparseAdapterConfig(kept={"nowhere": 3}))
