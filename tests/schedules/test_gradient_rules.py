"""Rules on the gradients of A and B: the cards' identities of LoRA-Pro, Riemannian preconditioning, LoRA-FA."""

from __future__ import annotations

import pytest
import torch

from deltatune import ConfigError, LoraConfig, LoraFAConfig, get_peft_model
from deltatune.methods.lora_fa import project_gradients
from deltatune.schedules import LoraFA, LoraPro, Riemannian, attach
from deltatune.schedules.lora_pro import adjusted, sylvester
from schedule_runs import STEPS, Loop, batches, largest_difference, model_for, weights
from tiny import llama

S = 1.7


def problem(out=9, r=3, inner=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((r, inner), (out, r), (out, inner))
    a, b, g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return a, b, g, S * b.T @ g, S * g @ a.T


def equivalent(a, b, h_a, h_b):
    return S * (b @ h_a + h_b @ a)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def one_step(model, optimizer, i=0):
    model(**batches()[i]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------- LoRA-Pro
@pytest.mark.parametrize("near", [True, False])
def test_the_equivalent_gradient_is_the_projection(near):
    """g̃ = P_B G + (I - P_B) G P_A, whatever X; and it goes downhill by its own squared length."""
    a, b, g, grad_a, grad_b = problem()
    h_a, h_b = adjusted(a, b, grad_a, grad_b, S, near)
    p_b, p_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    found = equivalent(a, b, h_a, h_b)
    assert (found - (p_b @ g + (torch.eye(9, dtype=torch.float64) - p_b) @ g @ p_a)).abs().max() < 1e-6
    downhill = (grad_a * h_a).sum() + (grad_b * h_b).sum()
    assert downhill.item() == pytest.approx((found**2).sum().item(), rel=1e-6)
    assert downhill.item() == pytest.approx((found * g).sum().item(), rel=1e-6)


def test_no_other_pair_of_steps_comes_nearer_to_the_gradient():
    a, b, g, grad_a, grad_b = problem()
    best = (equivalent(a, b, *adjusted(a, b, grad_a, grad_b, S)) - g).norm()
    lora = equivalent(a, b, grad_a, grad_b)
    lora *= (lora * g).sum() / (lora * lora).sum()  # plain LoRA's step, at its best length
    assert best < (lora - g).norm()
    generator = torch.Generator().manual_seed(1)
    h_a, h_b = adjusted(a, b, grad_a, grad_b, S)
    for size in (0.01, 0.1, 1.0):
        other = [h + size * torch.randn(h.shape, generator=generator, dtype=h.dtype) for h in (h_a, h_b)]
        assert best < (equivalent(a, b, *other) - g).norm()


def test_x_solves_its_equation_and_keeps_the_step_near_the_gradients():
    a, b, _, grad_a, grad_b = problem()
    p, q = b.T @ b, a @ a.T
    c = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = sylvester(p, q, c)
    assert (p @ x + x @ q - c).abs().max() < 1e-8

    def distance(near):
        h_a, h_b = adjusted(a, b, grad_a, grad_b, S, near)
        return ((h_a - grad_a) ** 2).sum() + ((h_b - grad_b) ** 2).sum()

    assert distance(True) < distance(False)


def test_a_full_rank_pair_gives_the_whole_gradient():
    a, b, g, grad_a, grad_b = problem(out=4, r=4, inner=6)
    assert (equivalent(a, b, *adjusted(a, b, grad_a, grad_b, S)) - g).abs().max() < 1e-6


def test_a_zero_b_is_not_inverted():
    a, b, g, _, grad_b = problem()
    b = torch.zeros_like(b)
    h_a, h_b = adjusted(a, b, S * b.T @ g, grad_b, S)
    assert not h_a.any()
    assert torch.allclose(h_b, grad_b @ torch.linalg.inv(a @ a.T) / S**2, rtol=1e-6)


def test_sgd_on_the_gradients_is_the_step_in_the_weight():
    """Form "gradients": W moves by -η g̃ to first order, and g̃ is the gradient's projection onto A's rows at B = 0."""
    model, whole = model_for("lora_pro"), llama(num_hidden_layers=4, initializer_range=0.1).train()
    whole.load_state_dict(model.get_base_model().state_dict(), strict=False)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attach(model, optimizer, LoraPro(form="gradients"))
    q = model.get_base_model().model.layers[0].self_attn.q_proj
    weight = q.weight.detach().clone()
    a = q.lora_A.default.weight.detach().clone()
    plain = whole.model.layers[0].self_attn.q_proj
    torch.nn.Module.load_state_dict(plain, {"weight": weight})
    for name, p in whole.named_parameters():
        p.data.copy_(dict(model.get_base_model().named_parameters())[name])
    whole(**batches()[0]).loss.backward()
    one_step(model, optimizer)
    moved = 2.0 * q.lora_B.default.weight.detach() @ q.lora_A.default.weight.detach()
    wanted = -0.1 * plain.weight.grad @ torch.linalg.pinv(a) @ a
    assert torch.allclose(moved, wanted, atol=1e-6)
    assert wanted.abs().max() > 1e-4


def test_adams_form_by_hand():
    """Two steps of one pair, from the card's five points."""
    model = model_for("lora_pro")
    optimizer = torch.optim.AdamW(trained(model), lr=0.01, weight_decay=0.1)
    schedule = attach(model, optimizer, LoraPro(epsilon=1e-4))
    q = model.get_base_model().model.layers[1].self_attn.q_proj
    a, b = (x.default.weight.detach().clone() for x in (q.lora_A, q.lora_B))
    s, m, v = 2.0, 0.0, 0.0
    for t in (1, 2):
        model(**batches()[t]).loss.backward()
        grads = [x.default.weight.grad.clone() for x in (q.lora_A, q.lora_B)]
        optimizer.step()
        optimizer.zero_grad()
        h_a, h_b = adjusted(a, b, *grads, s, near=False)
        g = s * (b @ h_a + h_b @ a)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-4)
        h_a, h_b = adjusted(a, b, s * b.T @ u, s * u @ a.T, s)
        a, b = a * 0.999 - 0.01 * h_a, b * 0.999 - 0.01 * h_b
        assert torch.allclose(q.lora_A.default.weight, a, atol=1e-5)
        assert torch.allclose(q.lora_B.default.weight, b, atol=1e-5)
    assert not optimizer.state  # it makes no step of the pairs, and keeps nothing for them
    assert len(schedule.state_dict()["schedules"]["lora_pro"]["moments"]) == 8


def test_the_step_has_the_rates_of_other_procedures():
    from deltatune.schedules import LoraPlus

    moved = []
    for ratio in (1.0, 4.0):
        model = model_for("lora_pro")
        optimizer = torch.optim.AdamW(trained(model), lr=0.01)
        attach(model, optimizer, LoraPro(), LoraPlus(ratio))
        one_step(model, optimizer)
        moved.append(next(p.detach() for n, p in model.named_parameters() if "lora_B" in n))
    assert torch.allclose(moved[1], 4 * moved[0], rtol=1e-4)


# ---------------------------------------------------------------------- Riemannian
def test_a_preconditioned_step_does_not_depend_on_how_a_product_is_shared():
    """A → R A, B → B R⁻¹: the product's change is the same to first order; with plain SGD it is not."""
    r = torch.tensor([[2.0, 0.3, 0, 0], [0, 0.5, 0, 0], [0.1, 0, 3.0, 0], [0, 0, 0.2, 1.0]])
    changes = {}
    for rule in (True, False):
        for turned in (True, False):
            model = model_for("riemannian")
            pair = model.get_base_model().model.layers[0].self_attn.q_proj
            a, b = pair.lora_A.default.weight, pair.lora_B.default.weight
            with torch.no_grad():
                b.normal_(generator=torch.Generator().manual_seed(4))
                if turned:
                    b.copy_(b @ torch.linalg.inv(r))
                    a.copy_(r @ a)
            before = (b @ a).detach()
            optimizer = torch.optim.SGD(trained(model), lr=1e-3)
            if rule:
                attach(model, optimizer, Riemannian(delta=1e-10))
            one_step(model, optimizer)
            changes[rule, turned] = (b @ a).detach() - before
    size = changes[True, False].abs().max()
    assert (changes[True, True] - changes[True, False]).abs().max() < 0.01 * size
    assert (changes[False, True] - changes[False, False]).abs().max() > 0.1 * changes[False, False].abs().max()


def test_the_gradients_are_those_of_the_formula():
    model = model_for("riemannian")
    for i, p in enumerate(trained(model)):
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    attach(model, optimizer, Riemannian(delta=0.5))
    model(**batches()[0]).loss.backward()
    pair = model.get_base_model().model.layers[2].self_attn.v_proj
    a, b = pair.lora_A.default.weight, pair.lora_B.default.weight
    eye = 0.5 * torch.eye(4)
    new_a = a - torch.linalg.inv(b.T @ b + eye) @ a.grad
    new_b = b - b.grad @ torch.linalg.inv(a @ a.T + eye)
    optimizer.step()
    assert torch.allclose(a, new_a, atol=1e-6)
    assert torch.allclose(b, new_b, atol=1e-6)
    assert largest_difference(weights(model), plain) > 0


# ---------------------------------------------------------------------- LoRA-FA
def test_lora_fas_procedure_is_its_hook():
    by_hook, by_procedure = model_for("lora_fa"), model_for("lora_fa")
    optimizers = [torch.optim.AdamW(trained(m), lr=0.01) for m in (by_hook, by_procedure)]
    project_gradients(optimizers[0], by_hook)
    attach(by_procedure, optimizers[1], LoraFA())
    for i in range(3):
        for model, optimizer in zip((by_hook, by_procedure), optimizers, strict=True):
            one_step(model, optimizer, i)
    assert largest_difference(weights(by_hook), weights(by_procedure)) == 0


# ---------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", ["lora_fa", "lora_pro", "riemannian"])
def test_it_learns(name):
    loop, losses = Loop(name), []
    for _ in range(STEPS):
        loss = loop.model(**batches()[0]).loss
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("procedure", "config", "says"),
    [
        (LoraPro(), LoraFAConfig(), "moves A and B together, and only one of them trains"),
        (LoraPro(), LoraConfig(use_dora=True), "LoRA-Pro works on LoRA's pairs, and this model has none"),
        (Riemannian(), LoraConfig(use_dora=True), "Riemannian preconditioning works on LoRA's pairs"),
        (LoraFA(), LoraConfig(), "whose A is frozen and whose B trains.*LoraFAConfig"),
    ],
)
def test_adapters_that_have_no_such_pairs_are_refused(procedure, config, says):
    model = get_peft_model(llama(), config)
    with pytest.raises(ConfigError, match=says):
        attach(model, torch.optim.AdamW(trained(model)), procedure)
    with pytest.raises(ConfigError, match="this model has none"):
        attach(llama(), torch.optim.AdamW(llama().parameters()), procedure)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoraPro(form="sgd"), "form must be 'adam' or 'gradients', not 'sgd'"),
        (lambda: LoraPro(beta2=1), "beta2=1 would never take in a gradient"),
        (lambda: LoraPro(epsilon=-1), "epsilon must be a number of at least 0"),
        (lambda: Riemannian(delta=0), "would invert Bᵀ B while B is zero"),
    ],
)
def test_bad_options(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
