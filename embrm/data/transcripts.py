"""Transcripts: parses dialogues written as one string with "Human:" and "Assistant:" turns."""

import re

Message = tuple[str, str]
"""(role, content)."""

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def begins_transcript(text: str) -> bool:
    """Whether `text` begins with a human turn, as every transcript (even a mere prompt) does."""
    return text.lstrip().startswith("Human:")


def is_dialogue(text: str) -> bool:
    """Whether `text` begins with a human turn and also has an assistant turn."""
    return begins_transcript(text) and "\n\nAssistant:" in text


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Parse the turns of a transcript, in order and with stripped contents.

    A turn starts at the beginning of the text or after a blank line. Consecutive turns of the same
    speaker are joined, because chat templates require alternating roles.
    """
    pieces = _TURN.split(text)[1:]
    messages: list[Message] = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1][0] == role:
            content = "\n\n".join(filter(None, (messages.pop()[1], content)))
        messages.append((role, content))
    return tuple(messages)
