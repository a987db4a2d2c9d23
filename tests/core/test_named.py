"""Models whose structure does not show their parts: what is missing is said, and `roles` names it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltatune import (
    AdaMixConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    FarConfig,
    Fuse,
    FusionConfig,
    GatedLoraConfig,
    HoulsbyConfig,
    IA3Config,
    LNTuningConfig,
    LoReftConfig,
    ParallelConfig,
    PeftModel,
    PfeifferConfig,
    S4Config,
    SparseAdapterConfig,
    UnionConfig,
    get_peft_model,
)
from deltatune.core.named import Named
from deltatune.core.sublayers import find_sublayers
from deltatune.errors import ConfigError, TargetError
from tiny import shake

D = 16


class Scale(nn.Module):
    """A norm that is not called one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (D,), self.gain)


class Mixer(nn.Module):
    """Attention that is not called so; its output layer comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.delta = nn.Linear(D, D)
        self.alpha, self.beta, self.gamma = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.alpha, self.beta, self.gamma))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.delta(mixed)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(torch.tanh(self.rise(x)))


class Stage(nn.Module):
    def __init__(self, post: bool) -> None:
        super().__init__()
        self.mix, self.wide, self.scale_a, self.scale_b, self.post = Mixer(), Wide(), Scale(), Scale(), post

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.scale_a(x + self.mix(x))
            return self.scale_b(x + self.wide(x))
        x = x + self.mix(self.scale_a(x))
        return x + self.wide(self.scale_b(x))


class Odd(nn.Module):
    """No list of blocks, and no name that says anything."""

    def __init__(self, post: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(20, D)
        for i in range(4):
            self.add_module(f"stage_{i}", Stage(post))
        self.last = nn.Linear(D, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for i in range(4):
            x = self.get_submodule(f"stage_{i}")(x)
        return self.last(x.mean(1))


ROLES = {
    "blocks": r"stage_\d+", "attention": ["mix"], "norm": ["scale_a", "scale_b"], "query": ["alpha"], "key": ["beta"],
    "value": ["gamma"],
}  # fmt: skip
GROUPS = {"budget": 680, "methods": [["adapter", "lora"], ["lora", "bitfit"]], "groups": [2, 2]}
CONFIGS = {
    "houlsby": HoulsbyConfig(reduction_factor=4, roles=ROLES),
    "pfeiffer": PfeifferConfig(reduction_factor=4, roles=ROLES),
    "parallel": ParallelConfig(reduction_factor=4, mh_adapter=True, roles=ROLES),
    "compacter": CompacterConfig(reduction_factor=4, phm_dim=2, phm_init_range=0.1, roles=ROLES),
    "adamix": AdaMixConfig(reduction_factor=4, roles=ROLES),
    "sparse": SparseAdapterConfig(reduction_factor=4, score="magnitude", roles=ROLES),
    "s4": S4Config(**GROUPS, roles=ROLES),
    "ln": LNTuningConfig(roles=ROLES),
    "ia3": IA3Config(roles=ROLES),
    "far": FarConfig(roles=ROLES),
    "gated": GatedLoraConfig(r=2, gate="token", roles=ROLES),
    "reft": LoReftConfig(r=2, roles=ROLES),
    "union": UnionConfig(configs=[IA3Config(), ParallelConfig(reduction_factor=4), BitFitConfig()], roles=ROLES),
}


def odd(post: bool = False) -> Odd:
    torch.manual_seed(0)
    return Odd(post).eval()


def ids() -> Tensor:
    return torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method(name, post, tmp_path):
    model = get_peft_model(odd(post), CONFIGS[name])
    with model.disable_adapter():
        assert torch.equal(model(ids()), odd(post)(ids()))
    assert torch.allclose(model(ids()), odd(post)(ids()), atol=0.2)
    shake(model)
    live = model(ids())
    assert not torch.allclose(live, odd(post)(ids()), atol=1e-3)
    live.square().sum().backward()
    dead = {"stage_0.mix.beta.bias"}  # a key's bias is the same for all keys
    for n, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None or n in dead, n
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(odd(post), tmp_path)
    assert again.load_report.clean
    assert torch.equal(again(ids()), live)


def test_sublayers():
    for post in (False, True):
        base = odd(post)
        found = [s for s in find_sublayers(base, Named.of(base, ROLES)) if s.block.index == 1]
        norms = ("stage_1.scale_a", "stage_1.scale_b") if post else (None, None)
        residuals = ("stage_1.mix", "stage_1.wide") if post else ("stage_1.scale_a", "stage_1.scale_b")
        assert [(s.kind, s.output, s.reads, s.norm, s.residual, s.size) for s in found] == [
            ("attention", "stage_1.mix.delta", "stage_1.mix", norms[0], residuals[0], D),
            ("feedforward", "stage_1.wide.fall", "stage_1.wide", norms[1], residuals[1], D),
        ]


def test_named_feedforward_and_outputs():
    base = odd()
    roles = {**ROLES, "attention_output": ["mix.gamma"], "feedforward": ["wide"], "feedforward_output": ["wide"]}
    kinds = {s.kind: (s.output, s.reads) for s in find_sublayers(base, Named.of(base, roles)) if s.block.index == 0}
    assert kinds == {
        "attention": ("stage_0.mix.gamma", "stage_0.mix"),
        "feedforward": ("stage_0.wide", "stage_0.wide"),
    }
    roles = {**ROLES, "norm_after_attention": ["scale_a"], "norm_after_feedforward": []}
    roles["feedforward"] = ["rise", "fall"]
    found = find_sublayers(base, Named.of(base, roles))[:2]
    assert [(s.output, s.reads, s.norm) for s in found] == [
        ("stage_0.mix.delta", "stage_0.mix", "stage_0.scale_a"),
        ("stage_0.wide.fall", "stage_0.wide.rise", None),
    ]


def test_no_norm_and_no_attention_by_the_users_word():
    """An empty list says that there is none; what is left is the feed-forward part, all of it."""
    base = odd()
    roles = {"blocks": r"stage_\d", "attention": [], "norm": [], "feedforward": ["wide"]}
    assert [(s.kind, s.size) for s in find_sublayers(base, Named.of(base, roles))] == [("feedforward", D)] * 4
    model = get_peft_model(base, LoReftConfig(r=2, roles={"blocks": r"stage_\d", "norm": []}))
    assert model.get_nb_trainable_parameters()[0] == 4 * (2 * 2 * D + 2)


def test_fusion_of_adapters_in_named_places():
    model = get_peft_model(odd(), PfeifferConfig(reduction_factor=4, roles=ROLES), adapter_name="a")
    model.add_adapter("b", PfeifferConfig(reduction_factor=4, roles=ROLES))
    model.add_adapter("a,b", FusionConfig(adapters=["a", "b"]))
    model.set_adapter(Fuse("a", "b"))
    shake(model)
    assert not torch.allclose(model(ids()), odd()(ids()), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "role", "inside", "example"),
    [
        (PfeifferConfig, (), "Odd", r"no block .*roles={'blocks': r'stage_\\d\+'}; .* is called 'stage_\\d\+'"),
        (PfeifferConfig, ("blocks",), "'stage_0'", r"no self-attention .*{'attention': \['mix'\]}; .*'mix', 'wide'"),
        (FarConfig, ("blocks",), "'stage_0'", "no self-attention "),
        (IA3Config, ("blocks", "attention", "norm"), "'stage_0.mix'", r"no key projection .*roles={'key': \['beta'\]}"),
        (HoulsbyConfig, ("blocks", "attention"), "'stage_0'", "no normalisation layer .*'scale_a', 'scale_b'"),
    ],
)
def test_what_is_missing_is_named(config, role, inside, example):
    base = odd()
    with pytest.raises(TargetError, match=example) as caught:
        get_peft_model(base, config(roles={r: ROLES[r] for r in role}))
    assert inside in str(caught.value)
    assert not any(hasattr(m, "_edits") for m in base.modules())


def test_what_is_refused():
    with pytest.raises(ConfigError, match=r"roles names 'atention', which is not one of .*did you mean 'attention'"):
        get_peft_model(odd(), PfeifferConfig(roles={**ROLES, "atention": ["mix"]}))
    with pytest.raises(TargetError, match=r"roles\['attention'\] 'mixx' matches no module.*did you mean 'mix'"):
        get_peft_model(odd(), PfeifferConfig(roles={**ROLES, "attention": ["mixx"]}))
    with pytest.raises(TargetError, match=r"names 'stage_0' and 'stage_0.mix', which is inside it"):
        get_peft_model(odd(), PfeifferConfig(roles={**ROLES, "blocks": r"stage_\d(\.mix)?"}))
    with pytest.raises(TargetError, match=r"a string is a regular expression over whole paths, and \['mix'\] matches"):
        get_peft_model(odd(), HoulsbyConfig(roles={"attention": "mix"}))
    with pytest.raises(TargetError, match="roles names 'stage_0.mix' as 'attention' and as 'feedforward'"):
        get_peft_model(odd(), HoulsbyConfig(roles={"attention": ["mix"], "feedforward": ["mix"]}))
    with pytest.raises(ConfigError, match="roles must be a table"):
        HoulsbyConfig(roles=["mix"])
    with pytest.raises(ConfigError, match=r"roles\['blocks'\] must be a list of name endings or .*, not 3"):
        HoulsbyConfig(roles={"blocks": 3})
    with pytest.raises(ConfigError, match="target_modules names the places itself"):
        get_peft_model(odd(), BottleneckConfig(roles=ROLES, target_modules=["fall"]))


def test_files_of_peft_have_no_roles(tmp_path):
    get_peft_model(odd(), IA3Config(roles=ROLES)).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert "roles" not in text
    assert '"wide.fall"' in text or '"fall"' in text


def test_layers_that_have_no_number_cannot_be_dropped():
    model = get_peft_model(odd(), PfeifferConfig(reduction_factor=4, roles=ROLES))
    with pytest.raises(ConfigError, match="no adapter lies in a numbered layer of this Odd"), model.drop_layers(1):
        pass
    with model.drop_layers(0):
        model(ids())
