"""What columns mean: every layout is found, said, and turned into examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from deltatune.train.data import DataError, DataSpec, Examples, load_examples


def load(tmp_path: Path, rows: list[dict], **options) -> Examples:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(DataSpec(**{"path": str(path), "shuffle": False, "eval_fraction": 0, **options}))


def test_messages_and_sharegpt_are_the_same(tmp_path: Path) -> None:
    plain = load(tmp_path, [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])
    share = load(tmp_path, [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}])
    assert plain.format == share.format == "messages"
    assert plain.train[0].messages == share.train[0].messages
    assert "conversations in column 'conversations'" in share.describe


def test_system_message_is_added_where_there_is_none(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "mine"}, *turns]
    examples = load(tmp_path, [{"messages": turns}, {"messages": own}], system="be brief")
    assert [e.messages[0] for e in examples.train if e.messages] == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "mine"},
    ]


def test_alpaca_with_and_without_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Sing.", "input": "", "output": "la"},
    ]
    examples = load(tmp_path, rows)
    assert examples.format == "alpaca"
    first, second = examples.train
    assert first.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n"
        "### Response:\n"
    )
    assert "### Input" not in (second.prompt or "")
    assert (first.completion, first.separator) == ("2", "")
    assert load(tmp_path, rows, template="{instruction} {input}").train[0].prompt == "Add. 1 1"


def test_as_chat_turns_any_prompt_into_a_conversation(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 1", "output": "2"}]
    (example,) = load(tmp_path, rows, as_chat=True, system="be brief").train
    assert example.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Add.\n\n1 1"},
        {"role": "assistant", "content": "2"},
    ]
    (example, _) = load(tmp_path, [{"text": "t", "label": "a"}, {"text": "t", "label": "b"}], as_chat=True).train
    assert example.messages == [
        {"role": "user", "content": "Text: t\nLabel:"},
        {"role": "assistant", "content": "a"},
    ]
    assert example.label == "a"


def test_prompt_and_completion_are_taken_as_they_are(tmp_path: Path) -> None:
    examples = load(
        tmp_path, [{"prompt": "2+2=", "completion": "4"}, {"prompt": "def f():", "completion": "\n    pass"}]
    )
    texts = [f"{e.prompt}{e.separator}{e.completion}" for e in examples.train]
    assert texts == ["2+2=4", "def f():\n    pass"]
    assert examples.train[1].completion == "pass"


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"question": "q", "answer": "a"}, "Question: q\nAnswer:", "a"),
        ({"id": 1, "context": "c", "question": "q", "answers": ["a", "b"]}, "Context: c\nQuestion: q\nAnswer:", "a"),
        ({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}, "title": "t"},
         "Context: c\nQuestion: q\nAnswer:", "a"),
        ({"passage": "c", "question": "q", "answer": True}, "Passage: c\nQuestion: q\nAnswer:", "true"),
        ({"mr": "name[x]", "ref": "x."}, "Meaning: name[x]\nSentence:", "x."),
        ({"dialogue": "d", "summary": "s"}, "Dialogue: d\nSummary:", "s"),
        ({"source": "s", "target": "t"}, "Source: s\nTarget:", "t"),
    ],
)  # fmt: skip
def test_known_pairs_get_a_prompt(tmp_path: Path, row: dict, prompt: str, completion: str) -> None:
    examples = load(tmp_path, [row])
    assert examples.format == "prompt_completion"
    (example,) = examples.train
    assert (example.prompt, example.separator, example.completion) == (prompt, " ", completion)


def test_all_accepted_answers_are_kept_and_plural_columns_found(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"mr": "m", "ref": "one"}\n')
    (tmp_path / "test.jsonl").write_text('{"mr": "m2", "refs": ["one", "two"]}\n')
    examples = load_examples(DataSpec(path=str(tmp_path)))
    assert examples.eval[0].completion == "one"
    assert examples.eval[0].references == ("one", "two")


def test_classification_prefers_words_to_numbers(tmp_path: Path) -> None:
    rows = [
        {"text": "where is it", "intent": "card arrival", "label": 1},
        {"text": "lost", "intent": "lost card", "label": 0},
    ]
    examples = load(tmp_path, rows)
    assert examples.format == "classification"
    assert examples.labels == ["card arrival", "lost card"]
    assert examples.train[0].prompt == "Text: where is it\nIntent:"
    assert "2 labels in column 'intent' (card arrival, lost card)" in examples.describe


def test_classification_by_number_template_and_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert [e.completion for e in load(tmp_path, rows).train] == ["0", "1"]
    examples = load(tmp_path, rows, template="Message: {text}\nLabel: ")
    assert (examples.train[0].prompt, examples.train[0].separator) == ("Message: a\nLabel: ", "")
    rows = [{"body": "a", "stars": 5.0, "title": "x"}, {"body": "b", "stars": 1.0, "title": "y"}]
    examples = load(tmp_path, rows, columns={"text": "body", "label": "stars"})
    assert [e.prompt for e in examples.train] == ["Body: a\nStars:", "Body: b\nStars:"]
    assert examples.labels == ["1", "5"]


def test_pairs_of_sentences_are_classified(tmp_path: Path) -> None:
    rows = [
        {"premise": "a", "hypothesis": "b", "label": "entailment"},
        {"premise": "c", "hypothesis": "d", "label": "neutral"},
    ]
    assert load(tmp_path, rows).train[0].prompt == "Premise: a\nHypothesis: b\nLabel:"


def test_many_different_labels_are_read_as_answers(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "target": f"answer {i}"} for i in range(40)]
    examples = load(tmp_path, rows)
    assert (examples.format, examples.labels) == ("prompt_completion", None)
    assert examples.train[0].prompt == "Text: t0\nTarget:"


def test_raw_text(tmp_path: Path) -> None:
    examples = load(tmp_path, [{"text": "once"}, {"text": "upon"}])
    assert examples.format == "text"
    assert [e.text for e in examples.train] == ["once", "upon"]


def test_format_can_be_forced(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    assert load(tmp_path, rows, format="text").format == "text"
    assert load(tmp_path, rows, format="prompt_completion").train[0].prompt == "Text: a\nLabel:"


# ---- what is refused ----

BAD = [
    ({"tokens": ["a"], "tags": ["O"]}, {}, "token classification.*not supported here"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, {}, "preference pairs.*completion: chosen"),
    ({"foo": "a", "bar": "b"}, {}, "'foo', 'bar'.*have no layout that is known; name them"),
    ({"text": "a", "label": "x"}, {"columns": {"label": "lable"}}, "'lable'.*is not in .*did you mean 'label'"),
    ({"text": "a", "label": "x"}, {"template": "{txt}:"}, r"template uses \{txt\}.*did you mean 'text'"),
    ({"txt": "a"}, {"format": "text"}, "no column for 'text'.*it has 'txt'.*did you mean 'txt'"),
    ({"instruction": "a", "outptu": "b"}, {"format": "alpaca"}, "no column for 'output'.*did you mean 'outptu'"),
    ({"text": "a", "label": None}, {}, r"rows\.jsonl:1: column 'label' has no label in this row"),
    ({"text": "a", "label": 0.5}, {}, "label 0.5 .* is not a class; regression is not supported"),
    ({"text": "a", "label": "x"}, {}, "has the one value 'x': nothing to tell apart"),
    ({"text": None}, {}, r"rows\.jsonl:1: column 'text' is missing or null"),
    ({"text": {"a": 1}}, {}, r"rows\.jsonl:1: column 'text' holds dict, expected text"),
    ({"prompt": "a", "completion": "b"}, {"system": "s"}, "system is for chats.*set as_chat: true"),
    ({"text": "a"}, {"as_chat": True}, "as_chat and template need prompts"),
    ({"question": "a", "answers": []}, {}, "has no answer"),
    ({"messages": []}, {}, r"rows\.jsonl:1: column 'messages' must be a list of messages"),
    ({"messages": "hello"}, {}, "must be a list of messages, found 'hello'"),
    ({"messages": [{"role": "asistant", "content": "a"}]}, {}, "unknown role 'asistant'.*did you mean 'assistant'"),
    ({"messages": [{"role": "user", "content": None}]}, {}, "content of a user message must be text"),
    ({"messages": ["hi"]}, {}, "a message must be an object with role and content"),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
        {},
        "tool calls, which are not supported",
    ),
]


@pytest.mark.parametrize(("row", "options", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_refused_in_one_sentence(tmp_path: Path, row: dict, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, [row], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"columns": {"txet": "a"}}, "'txet' is no role .*did you mean 'text'"),
        ({"format": "text", "columns": {"label": "a"}}, "'label' is no role of the text format"),
        ({"format": "chatml"}, "Input should be"),
        ({"template": "no fields"}, "must hold at least one column name in braces"),
        ({"template": "{text"}, "cannot be read"),
        ({"template": "{text} {0}"}, "nothing else in braces"),
        ({"format": "messages", "template": "{text}"}, "template has no meaning for the messages format"),
        ({"eval_fraction": 0.1, "eval_path": "x"}, "exclude each other"),
        ({"eval_fraction": 1.0}, "less than 1"),
        ({"max_length": 1}, "greater than or equal to 2"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"path": []}, "is empty"),
        ({"max_len": 5}, "max_len"),
    ],
)
def test_spec_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSpec(**{"path": "x", **fields})


# ---- held-out examples and limits ----


def numbered(n: int) -> list[dict]:
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(n)]


def test_a_tenth_is_held_out_unasked(tmp_path: Path) -> None:
    examples = load(tmp_path, numbered(100), eval_fraction=None, shuffle=True)
    assert (len(examples.train), len(examples.eval)) == (90, 10)
    again = load(tmp_path, numbered(100), eval_fraction=None, shuffle=True)
    assert examples == again
    other = load(tmp_path, numbered(100), eval_fraction=None, shuffle=True, seed=1)
    assert [e.prompt for e in other.train] != [e.prompt for e in examples.train]
    assert "10 held out by chance, seed 0" in examples.describe
    assert load(tmp_path, numbered(10), eval_fraction=None).eval == []


def test_the_same_question_is_never_on_both_sides(tmp_path: Path) -> None:
    examples = load(tmp_path, numbered(20) * 5, eval_fraction=0.3)
    assert not {e.prompt for e in examples.train} & {e.prompt for e in examples.eval}
    assert len(examples.train) + len(examples.eval) == 100
    with pytest.raises(DataError, match="all examples ask the same thing"):
        load(tmp_path, numbered(1) * 30, eval_fraction=0.1)


def test_limits(tmp_path: Path) -> None:
    examples = load(tmp_path, numbered(100), eval_fraction=0.2, limit=7, eval_limit=3)
    assert (len(examples.train), len(examples.eval)) == (7, 3)


def test_overlap_with_a_named_held_out_set_is_said(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "q1", "completion": "a1"}\n{"prompt": "new", "completion": "x"}\n')
    examples = load(tmp_path, numbered(5), eval_fraction=None, eval_path=str(tmp_path / "held.jsonl"))
    assert len(examples.eval) == 2
    assert "1 held-out examples are also in the training set" in examples.describe
