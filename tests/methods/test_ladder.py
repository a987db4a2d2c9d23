"""Ladder side-tuning: the card's tests; nothing is kept for backward in the base, however deep it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltatune import LadderConfig, LoraConfig, PeftModel, get_peft_model, prepare_init
from deltatune.core.structure import find_blocks
from deltatune.errors import CannotMergeError, ConfigError
from deltatune.methods.ladder import LadderEdit
from methods.transformers_zoo import inputs
from methods.transformers_zoo import make as zoo
from tiny import bert, gpt2, ids, llama, shake, t5

FIELDS = {"reduction_factor": 2}


def edit(model) -> LadderEdit:
    return next(e for e in model.adapters.edits["default"] if isinstance(e, LadderEdit))


def kept_bytes(model, **batch) -> int:
    """Bytes that autograd keeps for backward beside the parameters."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(**batch)
    return sum(s.nbytes() for s in kept.values())


def test_nothing_is_kept_in_the_base():
    """With one rung, what is kept for backward does not depend on the base's depth; a LoRA's grows with it."""
    batch = {"input_ids": ids(), "labels": ids()}
    ladders, loras = [], []
    for depth in (2, 6):
        config = LadderConfig(layers_to_transform=[1], **FIELDS)
        ladders.append(kept_bytes(get_peft_model(llama(num_hidden_layers=depth), config), **batch))
        loras.append(kept_bytes(get_peft_model(llama(num_hidden_layers=depth), LoraConfig(r=1)), **batch))
    assert ladders[0] == ladders[1]
    assert loras[1] > 2 * loras[0]
    assert ladders[1] < loras[1] / 3


@pytest.mark.parametrize("make", [llama, gpt2])
def test_only_the_side_network_learns(make):
    model = get_peft_model(make(), LadderConfig(**FIELDS))
    model.train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == ("ladder" in name and "embed_tokens" not in name
                                                           and "wte" not in name), name  # fmt: skip


def test_gates_are_half_open_at_the_start():
    for rung in edit(get_peft_model(llama(), LadderConfig(**FIELDS))).side.rungs():
        assert torch.sigmoid(rung.alpha / rung.temperature).item() == 0.5


def test_an_identity_ladder_is_the_base():
    """r = 1, D = U = I, the last gate shut to s, and the side network's blocks and norm removed."""
    model = get_peft_model(llama(), LadderConfig(reduction_factor=1))
    side = edit(model).side
    with torch.no_grad():
        side.up.weight.copy_(torch.eye(32))
        side.up.bias.zero_()
        for rung in side.rungs():
            rung.down.weight.copy_(torch.eye(32))
            rung.down.bias.zero_()
            rung.alpha.fill_(-1e4)
            rung.block = Through()
        side.net.norm = nn.Identity()
        assert torch.allclose(model(input_ids=ids()).logits, llama()(input_ids=ids()).logits, atol=1e-5)


class Through(nn.Module):
    """A block that does nothing."""

    def forward(self, s, *args, **kwargs):
        return s


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_residual_starts_as_the_base(make):
    model = get_peft_model(make(), LadderConfig(residual=True, **FIELDS))
    with torch.no_grad():
        base = make()(input_ids=ids()).logits
        assert torch.allclose(model(input_ids=ids()).logits, base, atol=1e-6)
        shake(model)
        assert not torch.allclose(model(input_ids=ids()).logits, base, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids()).logits, base)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_with_a_cache(make, beams):
    model = get_peft_model(make(), LadderConfig(residual=True, task_type="CAUSAL_LM", **FIELDS))
    shake(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams, "min_new_tokens": 5}
    padded = {
        "input_ids": torch.cat([ids(1, 5), ids(1, 5) + 1]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1] * 5]),
    }
    plain = model.generate(**padded, use_cache=False, **options)
    assert torch.equal(model.generate(**padded, **options), plain)


