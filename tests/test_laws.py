"""The laws: every registered method x every kind of layer x every storage. A new method joins by registering.

L1 equals the base at the start. L2 live equals merged. L3 unmerging restores the storage bit for bit. L4 save,
load, same output bit for bit. L5 what is declared trains, nothing else. L6 a mixed batch equals separate runs.
L7 compile, activation checkpointing, deepcopy, pickle, `.to(dtype)`.
"""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deltatune import PeftModel
from deltatune.errors import CannotMergeError, MixedBatchError
from laws import KINDS, METHOD_NAMES, QUANTISED, STORES, Kind, config_for, make, refusal, shake

refused = functools.cache(refusal)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}

cells = pytest.mark.parametrize(
    ("method", "kind", "store"),
    [pytest.param(m, k, s, id=f"{m}-{k.name}-{s}") for m in METHOD_NAMES for k in KINDS for s in STORES]
    + [pytest.param(m, k, "float32", id=f"{m}-{k.name}") for m in METHOD_NAMES for k in QUANTISED],
)


@pytest.fixture
def cell(request, method: str, kind: Kind, store: str):
    for key, value in (("method", method), ("op", kind.name), ("store", store)):
        request.node.user_properties.append((key, value))
    law = request.node.name.split("_")[1]
    request.node.user_properties.append(("law", law))
    reason = refused(method, kind)
    if reason is not None:
        request.node.user_properties.append(("note", f"refused: {reason}"))
        return None
    return make(method, kind, STORES[store])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What is stored, for tensors that cannot be compared."""
    return tensor.qdata if hasattr(tensor, "qdata") else tensor


def note(request, text: object) -> None:
    request.node.user_properties.append(("note", str(text)))


@cells
def test_L1_equals_base_at_start(cell, method, kind, store, request):
    if cell is None:
        return
    model, x = cell
    if not model.peft_config["default"].starts_as_base:
        note(request, "the method does not start as the base")
        return
    with model.disable_adapter():
        base = model(x)
    assert torch.allclose(model(x), base, atol=1e-6 if store == "float32" else 1e-2)


@cells
def test_L2_live_equals_merged(cell, method, kind, store, request):
    if cell is None:
        return
    model, x = cell
    shake(model)
    with torch.no_grad():
        live = model(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), live, atol=1e-4)  # the adapter does something
        try:
            model.merge_adapter()
        except CannotMergeError as error:
            note(request, error)
            return
        assert torch.allclose(model(x).float(), live.float(), atol=TOLERANCE[STORES[store]] + kind.loose)
        with model.disable_adapter():
            base = model(x)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), base)


@cells
def test_L3_unmerge_restores_bits(cell, method, kind, store, request):
    if cell is None:
        return
    model, x = cell
    shake(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    live = model(x)
    try:
        model.merge_adapter(safe_merge=True)
    except CannotMergeError as error:
        note(request, error)
        return
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(bits(after[n]), bits(p)) for n, p in before.items())
    assert torch.equal(model(x), live)


@cells
def test_L4_save_and_load(cell, method, kind, store, tmp_path):
    if cell is None:
        return
    model, x = cell
    base_keys = list(kind.net().state_dict())
    shake(model)
    model.set_requires_grad("default", False)  # as loaded adapters are: torch's fused attention asks
    live = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh = PeftModel.from_pretrained(kind.net().to(STORES[store]).eval(), tmp_path)
    assert fresh.load_report.clean
    assert torch.equal(fresh(x), live)
    assert [n for n in base_keys if n in fresh.get_base_model().state_dict()] == base_keys
    plain = fresh.unload()
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in kind.net().named_parameters()]
    assert type(plain.layer) is type(kind.net().layer)


@cells
def test_L5_what_is_declared_trains(cell, method, kind, store):
    if cell is None:
        return
    model, x = cell
    shake(model)
    model.train()
    for _ in range(20 if model.peft_config["default"].draws else 1):  # until chance has taken everything once
        model(x).square().sum().backward()
    declared = {id(p) for e in model.adapters.edits["default"] for p in e.trainable()}
    assert declared
    for name, p in model.named_parameters():
        if id(p) in declared:
            assert p.requires_grad, name
            assert p.grad is not None, f"{name} gets no gradient"
            assert p.grad.abs().sum() > 0, f"{name} gets a zero gradient"
        else:
            assert not p.requires_grad, name
            assert p.grad is None, name


@cells
def test_L6_mixed_batch_equals_separate_runs(cell, method, kind, store, request):
    if cell is None:
        return
    model, x = cell
    model.add_adapter("other", config_for(method))
    shake(model, "default", seed=1)
    shake(model, "other", seed=2)
    names = ["default", "other", "__base__", "other", "default", "__base__"]
    wanted = torch.empty_like(model(x))
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        rows = [i for i, n in enumerate(names) if n == adapter]
        wanted[rows] = model(x)[rows]
    with model.disable_adapter():
        wanted[[2, 5]] = model(x)[[2, 5]]
    params = [p for n in ("default", "other") for e in model.adapters.edits[n] for p in e.trainable()]
    weights = torch.randn(wanted.shape, dtype=wanted.dtype)
    separate = torch.autograd.grad((wanted * weights).sum(), params)
    try:
        mixed = model(x, adapter_names=names)
    except MixedBatchError as error:
        note(request, error)
        return
    tolerance = TOLERANCE[STORES[store]] + kind.loose
    assert torch.allclose(mixed, wanted, atol=tolerance)
    together = torch.autograd.grad((mixed * weights).sum(), params)
    for a, b in zip(separate, together, strict=True):
        assert torch.allclose(a, b, atol=tolerance * max(1.0, float(a.abs().max())))


@cells
def test_L7_transparent(cell, method, kind, store, request):
    if cell is None:
        return
    model, x = cell
    shake(model)
    live = model(x)
    assert torch.equal(copy.deepcopy(model)(x), live)
    if kind.pickles:
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), live)
    params = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(live.square().sum(), params)
    out = checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), params)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    half = copy.deepcopy(model).to(torch.bfloat16)
    if not kind.casts:
        half = half.float()
        assert torch.allclose(half(x), live, atol=5e-2)
        return
    assert half(x.bfloat16() if x.is_floating_point() else x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_L7_compiles_without_a_break(method, kind):
    if refused(method, kind) is not None:
        return
    model, x = make(method, kind)
    shake(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
