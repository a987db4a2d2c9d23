"""Generation: batches answer as single prompts do, streams as batches do, and limits are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltatune.train.generation import Sampling, context_length, fit, generate_batch, stop_ids, stream
from small_runs import small_model, small_tokenizer

PROMPTS = ["see you", "call now to win a free prize", "home"]


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def ending(model: Any) -> Any:
    """The model with the end token made likely, so that rows end at different places."""
    with torch.no_grad():
        model.lm_head.weight[2] += 0.35 * model.lm_head.weight.norm(dim=1).mean() / 32**0.5
    return model


def test_rows_of_a_batch_answer_as_they_do_alone() -> None:
    model, tokenizer = ending(small_model()), small_tokenizer()
    sampling = Sampling(max_new_tokens=12)
    together = generate_batch(model, tokenizer, [ids(tokenizer, p) for p in PROMPTS], sampling)
    alone = [generate_batch(model, tokenizer, [ids(tokenizer, p)], sampling)[0] for p in PROMPTS]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [(r.tokens, r.finished) for r in together] == [(r.tokens, r.finished) for r in alone]


def test_a_stream_is_the_batch_answer_in_pieces() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    sampling = Sampling(max_new_tokens=20)
    pieces: list[str] = []
    prompt = ids(tokenizer, "see you")
    reply = stream(model, tokenizer, prompt, sampling, pieces.append)
    whole = generate_batch(model, tokenizer, [prompt], sampling)[0]
    assert reply.text == "".join(pieces) == whole.text
    assert (reply.tokens, reply.finished) == (whole.tokens, whole.finished)


def test_an_interrupted_stream_keeps_what_was_said() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    forward, calls = model.forward, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.forward = interrupted
    reply = stream(model, tokenizer, ids(tokenizer, "see you"), Sampling(max_new_tokens=20), lambda text: None)
    assert (reply.finished, reply.tokens) == ("interrupted", 5)
    assert reply.text


def test_the_model_own_generation_settings_do_not_bend_greedy_decoding() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    prompt = [ids(tokenizer, "see you")]
    plain = generate_batch(model, tokenizer, prompt, Sampling(max_new_tokens=16))[0].text
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=0.3, num_beams=3)
    assert generate_batch(model, tokenizer, prompt, Sampling(max_new_tokens=16))[0].text == plain
    bent = generate_batch(model, tokenizer, prompt, Sampling(max_new_tokens=16, repetition_penalty=3.0))[0].text
    assert bent != plain


def test_a_seed_repeats_a_sampled_answer() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    prompt = [ids(tokenizer, "see you")]

    def answer(seed: int) -> str:
        return generate_batch(model, tokenizer, prompt, Sampling(12, temperature=1.5, seed=seed))[0].text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_stop_tokens_are_those_of_model_and_tokenizer() -> None:
    model, tokenizer = small_model(), small_tokenizer()
    model.generation_config.eos_token_id = [0, 1]
    assert stop_ids(model, tokenizer) == [0, 1, 2]


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    model, tokenizer = small_model(max_position_embeddings=8), small_tokenizer()
    assert context_length(model) == 8
    assert fit(6, Sampling(max_new_tokens=9), model) == 2
    with pytest.raises(ValueError, match="the prompt has 9 tokens, but the model reads 8"):
        generate_batch(model, tokenizer, [[5] * 9], Sampling())
    reply = stream(model, tokenizer, [5] * 6, Sampling(max_new_tokens=9), lambda text: None)
    assert reply.tokens <= 2
    with pytest.raises(ValueError, match="prompt 2 of 2 is empty"):
        generate_batch(model, tokenizer, [[5], []], Sampling())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_k": -2}, "top_k is -2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"top_p": 0.5}, "set temperature above 0"),
        ({"top_k": 5}, "set temperature above 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
