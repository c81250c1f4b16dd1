"""Tests of forms: every supported layout of the same data gives the same canonical rows."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.data.forms import Form, Record, RowError, canonical, detect
from embrm.data.sources import SourceTable


def _table(columns: dict[str, list[Any]]) -> SourceTable:
    rows = len(next(iter(columns.values())))
    return SourceTable(
        "mine", 'path = "data/mine.csv"', tuple(columns), columns, list(range(rows)), "mine"
    )


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _read(columns: dict[str, list[Any]]) -> tuple[Form, list[Record]]:
    """Detect the form of columns of pairs and convert all rows."""
    form = detect(_table(columns))
    prompts = columns.get("prompt", [None] * len(columns["chosen"]))
    rows = zip(prompts, columns["chosen"], columns["rejected"], strict=True)
    return form, [canonical(form, prompt, (one, other)) for prompt, one, other in rows]


def _chat(record: Record) -> tuple[list[tuple[str, str]], ...]:
    """Prompt and responses as (role, content) lists."""
    return tuple(
        [(message["role"], message["content"]) for message in json.loads(text)]
        for text in (record.prompt, *record.responses)
    )


Q = [("user", "q")]
YES_NO = (Q, [("assistant", "yes")], [("assistant", "no")])

CHAT = {
    "explicit": {"prompt": [_user("q")], "chosen": [_answer("yes")], "rejected": [_answer("no")]},
    "implicit": {"chosen": [_user("q"), _answer("yes")], "rejected": [_user("q"), _answer("no")]},
    "repeated": {
        "prompt": [_user("q")],
        "chosen": [_user("q"), _answer("yes")],
        "rejected": [_user("q"), _answer("no")],
    },
}
UNUSUAL_CHAT = {
    # UltraFeedback: the prompt is a string, the completions are whole conversations.
    "prompt string, whole conversations": {
        "prompt": "q",
        "chosen": [_user("q"), _answer("yes")],
        "rejected": [_user("q"), _answer("no")],
    },
    "prompt string, last turns": {
        "prompt": "q",
        "chosen": [_answer("yes")],
        "rejected": [_answer("no")],
    },
    "prompt messages, last turns as strings": {
        "prompt": [_user("q")],
        "chosen": "yes",
        "rejected": "no",
    },
}
TRANSCRIPTS = {
    "whole": {
        "chosen": "\n\nHuman: q\n\nAssistant: yes",
        "rejected": "\n\nHuman: q\n\nAssistant: no",
    },
    "prompt and last turn": {"prompt": "Human: q", "chosen": " yes", "rejected": "no\n"},
    "open prompt and last turn": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": " yes",
        "rejected": " no",
    },
    "prompt repeated": {
        "prompt": "\n\nHuman: q\n\nAssistant:",
        "chosen": "\n\nHuman: q\n\nAssistant: yes",
        "rejected": "\n\nHuman: q\n\nAssistant: no",
    },
    "plain prompt, whole transcripts": {
        "prompt": "q",
        "chosen": "Human: q\n\nAssistant: yes",
        "rejected": "Human: q\n\nAssistant: no",
    },
}


def _column(row: dict[str, Any], copies: int = 2) -> dict[str, list[Any]]:
    return {name: [value] * copies for name, value in row.items()}


@pytest.mark.parametrize("prompt", list(CHAT))
def test_conversational_forms(prompt: str) -> None:
    form, records = _read(_column(CHAT[prompt]))
    assert form == Form("pairs", "chat", prompt, False)
    assert [_chat(record) for record in records] == [YES_NO] * 2
    assert records[0].kind == "chat"
    assert records[0].lengths == (3, 2)


@pytest.mark.parametrize("row", UNUSUAL_CHAT.values(), ids=list(UNUSUAL_CHAT))
def test_mixtures_of_strings_and_messages(row: dict[str, Any]) -> None:
    _, records = _read(_column(row))
    assert [_chat(record) for record in records] == [YES_NO] * 2


@pytest.mark.parametrize("row", TRANSCRIPTS.values(), ids=list(TRANSCRIPTS))
def test_transcripts(row: dict[str, Any]) -> None:
    form, records = _read(_column(row))
    assert form.format == "transcript"
    assert [_chat(record) for record in records] == [YES_NO] * 2
    assert records[0].lengths == (3, 2)


def test_plain_forms() -> None:
    wanted = Record("text", "What now? ", ("Go on", "Stop"), (5, 4))
    form, records = _read({"prompt": ["What now? "], "chosen": ["Go on"], "rejected": ["Stop"]})
    assert (form, records) == (Form("pairs", "text", "explicit", False), [wanted])
    whole = {"chosen": ["What now? Go on"], "rejected": ["What now? Stop"]}
    form, records = _read(whole)
    assert (form, records) == (Form("pairs", "text", "implicit", False), [wanted])
    form, records = _read({"prompt": ["What now? "], **whole})
    assert (form, records) == (Form("pairs", "text", "repeated", False), [wanted])


@given(st.text("ab ", max_size=8), st.lists(st.text("ab ", max_size=8), min_size=2, max_size=4))
def test_an_implicit_text_prompt_is_the_longest_shared_beginning_of_whole_words(
    head: str, tails: list[str]
) -> None:
    form = Form("pairs", "text", "implicit", False)
    texts = [head + tail for tail in tails]
    try:
        record = canonical(form, None, texts)
    except RowError:
        return
    assert [record.prompt + response for response in record.responses] == texts
    assert record.prompt[-1].isspace()
    # It is the longest: the next words differ, or a text has no further complete word.
    firsts = {response.partition(" ")[::2] for response in record.responses}
    assert len({word for word, _ in firsts}) > 1 or any(
        " " not in response for response in record.responses
    )


def test_multi_turn_prompts_and_system_messages() -> None:
    head = [_system("s"), _user("a"), _answer("b"), _user("q")]
    wanted = [(message["role"], message["content"]) for message in head]
    for prompt, begin in ((head, []), (head, head), (None, head), ("q", head), ("a", head)):
        columns = {
            "prompt": [prompt],
            "chosen": [[*begin, _answer("yes")]],
            "rejected": [[*begin, _answer("no")]],
        }
        if prompt is None:
            del columns["prompt"]
        _, [record] = _read(columns)
        assert _chat(record) == (wanted, *YES_NO[1:])
    transcript = "Human: a\n\nAssistant: b\n\nHuman: q"
    _, [record] = _read({"prompt": [transcript], "chosen": ["yes"], "rejected": ["no"]})
    assert _chat(record) == (wanted[1:], *YES_NO[1:])


def test_responses_of_conversations_that_differ_from_the_first_answer_on_keep_later_turns() -> None:
    dialogue = "Human: q\n\nAssistant: {}\n\nHuman: more\n\nAssistant: {}"
    _, [record] = _read(
        {"chosen": [dialogue.format("a", "b")], "rejected": [dialogue.format("c", "d")]}
    )
    assert _chat(record) == (
        Q,
        [("assistant", "a"), ("user", "more"), ("assistant", "b")],
        [("assistant", "c"), ("user", "more"), ("assistant", "d")],
    )
    assert record.lengths == (6, 6)


def test_the_prompt_of_conversations_that_differ_in_a_user_turn_ends_before_the_answer() -> None:
    body = [_user("q"), _answer("a")]
    _, [record] = _read(
        {
            "chosen": [[*body, _user("x"), _answer("b")]],
            "rejected": [[*body, _user("y"), _answer("b")]],
        }
    )
    assert _chat(record)[0] == Q
    assert _chat(record)[1][0] == ("assistant", "a")


def test_a_text_that_quotes_a_transcript_is_plain_text() -> None:
    inside = 'Complete: "\n\nHuman: hi\n\nAssistant:"'
    form, [record] = _read({"prompt": [inside], "chosen": ["yes"], "rejected": ["no"]})
    assert form.format == "text"
    assert record.prompt == inside


@pytest.mark.parametrize(("share", "format"), [(1, "text"), (8, "text"), (9, "transcript")])
def test_the_format_is_decided_for_the_whole_dataset(share: int, format: str) -> None:
    prompts = ["Human: a"] * share + ["What?"] * (10 - share)
    columns = {"prompt": prompts, "chosen": ["yes"] * 10, "rejected": ["no"] * 10}
    form = detect(_table(columns))
    assert form.format == format
    if format == "text":
        assert canonical(form, "Human: a", ("yes", "no")).prompt == "Human: a"
    else:
        with pytest.raises(RowError, match="wrong_form"):
            canonical(form, "What?", ("yes", "no"))


def test_one_response_that_begins_with_its_prompt_does_not_make_the_form_repeated() -> None:
    columns = {"prompt": ["a ", "b "], "chosen": ["a x", "y"], "rejected": ["a z", "w"]}
    form, records = _read(columns)
    assert form.prompt == "explicit"
    assert records[0].responses == ("a x", "a z")


def test_groups_and_best_of_n() -> None:
    form = detect(_table({"prompt": ["q"], "response": ["a"], "gold": [1]}))
    assert form == Form("groups", "text", "explicit", False)
    assert canonical(form, "q", ("a",)) == Record("text", "q", ("a",), (1,))
    whole = [_user("q"), _answer("yes")]
    form = detect(_table({"prompt": ["q"], "response": [whole], "gold": [1]}))
    assert _chat(canonical(form, "q", (whole,))) == YES_NO[:2]
    form = detect(_table({"prompt": ["q"], "best": ["a"], "losers": [["b", "c"]]}))
    assert form == Form("best_of_n", "text", "explicit", False)
    assert canonical(form, "q", ("a", "b", "c")).pick(0, 2) == Record(
        "text", "q", ("a", "c"), (1, 1)
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "chosen"], "has chosen but no column 'rejected'"),
        (["prompt", "response"], "has response but no column 'gold'"),
        (["response", "gold"], "has response and gold but no column 'prompt'"),
        (["best"], "has best but no column 'losers'"),
        (
            ["prompt"],
            'in a spec: [[data]] path = "data/mine.csv", '
            'columns = { chosen = "COLUMN", rejected = "COLUMN" }',
        ),
        (["prompt", "accepted", "rejected"], ', columns = { chosen = "accepted" }'),
    ],
)
def test_missing_columns(columns: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        detect(_table({name: ["x"] for name in columns}))
    assert message in str(caught.value)
    assert "columns = {" in str(caught.value)
    assert all(repr(name) in str(caught.value) for name in columns)
    assert "\n" not in str(caught.value)


TEXT = Form("pairs", "text", "explicit", False)
REPEATED = Form("pairs", "text", "repeated", False)
IMPLICIT = Form("pairs", "text", "implicit", False)
MESSAGES = Form("pairs", "chat", "explicit", False)
SHARED = Form("pairs", "chat", "implicit", False)
WHOLE = Form("pairs", "transcript", "implicit", True)
TURNS = Form("pairs", "transcript", "explicit", False)


@pytest.mark.parametrize(
    ("form", "prompt", "chosen", "rejected", "reason", "detail"),
    [
        (TEXT, None, "a", "b", "missing_value", "prompt is null"),
        (TEXT, "q", None, "b", "missing_value", "a response is null"),
        (TEXT, " \n", "a", "b", "empty_prompt", r"' \n'"),
        (TEXT, "q", "a", " ", "empty_response", "' '"),
        (TEXT, 3, "a", "b", "wrong_form", "prompt is 3, not text or messages"),
        (TEXT, "q", "a", 2.5, "wrong_form", "a response is 2.5, not text or messages"),
        (TEXT, "q", "a\ud800", "b", "wrong_form", "not Unicode"),
        (REPEATED, "q ", "q a", "b", "wrong_form", "does not begin with 'q '"),
        (REPEATED, "q ", "q ", "q b", "empty_response", "''"),
        (IMPLICIT, None, "one", "two", "empty_prompt", "share no beginning"),
        (IMPLICIT, None, "a b ", "a b c", "empty_response", "''"),
        (MESSAGES, [], [_answer("a")], [_answer("b")], "empty_prompt", "[]"),
        (MESSAGES, [_user(" ")], [_answer("a")], [_answer("b")], "empty_prompt", "role"),
        (MESSAGES, [_system("s")], [_answer("a")], [_answer("b")], "empty_prompt", "role"),
        (MESSAGES, [_user("q")], [], [_answer("b")], "empty_response", "no message"),
        (MESSAGES, [_user("q")], [_answer("")], [_answer("b")], "empty_response", "''"),
        (MESSAGES, [_user("q")], [{"role": "assistant"}], "b", "wrong_form", "a response has"),
        (MESSAGES, [_user("q")], ["a"], [_answer("b")], "wrong_form", "a response has 'a'"),
        (MESSAGES, [{"role": "x", "content": "q"}], "a", "b", "wrong_form", "prompt has"),
        (MESSAGES, [_answer("q")], "a", "b", "wrong_form", "prompt ends with an assistant"),
        (MESSAGES, [_user("q")], [_user("q")], [_answer("b")], "wrong_form", "only some"),
        (
            MESSAGES,
            [_user("q")],
            [_user("other"), _answer("a")],
            [_user("q"), _answer("b")],
            "wrong_form",
            "begins with other messages",
        ),
        (
            MESSAGES,
            "other",
            [_user("q"), _answer("a")],
            [_user("q"), _answer("b")],
            "wrong_form",
            "no user message of the responses is prompt 'other'",
        ),
        (
            MESSAGES,
            [_user("q")],
            [_answer("a"), _user("?")],
            [_answer("b")],
            "wrong_form",
            "a response ends with a user message",
        ),
        (
            MESSAGES,
            [_user("q")],
            [_user("q")],
            [_user("q"), _answer("a")],
            "empty_response",
            "no message after the prompt",
        ),
        (
            SHARED,
            None,
            [_user("q"), _answer("a")],
            [_user("r"), _answer("b")],
            "empty_prompt",
            "share no beginning",
        ),
        (WHOLE, None, "Human: q\n\nAssistant: ", "Human: q\n\nAssistant: b", "empty_response", ""),
        (WHOLE, None, "hello", "Human: q\n\nAssistant: b", "wrong_form", "'hello' does not begin"),
        (WHOLE, None, " ", "Human: q\n\nAssistant: b", "empty_response", "no message"),
        (
            Form("pairs", "transcript", "repeated", True),
            "Human: other",
            "Human: q\n\nAssistant: a",
            "Human: q\n\nAssistant: b",
            "wrong_form",
            "does not begin with prompt 'Human: other'",
        ),
        (TURNS, "Human: ", "a", "b", "empty_prompt", "'Human: '"),
        (TURNS, "", "a", "b", "empty_prompt", "''"),
        (TURNS, "Human: q\n\nAssistant: x", "a", "b", "wrong_form", "prompt ends with"),
    ],
)
def test_unusable_rows_are_refused_with_a_reason(
    form: Form, prompt: object, chosen: object, rejected: object, reason: str, detail: str
) -> None:
    with pytest.raises(RowError) as caught:
        canonical(form, prompt, (chosen, rejected))
    assert caught.value.args[0] == reason
    assert detail in caught.value.args[1]
    assert caught.value.args[1].isprintable()
    assert len(caught.value.args[1]) < 160


def test_identical_conversations_have_a_non_empty_response() -> None:
    body = [_user("q"), _answer("a")]
    record = canonical(SHARED, None, (body, body))
    assert record.responses[0] == record.responses[1] != "[]"
