"""Evaluation: the loss is the model's own, the answers are what greedy decoding writes, the scores are right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from deltatune.train import evaluate as module
from deltatune.train.data import DataSpec, Example, encode, load_examples
from deltatune.train.evaluate import evaluate
from deltatune.train.metrics import (
    exact_match,
    infer_labels,
    label_metrics,
    macro_f1,
    normalise,
    to_label,
    token_f1,
)
from small_runs import ROWS, TEMPLATE, small_adapter, small_model, small_tokenizer, write_rows

SPEC = DataSpec(path="unused", max_length=200)


def pairs() -> list[Example]:
    return [
        Example(prompt=TEMPLATE.format(**row), completion=row["label"], separator=" ", source=f"rows:{i}")
        for i, row in enumerate(ROWS)
    ]


def greedy(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> str:
    """Greedy decoding one token at a time, without cache, batch or padding."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    """A model that has learnt the labels of ROWS by heart."""
    torch.manual_seed(0)
    model, tokenizer = small_model(), small_tokenizer()
    rows = encode(pairs(), tokenizer, SPEC)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        row = rows[step % len(rows)]
        model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model, tokenizer


def test_loss_is_the_mean_over_trained_tokens_of_all_examples() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    total, tokens = 0.0, 0
    for row in encode(pairs(), tokenizer, SPEC):
        labels = torch.tensor([row.labels])
        loss = model(input_ids=torch.tensor([row.input_ids]), labels=labels).loss
        total += float(loss.detach()) * row.trained
        tokens += row.trained
    result = evaluate(model, tokenizer, pairs(), SPEC, batch_size=4, generate=False)
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert (result["tokens"], result["examples"]) == (tokens, len(ROWS))
    assert "answers" not in result


def test_a_model_that_cannot_leave_logits_out_gives_the_same_loss() -> None:
    model, tokenizer = small_model(), small_tokenizer()

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    kept = evaluate(model, tokenizer, pairs(), SPEC, generate=False)
    full = evaluate(Plain(), tokenizer, pairs(), SPEC, generate=False)
    assert full["loss"] == pytest.approx(kept["loss"], rel=1e-6)


def test_an_adapter_with_positions_of_its_own_is_asked_for_all_logits() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    plain = evaluate(model, tokenizer, pairs(), SPEC, generate=False)
    forward = model.forward

    def strips(input_ids: torch.Tensor, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        out = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        if logits_to_keep:
            out.logits = out.logits[:, 2:]  # as a prompt method does that cuts its virtual tokens off
        return out

    model.forward = strips
    assert evaluate(model, tokenizer, pairs(), SPEC, generate=False)["loss"] == pytest.approx(plain["loss"])


def test_answers_are_what_greedy_decoding_writes_one_by_one() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    result = evaluate(model, tokenizer, pairs(), SPEC, batch_size=4, max_new_tokens=5)
    prompts = [tokenizer(example.prompt)["input_ids"] for example in pairs()]
    assert result["answers"] == [greedy(model, tokenizer, prompt, 5) for prompt in prompts]
    assert result["references"] == [row["label"] for row in ROWS]


def test_right_answers_are_proved_by_the_loss_and_only_wrong_ones_generated(
    trained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = trained
    asked: list[int] = []
    generate = module.generate_batch

    def counted(model: Any, tokenizer: Any, prompts: Any, sampling: Any) -> Any:
        asked.append(len(prompts))
        return generate(model, tokenizer, prompts, sampling)

    monkeypatch.setattr(module, "generate_batch", counted)
    right = evaluate(model, tokenizer, pairs(), SPEC, labels=["ham", "spam"])
    assert (right["accuracy"], right["exact_match"], right["macro_f1"], asked) == (1.0, 1.0, 1.0, [])

    wrong = pairs()
    wrong[1] = Example(prompt=wrong[1].prompt, completion="spam", separator=" ", source="rows:1")
    result = evaluate(model, tokenizer, wrong, SPEC, labels=["ham", "spam"])
    assert asked == [1]
    assert result["answers"][1] == "ham"
    assert result["accuracy"] == pytest.approx(5 / 6)
    assert result["invalid"] == 0.0


def test_label_scoring_takes_the_likeliest_label(trained: tuple[Any, Any]) -> None:
    model, tokenizer = trained
    result = evaluate(model, tokenizer, pairs(), SPEC, labels=["ham", "spam"], score_labels=True)
    assert (result["label_accuracy"], result["label_macro_f1"]) == (1.0, 1.0)
    random = small_model(seed=3)
    best = []
    for row in ROWS:
        losses = []
        for label in ("ham", "spam"):
            example = Example(prompt=TEMPLATE.format(**row), completion=label, separator=" ")
            ids = encode([example], tokenizer, SPEC)[0]
            loss = random(input_ids=torch.tensor([ids.input_ids]), labels=torch.tensor([ids.labels])).loss
            losses.append(float(loss.detach()) * ids.trained)
        best.append(("ham", "spam")[losses.index(min(losses))])
    result = evaluate(random, tokenizer, pairs(), SPEC, labels=["ham", "spam"], score_labels=True)
    expected = sum(b == row["label"] for b, row in zip(best, ROWS, strict=True)) / len(ROWS)
    assert result["label_accuracy"] == pytest.approx(expected)


def test_the_last_turn_of_a_conversation_is_asked() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    chat = Example(
        messages=[
            {"role": "user", "content": "see you"},
            {"role": "assistant", "content": "at home"},
            {"role": "user", "content": "call now"},
            {"role": "assistant", "content": "free prize"},
        ],
        source="chat:1",
    )
    result = evaluate(model, tokenizer, [chat], SPEC, max_new_tokens=4)
    text = tokenizer.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert result["answers"] == [greedy(model, tokenizer, prompt, 4)]
    assert result["references"] == ["free prize"]


def test_training_on_the_prompt_changes_the_loss_and_not_the_question() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    answers = evaluate(model, tokenizer, pairs(), SPEC, max_new_tokens=4)
    everything = evaluate(
        model, tokenizer, pairs(), SPEC.model_copy(update={"train_on_prompt": True}), max_new_tokens=4
    )
    assert everything["answers"] == answers["answers"]
    assert everything["tokens"] > answers["tokens"]


def test_raw_text_and_long_references_are_measured_by_their_loss() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    text = evaluate(model, tokenizer, [Example(text="see you at home tonight", source="a:1")], SPEC)
    assert "answers" not in text
    long = [Example(prompt="see", completion="x y z " * 30, separator=" ", source="a:1")]
    assert "answers" not in evaluate(model, tokenizer, long, SPEC)
    assert evaluate(model, tokenizer, long, SPEC, max_new_tokens=3)["token_f1"] >= 0.0


def test_several_accepted_answers() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    first = evaluate(model, tokenizer, pairs()[:1], SPEC, max_new_tokens=3)["answers"][0]
    example = Example(
        prompt=pairs()[0].prompt, completion="other", separator=" ", references=("other", first), source="a:1"
    )
    result = evaluate(model, tokenizer, [example], SPEC, max_new_tokens=3)
    assert (result["exact_match"], result["token_f1"]) == (1.0, 1.0)


def test_dropout_is_off_inside_and_modes_come_back() -> None:
    tokenizer = small_tokenizer()
    model = small_adapter(small_model(), lora_dropout=0.5)
    calm = evaluate(model, tokenizer, pairs(), SPEC, generate=False)["loss"]
    model.train()
    model.get_base_model().model.layers[0].eval()
    assert evaluate(model, tokenizer, pairs(), SPEC, generate=False)["loss"] == calm
    assert model.training
    assert not model.get_base_model().model.layers[0].training


def test_labels_of_a_data_set_reach_the_scores(tmp_path: Any) -> None:
    spec = DataSpec(path=str(write_rows(tmp_path / "a.jsonl", ROWS)), template=TEMPLATE, eval_fraction=0.0)
    examples = load_examples(spec)
    result = evaluate(small_model(), small_tokenizer(), examples.train, spec, labels=examples.labels)
    assert result["labels"] == ["ham", "spam"]
    assert 0.0 <= result["invalid"] <= 1.0


def test_what_cannot_be_evaluated_is_said() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, tokenizer, [], SPEC)
    short = small_model(max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"rows:5: the example has \d+ tokens, but the model reads 16"):
        evaluate(short, tokenizer, pairs()[5:], SPEC)
    free = [Example(prompt="see", completion="you", separator=" ", source="a:1")]
    with pytest.raises(ValueError, match="closed set"):
        evaluate(model, tokenizer, free, SPEC, score_labels=True)


def test_normalise_cuts_to_the_first_line_unless_the_reference_has_more() -> None:
    assert normalise("\n  ham  \nMessage: next") == "ham"
    assert normalise("two  words") == "two words"
    assert normalise("one\ntwo", "one\ntwo") == "one two"


def test_exact_match_minds_case_and_labels_do_not() -> None:
    assert exact_match(["Ham", "ham"], [["ham"], ["spam", "ham"]]) == 0.5
    assert to_label(" Top Up failed\n", ["top up failed"]) == "top up failed"
    assert to_label("hamster", ["ham"]) is None


def test_macro_f1_by_hand() -> None:
    wanted = ["a", "a", "a", "b", "b", "c"]
    said = ["a", "a", "b", "b", None, "a"]
    # a: 2·2/(3+3) = 2/3; b: 2·1/(2+2) = 1/2; c: 0
    assert macro_f1(said, wanted) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    scores = label_metrics(said, wanted)
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["invalid"] == pytest.approx(1 / 6)


def test_token_f1_by_hand() -> None:
    # 2 common words of 3 said and 4 wanted: 2·2/7
    assert token_f1(["the cat sat"], [["a cat sat down"]]) == pytest.approx(4 / 7)
    assert token_f1(["x"], [["y", "x"]]) == 1.0


def test_a_label_set_is_seen_only_where_answers_repeat() -> None:
    assert infer_labels(["ham", "spam"] * 5) == ["ham", "spam"]
    assert infer_labels(["Paris", "Rome", "Oslo", "Bern"]) is None
    assert infer_labels(["yes"] * 9) is None
    assert infer_labels(["a\nb", "c"] * 9) is None
