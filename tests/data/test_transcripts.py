"""Tests of transcripts with Human and Assistant turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrm.data.transcripts import begins_transcript, is_dialogue, parse_transcript

U, A = "user", "assistant"


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("Human: hi", [(U, "hi")]),
        ("\n\nHuman: hi\n\nAssistant: yes", [(U, "hi"), (A, "yes")]),
        ("Human: hi\n\nAssistant:", [(U, "hi"), (A, "")]),
        ("Human: a\n\nb\n\nAssistant: c\nHuman: d", [(U, "a\n\nb"), (A, "c\nHuman: d")]),
        ("Human: a\n\nHuman: b\n\nAssistant: c", [(U, "a\n\nb"), (A, "c")]),
        ("Human: a\n\nAssistant: \n\nAssistant: c", [(U, "a"), (A, "c")]),
    ],
)
def test_transcripts_are_parsed_into_messages(text: str, messages: list[tuple[str, str]]) -> None:
    assert parse_transcript(text) == tuple(messages)


turn = st.text("ab \n", min_size=1).filter(str.strip)


@given(st.lists(turn, min_size=1, max_size=6))
def test_rendered_messages_are_parsed_back(contents: list[str]) -> None:
    text = "".join(
        f"\n\n{('Human', 'Assistant')[index % 2]}: {content}"
        for index, content in enumerate(contents)
    )
    wanted = [((U, A)[index % 2], content.strip()) for index, content in enumerate(contents)]
    assert parse_transcript(text) == tuple(wanted)
    assert begins_transcript(text)
    assert is_dialogue(text) == (len(contents) > 1)


@pytest.mark.parametrize(
    "text", ["", "hi", "He said\n\nHuman: hi\n\nAssistant: no", "Assistant: hi", "Humans: hi"]
)
def test_plain_text_is_no_transcript(text: str) -> None:
    assert not begins_transcript(text)
    assert not is_dialogue(text)
