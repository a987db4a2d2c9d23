"""Packing, padding, and what they must not change: the loss."""

from __future__ import annotations

import pytest
import torch
from tiny_chat import tiny_llama, tiny_tokenizer

from deltatune.train.data import IGNORE, Collator, DataError, Encoded, PackingError, check_packing, pack, preview


def rows(*lengths: int, prompt: int = 1) -> list[Encoded]:
    out = []
    for n, length in enumerate(lengths):
        ids = [3 + (11 * n + 7 * i) % 390 for i in range(length)]
        out.append(Encoded(ids, [IGNORE] * prompt + ids[prompt:], source=f"r{n}"))
    return out


def total_loss(model: object, batch: dict) -> tuple[float, int]:
    """Sum over trained tokens, and their number."""
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits  # type: ignore[operator]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss.item(), int((labels[:, 1:] != IGNORE).sum())


def test_pack_fills_rows_and_keeps_every_example_whole() -> None:
    packed = pack(rows(5, 3, 8, 2, 6), max_length=8)
    assert sorted(len(row) for row in packed) == [8, 8, 8]  # 8; 6 + 2; 5 + 3
    starts = [i for row in packed for i, p in enumerate(row.position_ids or []) if p == 0]
    assert len(starts) == 5
    assert sorted(t for row in packed for t in row.input_ids) == sorted(
        t for row in rows(5, 3, 8, 2, 6) for t in row.input_ids
    )


def test_pack_never_trains_the_first_token_of_an_example() -> None:
    (row,) = pack(rows(4, 4, prompt=0), max_length=8)
    assert row.position_ids == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [i for i, label in enumerate(row.labels) if label == IGNORE] == [0, 4]


def test_pack_refuses_an_example_longer_than_a_row() -> None:
    with pytest.raises(DataError, match="r0: the example has 9 tokens"):
        pack(rows(9), max_length=8)


def test_packing_ten_thousand_examples_wastes_little() -> None:
    examples = rows(*[(i * 37) % 90 + 10 for i in range(10_000)])
    packed = pack(examples, max_length=256)
    assert all(len(row) <= 256 for row in packed)
    assert sum(map(len, packed)) / (256 * len(packed)) > 0.98


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_equal_unpacked(attention: str) -> None:
    model = tiny_llama(attn_implementation=attention)
    examples = rows(7, 12, 5, 20, 3, 9, prompt=2)
    collate = Collator(tiny_tokenizer())
    results = []
    for encoded in (examples, pack(examples, max_length=32)):
        batch = collate(encoded)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE
        )
        model.zero_grad()
        loss.backward()
        results.append((loss.item(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_packed_loss_would_differ_if_examples_saw_each_other() -> None:
    """The test above can fail: without the restarted positions the loss is another."""
    model = tiny_llama()
    examples = rows(7, 12, 5, prompt=2)
    collate = Collator(tiny_tokenizer())
    with torch.no_grad():
        plain = total_loss(model, collate(examples))
        joined = collate(pack(examples, max_length=24))
        joined.pop("position_ids")
        leaking = total_loss(model, joined)
    assert plain[1] == leaking[1]
    assert abs(plain[0] - leaking[0]) > 0.1


def test_collator_pads_on_the_right_to_a_multiple() -> None:
    batch = Collator(tiny_tokenizer(), pad_to_multiple_of=8)(rows(3, 10))
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 10]
    assert batch["labels"][0, 3:].tolist() == [IGNORE] * 13
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


def test_end_token_that_is_also_the_pad_token_stays_trained() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = Encoded([5, 6, tokenizer.eos_token_id], [IGNORE, 6, tokenizer.eos_token_id])
    assert Collator(tokenizer)([row])["labels"][0, :3].tolist() == [IGNORE, 6, tokenizer.eos_token_id]


def test_check_packing_accepts_llama_and_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64))
    for model in (tiny_llama(), gpt2.train()):
        check_packing(model)
    assert gpt2.training


def test_check_packing_accepts_sliding_windows() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(
        **sizes, head_dim=16, num_hidden_layers=2, vocab_size=100, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    check_packing(Gemma3ForCausalLM(config))


def test_check_packing_refuses_a_recurrent_model() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=4))
    with pytest.raises(PackingError, match=r"MambaForCausalLM.*set data.packing to false"):
        check_packing(mamba)


def test_packed_rows_train_in_the_transformers_trainer(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    model, examples = tiny_llama(), rows(7, 12, 5, 20, prompt=2)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    packed = pack(examples, max_length=24)
    trainer = Trainer(model, arguments, data_collator=Collator(tiny_tokenizer()), train_dataset=packed)
    result = trainer.train()
    assert 0 < result.training_loss < 100
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)


def test_preview_marks_trained_tokens_and_examples() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Message: win")["input_ids"]
    end = tokenizer(" spam")["input_ids"] + [tokenizer.eos_token_id]
    row = Encoded(ids + end, [IGNORE] * len(ids) + end, source="f.jsonl:3")
    plain = preview([row], tokenizer).plain
    assert "1. f.jsonl:3" in plain
    assert "Message: win⟦ spam<|im_end|>⟧" in plain
    assert preview(pack([row, row], 64), tokenizer).plain.count("next example in the same row") == 1
    assert "characters" in preview([Encoded(ids * 200, ids * 200)], tokenizer, width=50).plain
