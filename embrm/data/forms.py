"""Forms: detects how a dataset is laid out, and converts its rows to canonical prompts/responses.

The columns determine one of three shapes: pairs (chosen, rejected), groups (prompt, response, gold)
and best_of_n (best, losers). The texts are in one of three formats:

- text: strings. The prompt is explicit (a column of its own), repeated (a column, and every
  completion begins with it too) or implicit (the beginning that the completions share);
- chat: lists of {"role", "content"} messages, with the same three kinds of prompt;
- transcript: strings with "Human:" and "Assistant:" turns, which are converted to chat.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embrm.core.errors import UserError
from embrm.core.text import listed, quoted
from embrm.data.sources import FIELDS, SourceTable
from embrm.data.transcripts import Message, begins_transcript, is_dialogue, parse_transcript

Messages = tuple[Message, ...]

_MAJORITY = 0.9
"""A dataset has a form when at least this share of its rows fit it; rows that do not are excluded.

The decision is made once for the whole dataset, so that a single plain text that happens to look
like a transcript is not parsed as one."""

_ROLES = ("system", "developer", "user", "assistant", "tool")


class RowError(Exception):
    """Raised for a row that cannot be used. Arguments: reason (such as "empty_prompt"), detail."""


@dataclass(frozen=True)
class Form:
    """The detected layout of a source; it is recorded in `Dataset.rules`."""

    shape: str
    """ "pairs", "groups" or "best_of_n"."""
    format: str
    """ "text", "chat" or "transcript"."""
    prompt: str
    """ "explicit", "implicit" or "repeated"."""
    whole: bool
    """For transcripts: whether each completion contains the whole dialogue, prompt included."""


@dataclass(frozen=True)
class Record:
    """One row in canonical form: strings for kind "text", JSON message lists for kind "chat"."""

    kind: str
    prompt: str
    responses: tuple[str, ...]
    """chosen and rejected (pairs), the one response (groups), or best and losers (best_of_n)."""
    lengths: tuple[int, ...]
    """Characters in each response; for chat, in the contents of its messages only."""

    def pick(self, *positions: int) -> "Record":
        """A record with the same prompt and only the responses at `positions`."""
        return replace(
            self,
            responses=tuple(self.responses[position] for position in positions),
            lengths=tuple(self.lengths[position] for position in positions),
        )


def detect(table: SourceTable) -> Form:
    """Detect the form of a source. Raises: UserError when its columns fit none of the shapes."""
    shape = _shape(table)
    columns = table.columns
    samples = _completion_columns(table, shape)
    flat = [text for cells in samples for text in cells if isinstance(text, str) and text.strip()]
    prompts = columns.get("prompt")
    whole = _mostly(map(is_dialogue, flat))
    if whole or _mostly(
        begins_transcript(text) for text in prompts or () if isinstance(text, str) and text.strip()
    ):
        format = "transcript"
    else:
        lists = (isinstance(cell, list) for cells in samples for cell in cells if cell is not None)
        format = "chat" if _mostly(lists, share=0.5) else "text"
    form = Form(shape, format, "implicit" if prompts is None else "explicit", whole)
    if prompts is None:
        return form
    rows = zip(prompts, *samples, strict=True)
    fits = (
        all(_repeats(form, prompt, completion) for completion in completions)
        for prompt, *completions in rows
        if prompt and all(completions)
    )
    return replace(form, prompt="repeated") if _mostly(fits) else form


def canonical(form: Form, prompt: object, completions: Sequence[object]) -> Record:
    """Convert one row of a source with this form.

    Raises: RowError with reason missing_value, empty_prompt, empty_response or wrong_form.
    """
    if form.prompt != "implicit" and prompt is None:
        raise RowError("missing_value", "prompt is null")
    if any(completion is None for completion in completions):
        raise RowError("missing_value", "a response is null")
    record = _text_record(form, prompt, completions) if form.format == "text" else None
    record = record or _chat_record(form, prompt, completions)
    try:
        "".join((record.prompt, *record.responses)).encode()
    except UnicodeEncodeError:
        raise RowError("wrong_form", "text with half a surrogate pair is not Unicode") from None
    return record


def _shape(table: SourceTable) -> str:
    fields = table.columns
    for shape, needed in (
        ("pairs", ("chosen", "rejected")),
        ("best_of_n", ("best", "losers")),
        ("groups", ("prompt", "response", "gold")),
    ):
        if all(field in fields for field in needed):
            return shape
        present = [field for field in needed if field in fields and field != "prompt"]
        if present:
            missing = [field for field in needed if field not in fields]
            raise UserError(
                f"{table.name}: has {' and '.join(present)} but no column {missing[0]!r}: "
                f"found {listed(table.found)}; {_remedy(table, missing)}"
            )
    raise UserError(
        f"{table.name}: no columns of pairs (chosen, rejected), groups (prompt, response, gold) "
        f"or best_of_n (best, losers): found {listed(table.found)}; "
        f"{_remedy(table, ['chosen', 'rejected'])}"
    )


def _remedy(table: SourceTable, fields: Sequence[str]) -> str:
    """How a spec says which columns hold `fields`; with its name where only one can be meant."""
    others = [name for name in table.found if not any(name in known for known in FIELDS.values())]
    column = others[0] if len(others) == len(fields) == 1 else "COLUMN"
    mapped = ", ".join(f"{field} = {json.dumps(column)}" for field in fields)
    return f"in a spec: [[data]] {table.place}, columns = {{ {mapped} }}"


def _completion_columns(table: SourceTable, shape: str) -> list[list[Any]]:
    """The columns of completions, one entry per row; of several losers, only the first."""
    columns = table.columns
    if shape == "pairs":
        return [columns["chosen"], columns["rejected"]]
    if shape == "groups":
        return [columns["response"]]
    losers = [cell[0] if isinstance(cell, list) and cell else None for cell in columns["losers"]]
    return [columns["best"], losers]


def _repeats(form: Form, prompt: object, completion: object) -> bool:
    """Whether a completion contains its prompt.

    A text contains it if it begins with the prompt, and a list of messages if its first message is
    not the assistant's; for a transcript, `form.whole` decides.
    """
    if isinstance(completion, list):
        first = completion[0]
        return isinstance(first, dict) and first.get("role") != "assistant"
    if form.format == "text":
        return isinstance(completion, str) and completion.startswith(str(prompt))
    return form.whole


def _mostly(fits: Iterable[bool], share: float = _MAJORITY) -> bool:
    answers = list(fits)
    return bool(answers) and sum(answers) >= share * len(answers)


# Rows of plain text


def _text_record(form: Form, prompt: object, completions: Sequence[object]) -> Record | None:
    """Convert a row of strings; None for a row that has message lists after all."""
    if any(isinstance(value, list) for value in (prompt, *completions)):
        return None
    texts = [_string(completion, "a response") for completion in completions]
    implicit = form.prompt == "implicit"
    head = _shared_text(texts) if implicit else _string(prompt, "prompt")
    if not head.strip():
        detail = "the responses share no beginning" if implicit else quoted(head)
        raise RowError("empty_prompt", detail)
    if form.prompt != "explicit":
        if not all(text.startswith(head) for text in texts):
            raise RowError("wrong_form", f"a response does not begin with {quoted(head)}")
        texts = [text[len(head) :] for text in texts]
    _refuse_blank(texts)
    return Record("text", head, tuple(texts), tuple(map(len, texts)))


def _shared_text(texts: Sequence[str]) -> str:
    """The longest common beginning of all texts that ends in whitespace, so no word is split."""
    # A prefix of both the lexicographically first and last text is a prefix of all of them.
    first, last = min(texts), max(texts)
    space = 0
    for length, (one, other) in enumerate(zip(first, last, strict=False), start=1):
        if one != other:
            break
        if one.isspace():
            space = length
    return first[:space]


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_form", f"{name} is {quoted(value)}, not text or messages")
    return value


def _refuse_blank(texts: Iterable[str]) -> None:
    for text in texts:
        if not text.strip():
            raise RowError("empty_response", quoted(text))


# Rows of messages and transcripts


def _chat_record(form: Form, prompt: object, completions: Sequence[object]) -> Record:
    """Convert a row of message lists or transcripts; a string may stand for a single turn."""
    bodies = [_completion_messages(form, completion) for completion in completions]
    if any(not body for body in bodies):
        raise RowError("empty_response", "no message")
    heads = {body[0][0] == "assistant" for body in bodies}
    if len(heads) > 1:
        raise RowError("wrong_form", "only some responses begin with an assistant message")
    begins_with_answer = heads.pop()
    if form.prompt == "implicit" or (isinstance(prompt, str) and not begins_with_answer):
        head = _shared_messages(bodies)
        if form.prompt != "implicit":
            _refuse_other_prompt(form, prompt, head)
    else:
        head = _prompt_messages(form, prompt)
    if not any(content.strip() for role, content in head if role != "system"):
        detail = "the responses share no beginning" if form.prompt == "implicit" else quoted(prompt)
        raise RowError("empty_prompt", detail)
    if head[-1][0] == "assistant":
        raise RowError("wrong_form", "the prompt ends with an assistant message")
    if not begins_with_answer:
        if not all(body[: len(head)] == head for body in bodies):
            raise RowError("wrong_form", "a response begins with other messages than the prompt")
        bodies = [body[len(head) :] for body in bodies]
    for body in bodies:
        if not body:
            raise RowError("empty_response", "no message after the prompt")
        if body[-1][0] != "assistant":
            raise RowError("wrong_form", f"a response ends with a {body[-1][0]} message")
        _refuse_blank([body[-1][1]])
    lengths = tuple(sum(len(content) for _, content in body) for body in bodies)
    return Record("chat", _as_json(head), tuple(map(_as_json, bodies)), lengths)


def _prompt_messages(form: Form, prompt: object) -> Messages:
    if isinstance(prompt, list):
        return _messages(prompt, "prompt")
    text = _string(prompt, "prompt")
    if form.format == "transcript" and begins_transcript(text):
        return _prompt_transcript(text)
    if form.format == "transcript" and not form.whole and text.strip():
        raise RowError("wrong_form", f'prompt {quoted(text)} does not begin with "Human:"')
    return (("user", text),)


def _prompt_transcript(text: str) -> Messages:
    """Messages of a prompt transcript, without the trailing "Assistant:" that it may end with."""
    messages = parse_transcript(text)
    return messages[:-1] if messages[-1] == ("assistant", "") else messages


def _completion_messages(form: Form, completion: object) -> Messages:
    if isinstance(completion, list):
        return _messages(completion, "a response")
    text = _string(completion, "a response")
    if form.whole:
        if text.strip() and not begins_transcript(text):
            raise RowError("wrong_form", f'response {quoted(text)} does not begin with "Human:"')
        return parse_transcript(text)
    return (("assistant", text.strip() if form.format == "transcript" else text),)


def _messages(value: list[Any], name: str) -> Messages:
    messages = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in _ROLES or not isinstance(content, str):
            raise RowError(
                "wrong_form", f'{name} has {quoted(message)}, not {{"role": ..., "content": text}}'
            )
        messages.append((role, content))
    return tuple(messages)


def _shared_messages(bodies: Sequence[Messages]) -> Messages:
    """The longest common beginning of all bodies after which each continues with the assistant.

    For identical bodies, that is everything before the last assistant message.
    """
    shared = 0
    while all(len(body) > shared and body[shared] == bodies[0][shared] for body in bodies):
        shared += 1
    while shared and not all(
        len(body) > shared and body[shared][0] == "assistant" for body in bodies
    ):
        shared -= 1
    return bodies[0][:shared]


def _refuse_other_prompt(form: Form, prompt: object, head: Messages) -> None:
    """Refuse a prompt that is not in `head`, the shared beginning of the whole conversations."""
    text = _string(prompt, "prompt")
    if form.format == "transcript" and begins_transcript(text):
        asked = _prompt_transcript(text)
        if head[: len(asked)] != asked:
            raise RowError("wrong_form", f"a response does not begin with prompt {quoted(text)}")
    elif not any(role == "user" and content.strip() == text.strip() for role, content in head):
        raise RowError("wrong_form", f"no user message of the responses is prompt {quoted(text)}")


def _as_json(messages: Messages) -> str:
    return json.dumps(
        [{"role": role, "content": content} for role, content in messages],
        ensure_ascii=False,
        separators=(",", ":"),
    )
