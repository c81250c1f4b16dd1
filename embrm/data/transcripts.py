"""Transcripts: dialogues written as one string with "Human:" and "Assistant:" turns."""

import re

Message = tuple[str, str]
"""(role, content)."""

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def begins_transcript(text: str) -> bool:
    """Whether `text` begins with a human turn: a prompt may be no more than that."""
    return text.lstrip().startswith("Human:")


def is_dialogue(text: str) -> bool:
    """Whether `text` begins with a human turn and has an assistant turn."""
    return begins_transcript(text) and "\n\nAssistant:" in text


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Turns in order, contents stripped. `text` begins with a turn: see `begins_transcript`.

    A turn starts at the beginning or after a blank line. Neighbouring turns of one speaker are one
    message, because chat templates ask for alternation.
    """
    pieces = _TURN.split(text)[1:]
    messages: list[Message] = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1][0] == role:
            content = "\n\n".join(filter(None, (messages.pop()[1], content)))
        messages.append((role, content))
    return tuple(messages)
