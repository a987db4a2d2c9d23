"""BitFit: the card's tests beyond the laws."""

from __future__ import annotations

import pytest
import torch
import transformers

from deltatune import BitFitConfig, PeftModel, get_peft_model
from deltatune.errors import CannotMergeError, ConfigError, TargetError
from tiny import bert, gpt2, ids, llama, shake, t5


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}


def test_only_biases_train_and_nothing_else_moves():
    model = get_peft_model(bert(), BitFitConfig(task_type="SEQ_CLS"))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())
    assert {n.split(".")[-2] for n in trained(model)} <= {"tuned_bias", "default"}
    moments = sum(t.numel() for s in optimizer.state.values() for k, t in s.items() if k.startswith("exp_avg"))
    assert moments == 2 * model.get_nb_trainable_parameters()[0]


def test_count_of_bert_base():
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig())
    model = get_peft_model(model, BitFitConfig())
    # per layer 4 d (q k v o) + 4 d + d (feed-forward) + 2 d (norms); the embeddings' norm; the pooler
    assert model.get_nb_trainable_parameters()[0] == 12 * 11 * 768 + 768 + 768


def test_the_papers_half():
    model = get_peft_model(bert(), BitFitConfig(target_modules=["query", "intermediate.dense"]))
    assert model.get_nb_trainable_parameters()[0] == 2 * (32 + 48)


def test_key_biases_have_no_gradient_without_rotation():
    model = get_peft_model(bert(attn_implementation="eager"), BitFitConfig(target_modules=["key", "query"]))
    shake(model)
    model(input_ids=ids(), labels=torch.tensor([0, 1, 1])).loss.backward()
    grads = {name: p.grad.abs().max() for name, p in trained(model).items()}
    keys, queries = ([g for n, g in grads.items() if part in n] for part in (".key.", ".query."))
    assert max(keys) < 1e-3 * min(queries)


def test_t5_gets_biases(tmp_path):
    """T-Few's variant: zero biases on all of its linear layers, and no other trains."""
    names = ["q", "k", "v", "o", "wi", "wo"]
    model = get_peft_model(t5(), BitFitConfig(task_type="SEQ_2_SEQ_LM", added_modules=names))
    batch = {"input_ids": ids(), "labels": ids()}
    with torch.no_grad():
        base = t5()(**batch).logits
        assert torch.equal(model(**batch).logits, base)
    # encoder layer: 4 d + d_ff + d; decoder layer: 8 d + d_ff + d
    assert model.get_nb_trainable_parameters()[0] == 2 * (4 * 32 + 48 + 32) + 2 * (8 * 32 + 48 + 32)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in trained(model).values())
    shake(model)
    live = model(**batch).logits
    assert not torch.allclose(live, base, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(t5(), tmp_path)(**batch).logits, live)
    with pytest.raises(CannotMergeError, match="adds a bias to a layer that has none"):
        model.merge_adapter()


def test_added_and_own_biases():
    config = BitFitConfig(target_modules=["LayerNorm"], added_modules=["lm_head"])
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.LayerNorm, self.lm_head = nn.LayerNorm(4), nn.Linear(4, 6, bias=False)

        def forward(self, x):
            return self.lm_head(self.LayerNorm(x))

    model = get_peft_model(Net(), config)
    assert {n: tuple(p.shape) for n, p in trained(model).items()} == {
        "LayerNorm.tuned_bias.default": (4,),
        "lm_head.tuned_bias.default": (6,),
    }


@pytest.mark.parametrize(
    ("make", "fields", "error", "message"),
    [
        (llama, {}, TargetError, "no module of this LlamaForCausalLM has a bias"),
        (bert, {"target_modules": ["word_embeddings"]}, TargetError, "'word_embeddings' matches .* has no bias, as"),
        (bert, {"target_modules": ["querry"]}, TargetError, "did you mean 'query'"),
        (bert, {"added_modules": ["query"]}, ConfigError, "has a bias already; name it in target_modules"),
        (llama, {"added_modules": ["input_layernorm"]}, ConfigError, "added_modules is not possible"),
        (llama, {"added_modules": ["nothing"]}, TargetError, "added_modules 'nothing' matches no module"),
        (gpt2, {"layers_to_transform": [7]}, TargetError, "layers_to_transform names layer 7"),
    ],
)
def test_bad_values(make, fields, error, message):
    with pytest.raises(error, match=message):
        get_peft_model(make(), BitFitConfig(**fields))
