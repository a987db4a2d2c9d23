"""Examples as tokens: what is trained, where the prompt ends, and what is refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from tiny_chat import CHATML, MARKED, tiny_tokenizer

from deltatune.train.data import (
    IGNORE,
    DataError,
    DataSpec,
    Encoded,
    Example,
    Examples,
    NoTrainedTokens,
    check_max_length,
    describe_encoded,
    encode,
    encode_prompt,
    split_texts,
)

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "see you"},
    {"role": "assistant", "content": "at home\ntonight"},
]


def spec(**options) -> DataSpec:
    return DataSpec(**{"path": "x", "max_length": 256, **options})


def trained(row: Encoded, tokenizer) -> list[str]:
    """The trained stretches of a row, decoded."""
    out, run = [], []
    for token, label in zip([*row.input_ids, 0], [*row.labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            run.append(token)
        elif run:
            out.append(tokenizer.decode(run))
            run = []
    return out


def test_only_the_answer_and_its_end_are_trained() -> None:
    tokenizer = tiny_tokenizer()
    example = Example("Message: win\nLabel:", " ", "spam", source="f:1")
    (row,) = encode([example], tokenizer, spec())
    assert tokenizer.decode(row.input_ids) == "Message: win\nLabel: spam<|im_end|>"
    assert trained(row, tokenizer) == [" spam<|im_end|>"]
    (row,) = encode([example], tokenizer, spec(train_on_prompt=True))
    assert trained(row, tokenizer) == ["Message: win\nLabel: spam<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "separator", "answer"),
    [
        ("Label:", " ", "spam"),
        ("Label: ", "", "spam"),
        ("Mess", "", "age: x"),
        ("Answer:\n", "\n", "\n4"),
        ("", "", "hi"),
    ],
)
def test_generation_starts_from_the_tokens_of_training(prompt: str, separator: str, answer: str) -> None:
    """Also where prompt and answer would melt into one token ("Mess" + "age")."""
    tokenizer = tiny_tokenizer()
    example = Example(prompt, separator, answer, source="f:1")
    (row,) = encode([example], tokenizer, spec())
    start = encode_prompt(example, tokenizer, spec())
    assert start == tokenizer(prompt)["input_ids"]
    assert row.input_ids[: len(start)] == start
    assert row.labels == [IGNORE] * len(start) + row.input_ids[len(start) :]
    assert tokenizer.decode(row.input_ids) == f"{prompt}{separator}{answer}<|im_end|>"


def test_begin_and_end_tokens_that_the_tokenizer_adds_itself() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(bos_token="<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    example = Example("Label:", " ", "spam", source="f:1")
    (row,) = encode([example], tokenizer, spec())
    assert tokenizer.decode(row.input_ids) == "<|im_start|>Label: spam<|im_end|>"
    assert tokenizer.decode(encode_prompt(example, tokenizer, spec())) == "<|im_start|>Label:"
    (row,) = encode([Example(text="free prize")], tokenizer, spec())
    assert tokenizer.decode(row.input_ids) == "<|im_start|>free prize<|im_end|>"


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")]
)
def test_assistant_turns_and_their_end_are_trained(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    (row,) = encode([Example(messages=CHAT)], tokenizer, spec())
    assert trained(row, tokenizer) == ["4<|im_end|>", "at home\ntonight<|im_end|>"]
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    start = encode_prompt(Example(messages=CHAT), tokenizer, spec())
    assert row.input_ids[: len(start)] == start
    assert all(label != IGNORE for label in row.labels[len(start) : len(start) + 2])
    assert tokenizer.decode(start).endswith("<|im_start|>assistant\n")


def test_template_without_end_of_turn_still_learns_to_stop() -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                               "{% if add_generation_prompt %}assistant:{% endif %}")  # fmt: skip
    (row,) = encode([Example(messages=CHAT[1:3])], tokenizer, spec())
    assert trained(row, tokenizer) == [" 4\n<|im_end|>"]


def test_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}" + CHATML.split("%}", 1)[
        1
    ].replace("\n{% endfor %}", "\n{% endif %}{% endfor %}", 1)
    tokenizer = tiny_tokenizer(rewriting)
    (row,) = encode([Example(messages=CHAT[:3])], tokenizer, spec())
    assert trained(row, tokenizer) == ["4<|im_end|>"]
    with pytest.raises(DataError, match=r"f:7: the chat template rewrites earlier turns"):
        encode([Example(messages=CHAT, source="f:7")], tokenizer, spec())


def test_template_that_refuses_a_conversation_is_quoted() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"f:7: .*refuses this conversation \(user, assistant\): roles must alternate"):
        encode([Example(messages=CHAT[1:3], source="f:7")], tokenizer, spec())


def test_no_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template.*instruction-tuned"):
        encode([Example(messages=CHAT)], tiny_tokenizer(None), spec())


def test_raw_text_is_trained_whole() -> None:
    tokenizer = tiny_tokenizer()
    (row,) = encode([Example(text="see you at home")], tokenizer, spec())
    assert trained(row, tokenizer) == ["see you at home<|im_end|>"]
    with pytest.raises(DataError, match="f:2: raw text has no prompt"):
        encode_prompt(Example(text="x", source="f:2"), tokenizer, spec())


# ---- length ----


def test_long_examples_are_cut_marked_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    examples = [Example("Label:", " ", "spam " * 50, source="f:1"), Example("Label:", " ", "ham", source="f:2")]
    with caplog.at_level(logging.WARNING):
        rows = encode(examples, tokenizer, spec(max_length=16))
    assert [row.truncated for row in rows] == [True, False]
    assert len(rows[0]) == 16
    assert "1 of 2 examples are longer than max_length 16" in caplog.text
    text = describe_encoded(rows, spec(max_length=16))
    assert text.startswith("2 rows, ")
    assert text.endswith("longest row 16; 1 cut to 16 tokens")


UNTRAINED = [
    (Example("Message: " * 20, " ", "spam", source="f:3"), "its prompt has [0-9]+ tokens and max_length is 16"),
    (Example("Label:", " ", "  ", source="f:3"), "its answer is empty"),
    (Example(messages=CHAT[:2], source="f:3"), "the assistant says nothing"),
    (Example(messages=CHAT, source="f:3"), "its prompt has [0-9]+ tokens"),
    (Example("", "", "", source="f:3"), "its answer is empty"),
    (Example(text="", source="f:3"), "it has one token"),
]


@pytest.mark.parametrize(("example", "message"), UNTRAINED, ids=[m[:20] for _, m in UNTRAINED])
def test_an_example_without_a_trained_token_is_named(example: Example, message: str) -> None:
    with pytest.raises(NoTrainedTokens, match=f"f:3: .*{message}"):
        encode([Example("a", " ", "b"), example], tiny_tokenizer(), spec(max_length=16))


def test_prompt_too_long_to_generate_from() -> None:
    with pytest.raises(DataError, match="f:3: the prompt has [0-9]+ tokens, max_length is 16"):
        encode_prompt(UNTRAINED[0][0], tiny_tokenizer(), spec(max_length=16))


def test_max_length_beyond_the_model() -> None:
    with pytest.raises(
        DataError, match="max_length 2000 is beyond the model, which reads 1024 tokens; set data.max_length"
    ):
        encode([], tiny_tokenizer(), spec(max_length=2000))
    check_max_length(tiny_tokenizer(), spec(max_length=1024))


def test_long_texts_are_split_without_loss() -> None:
    tokenizer = tiny_tokenizer()
    text = " ".join(f"Message: call {i} now" for i in range(100))
    examples = Examples([Example(text=text, source="book.txt:1")], [Example(text="short")], "text", "raw text")
    pieces = split_texts(examples, tokenizer, spec(max_length=32))
    assert "".join(piece.text or "" for piece in pieces.train) == text
    assert pieces.train[1].source == "book.txt:1#2"
    rows = encode(pieces.train, tokenizer, spec(max_length=32))
    assert not any(row.truncated for row in rows)
    assert "long texts are cut into pieces of 32 tokens" in pieces.describe
    assert pieces.eval == examples.eval
    other = replace(examples, format="messages")
    assert split_texts(other, tokenizer, spec(max_length=32)) is other