def test_files(tmp_path):
    for i, make in enumerate((llama, bert)):
        model = get_peft_model(make(), LadderConfig(layers_to_transform=[1], **FIELDS))
        shake(model)
        model.save_pretrained(tmp_path / str(i))
        for low in (False, True):
            again = PeftModel.from_pretrained(make(), tmp_path / str(i), low_cpu_mem_usage=low)
            with torch.no_grad():
                assert torch.equal(again(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_a_classifiers_pooler_reads_the_side():
    model = get_peft_model(bert(), LadderConfig(task_type="SEQ_CLS", **FIELDS))
    model.train()
    model(input_ids=ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(s.weight.grad is not None for s in edit(model).slots if "position" not in s.key)


@pytest.mark.parametrize(("make", "labels"), [(llama, ids()), (bert, torch.tensor([0, 1, 1]))])
def test_a_16_bit_base(make, labels):
    model = get_peft_model(make().to(torch.bfloat16), LadderConfig(**FIELDS))
    out = model(input_ids=ids(), labels=labels)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (llama, {"reduction_factor": 8}, "does not leave an even number of units for each of 4 heads"),
        (llama, {"reduction_factor": 0}, "reduction_factor must be a whole number"),
        (llama, {"temperature": 0}, "temperature must be positive"),
        (llama, {"target_modules": ["q_proj"]}, "beside the whole stack"),
        (llama, {"layers_to_transform": [2], **FIELDS}, "outside of 2 blocks"),
    ],
)
def test_bad_values(make, fields, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(make(), LadderConfig(**fields))


def test_merging_is_refused():
    with pytest.raises(CannotMergeError, match="runs a network beside the base"):
        get_peft_model(llama(), LadderConfig(**FIELDS)).merge_adapter()


# ---------------------------------------------------------------------- encoders with decoders
PAIRS = ("t5", "bart", "whisper")


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_and_its_decoder(name, tmp_path):
    base = zoo(name)(**inputs(name)).logits
    model = get_peft_model(zoo(name), LadderConfig(residual=True, **FIELDS))
    assert torch.allclose(model(**inputs(name)).logits, base, atol=1e-5)
    shake(model)
    live = model(**inputs(name)).logits
    assert not torch.allclose(live, base, atol=1e-3)
    live.square().sum().backward()
    dead = ("rel", "embed_positions")
    for n, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, n
        assert p.grad is None or p.grad.abs().sum() > 0 or any(d in n for d in dead) or n.endswith("k_proj.bias"), n
    with model.disable_adapter():
        assert torch.equal(model(**inputs(name)).logits, base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo(name), tmp_path)
    assert again.load_report.clean
    assert torch.allclose(again(**inputs(name)).logits, live, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(**inputs(name)).logits, live)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_generation_with_two_caches(name, beams):
    model = get_peft_model(zoo(name), LadderConfig(residual=True, task_type="SEQ_2_SEQ_LM", **FIELDS))
    shake(model)
    given = {k: v for k, v in inputs(name).items() if "decoder" not in k}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    plain = model.generate(**given, use_cache=False, **options)
    assert torch.equal(model.generate(**given, **options), plain)
    assert len(plain) == 2


def test_nothing_is_kept_in_an_encoder_or_a_decoder():
    kept = []
    for depth in (2, 6):
        model = get_peft_model(t5(num_layers=depth), LadderConfig(layers_to_transform=[1], **FIELDS))
        kept.append(kept_bytes(model, input_ids=ids(), labels=ids()))
    assert kept[0] == kept[1]


def test_states_of_another_encoder_call_are_refused():
    model = get_peft_model(zoo("bart"), LadderConfig(**FIELDS))
    other = model.get_base_model().get_encoder()(input_ids=ids() + 1)
    model(input_ids=ids(), decoder_input_ids=ids())
    with pytest.raises(ConfigError, match="encoder_outputs that are not of its encoder's last call"):
        model(encoder_outputs=other, decoder_input_ids=ids())


# ---------------------------------------------------------------------- the base's weights, cut down
CUT = ["llama", "qwen", "gpt2", "gpt_neox", "bloom", "opt", "bert", "deberta", "t5", "bart", "whisper", "mixtral"]


@pytest.mark.parametrize("name", CUT)
def test_a_side_as_wide_as_the_base_starts_as_the_base(name):
    base = zoo(name)
    blocks = find_blocks(base)
    model = get_peft_model(base, LadderConfig(reduction_factor=1, start="magnitude"))
    for e in model.adapters.edits["default"]:
        assert isinstance(e, LadderEdit)
        here = [b.path for b in blocks if b.path.startswith(e.host.path)]
        for rung, path in zip(e.side.rungs(), here, strict=True):
            for n, p in rung.block.named_parameters():
                assert torch.equal(p, base.get_submodule(path).get_parameter(n)), n


def test_the_most_important_dimensions_stay_everywhere():
    """Planted: some hidden dimensions, units and dimensions of heads have large weights."""
    base = zoo("llama")
    hidden, units, head = torch.arange(1, 32, 2), torch.arange(0, 48, 2), torch.tensor([0, 3, 4, 7])
    layer, heads = base.model.layers[1], (torch.arange(4)[:, None] * 8 + head).flatten()
    with torch.no_grad():
        for p in (layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight, layer.mlp.down_proj.weight.mT):
            p[units] *= 50
            p[:, hidden] *= 50
        for p in (layer.self_attn.q_proj.weight, layer.self_attn.o_proj.weight.mT):
            p[heads] *= 50
            p[:, hidden] *= 50
    model = get_peft_model(base, LadderConfig(start="magnitude", **FIELDS))
    thin = edit(model).side.rungs()[1].block
    assert torch.equal(thin.mlp.up_proj.weight, layer.mlp.up_proj.weight[units][:, hidden])
    assert torch.equal(thin.mlp.down_proj.weight, layer.mlp.down_proj.weight[hidden][:, units])
    assert torch.equal(thin.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[heads][:, hidden])
    assert torch.equal(thin.self_attn.k_proj.weight, layer.self_attn.k_proj.weight[heads[:8]][:, hidden])
    assert torch.equal(thin.self_attn.o_proj.weight, layer.self_attn.o_proj.weight[hidden][:, heads])
    assert torch.equal(thin.input_layernorm.weight, layer.input_layernorm.weight[hidden])


def test_a_fused_projection_is_cut_by_heads():
    base = zoo("gpt2")
    model = get_peft_model(base, LadderConfig(start="magnitude", layers_to_transform=[1], **FIELDS))
    thin, whole = edit(model).side.rungs()[0].block.attn, base.transformer.h[1].attn
    bias = whole.c_attn.bias.detach()
    with torch.no_grad():
        bias.copy_(torch.randn(96))
    model = get_peft_model(zoo_with(base), LadderConfig(start="magnitude", layers_to_transform=[1], **FIELDS))
    thin = edit(model).side.rungs()[0].block.attn.c_attn.bias.view(12, 4)
    # every head's dimensions are the same choice, one of each two neighbours, halves together
    picks = [(bias.view(12, 8)[:, None] == thin[:, :, None]).nonzero()[:, 2].view(12, 4)]
    assert (picks[0] == picks[0][0]).all()
    assert torch.equal(picks[0][0, 2:], picks[0][0, :2] + 4)
    assert torch.equal(picks[0][0, :2] // 2, torch.tensor([0, 1]))


def zoo_with(base: nn.Module) -> nn.Module:
    """The same numbers in a model without adapters."""
    fresh = zoo("gpt2")
    own = dict(fresh.named_parameters())
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name in own:
                own[name].copy_(p)
    return fresh


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_importance_by_fisher_information(name, tmp_path):
    base = zoo(name)
    x = ids(2, 5)
    batches = [{"input_ids": x, "labels": x.flip(0)}]
    config = LadderConfig(start="fisher", **FIELDS)
    with pytest.raises(ConfigError, match="start='fisher' looks at data: call prepare_init"):
        get_peft_model(base, config)
    prepare_init(base, config, batches, progress=False)
    stack = {"llama": base.model if name == "llama" else None, "t5": getattr(base, "decoder", None)}[name]
    path = "model" if name == "llama" else "decoder"
    wanted = torch.zeros(32)  # by hand: squared gradients of single rows, of every matrix that touches hidden states
    stack.requires_grad_(True)
    for i in range(2):
        params = [(n, p) for n, p in stack.named_parameters() if "embed" not in n and "relative" not in n]
        grads = torch.autograd.grad(
            base(input_ids=x[i : i + 1], labels=x.flip(0)[i : i + 1]).loss, [p for _, p in params]
        )
        for (n, _), g in zip(params, grads, strict=True):
            square = g.square()
            if g.ndim == 1:
                wanted += square
            else:
                inward = any(
                    w in n for w in ("q_proj", "k_proj", "v_proj", ".q.", ".k.", ".v.", "gate", "up_proj", ".wi")
                )
                wanted += square.sum(0 if inward else 1)
    stack.requires_grad_(False)
    assert torch.allclose(config.prepared[path]["hidden"], wanted, rtol=1e-3)
    model = get_peft_model(base, config)
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo(name), tmp_path)  # a file needs no data
    extra = {"decoder_input_ids": x} if name == "t5" else {}
    assert torch.allclose(again(input_ids=x, **extra).logits, model(input_ids=x, **extra).logits, atol=1e-4)


def test_blocks_by_the_users_word():
    """Whole paths and name endings mean the same in the model, in its stacks, and for the start."""
    for name, roles in (
        ("llama", {"blocks": r"model\.layers\.\d+"}),
        ("t5", {"blocks": r".*block\.\d", "norm": ["layer_norm"]}),
    ):
        found = []
        for given in ({}, roles):
            torch.manual_seed(4)
            model = get_peft_model(zoo(name), LadderConfig(start="magnitude", roles=given, **FIELDS))
            found.append(model(**inputs(name)).logits)
        assert torch.equal(*found)


def test_starts_that_are_refused():
    with pytest.raises(ConfigError, match=r"start 'fischer' is not one of.*did you mean 'fisher'"):
        LadderConfig(start="fischer")
    with pytest.raises(ConfigError, match="start='magnitude' needs no data"):
        prepare_init(llama(), LadderConfig(start="magnitude", **FIELDS), [{"input_ids": ids()}], progress=False)
