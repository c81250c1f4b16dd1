"""Converts texts to token ids: template, BOS and EOS, truncation, and the pooled position.

The rules, in the order they apply:

- **Template.** "chat" renders the messages with the tokenizer's chat template, a plain-text row
  becoming one user and one assistant message. "plain" joins prompt and response as they are,
  without a separator (as TRL does). "auto" takes chat when the tokenizer has a template.
- **BOS.** If the tokenizer itself begins text with BOS, there is exactly one. A BOS that the
  template writes is kept, and a doubled one reduced to one.
- **EOS.** Plain text ends with exactly one EOS when the tokenizer has an EOS token. Rendered chat
  ends as its template ends it (a model served through that template sees nothing else), with a
  doubled EOS reduced to one.
- **Prompt and response.** The prompt is the longest common token prefix of the whole text and of
  the prompt alone (with the template's generation prompt); every later token, including what the
  template appends after the answer, is a response token.
- **Truncation.** A text longer than `max_length` is dropped, or loses tokens from the left of its
  prompt. BOS and the response stay whole; if no prompt token would remain, the text is dropped.
- **Final position.** The rightmost token that is not the pad token: the rule of transformers'
  `AutoModelForSequenceClassification`, so an exported reward model reads the same position.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from embrm.core.errors import UserError, nearest
from embrm.core.progress import progress

Ids = npt.NDArray[np.int32]

_CHUNK = 1024
"""Texts tokenized per call: enough for the parallel tokenizer, in little memory."""


@dataclass(frozen=True)
class Encoded:
    """One response with its prompt as token ids.

    ids: int32 [length], prompt then response. n_prompt: how many of them are the prompt.
    final_position: index of the pooled token. truncated: whether the prompt was cut.
    """

    ids: Ids
    n_prompt: int
    final_position: int
    truncated: bool

    @property
    def n_response(self) -> int:
        """Number of response tokens, including what the template appends after the answer."""
        return len(self.ids) - self.n_prompt

    @property
    def final_token(self) -> int:
        """Id of the pooled token."""
        return int(self.ids[self.final_position])


@dataclass(frozen=True)
class TokenPolicy:
    """All settings that determine how texts become token ids. bos, eos and pad are token ids."""

    template: Literal["chat", "plain"]
    chat_template: str | None
    bos: int | None
    add_bos: bool
    eos: int | None
    pad: int
    max_length: int
    truncation: Literal["drop", "left"]


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model folder.

    Raises: UserError when there is none, or none that transformers can read.
    """
    options = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # transformers has many errors for a broken tokenizer
        raise UserError(
            f"model {folder}: its tokenizer cannot be loaded ({reason_of(error)}): "
            "save the tokenizer into the model folder with tokenizer.save_pretrained"
        ) from None


def token_policy(
    tokenizer: Any,
    *,
    template: Literal["auto", "chat", "plain"],
    max_length: int,
    truncation: Literal["drop", "left"],
    pad_token: str | None = None,
    allow_pad_eos: bool = False,
) -> TokenPolicy:
    """The policy for a tokenizer; the arguments are fields of `ExtractSpec`.

    Raises: UserError for a chat template or pad token that is missing, a pad token that is not in
    the vocabulary, and a pad token equal to EOS unless `allow_pad_eos`.
    """
    chat_template = _chat_template(tokenizer)
    if template == "chat" and chat_template is None:
        raise UserError(
            "template = 'chat': this tokenizer has no chat template: use template = 'plain'"
        )
    if template == "auto":
        template = "plain" if chat_template is None else "chat"
    eos = tokenizer.eos_token_id
    return TokenPolicy(
        template=template,
        chat_template=chat_template if template == "chat" else None,
        bos=tokenizer.bos_token_id,
        add_bos=_begins_with_bos(tokenizer),
        eos=eos,
        pad=_pad_id(tokenizer, pad_token, eos, allow_pad_eos),
        max_length=max_length,
        truncation=truncation,
    )


def _chat_template(tokenizer: Any) -> str | None:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return template


def _begins_with_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x")["input_ids"][:1] == [bos]


def _pad_id(tokenizer: Any, pad_token: str | None, eos: int | None, allow_pad_eos: bool) -> int:
    pad: int | None = tokenizer.pad_token_id
    if pad_token is not None:
        vocabulary = tokenizer.get_vocab()
        if pad_token not in vocabulary:
            raise UserError(
                f"pad_token = {pad_token!r} is not in the tokenizer's vocabulary: "
                f"{nearest(pad_token, tokenizer.all_special_tokens or ['<unk>'])}"
            )
        pad = vocabulary[pad_token]
    if pad is None:
        raise UserError(
            "the tokenizer has no pad token, so the final position of an exported reward model "
            "would be undefined: name an unused vocabulary token with pad_token (--pad-token)"
        )
    if pad == eos and not allow_pad_eos:
        raise UserError(
            f"pad token = EOS token (id {pad}): the final position would be before the EOS; "
            "name another token with pad_token (--pad-token), or accept it with allow_pad_eos "
            "(--allow-pad-eos)"
        )
    return pad


def encode(
    responses: pl.DataFrame, tokenizer: Any, policy: TokenPolicy
) -> tuple[list[Encoded | None], pl.DataFrame]:
    """Tokenize every response of a dataset.

    responses: columns kind, prompt and response (see embrm.data.dataset). Returns one entry per
    row, None where the row is dropped, and the table of dropped rows with the columns response
    (int32 row index), reason (over_long, empty_response or wrong_form) and detail.

    Raises: UserError for conversations when the policy is plain text.
    """
    if policy.template == "plain" and (responses["kind"] == "chat").any():
        raise UserError(
            "the data has conversations, but texts are plain (the tokenizer has no chat template, "
            "or template = 'plain'): use a model with a chat template, or plain-text data"
        )
    encoded: list[Encoded | None] = []
    drops: list[tuple[int, str, str]] = []
    prompts: dict[tuple[str, str], Ids | str] = {}
    with progress("tokenize", responses.height, "responses") as bar:
        for chunk in responses.iter_slices(_CHUNK):
            _add_prompts(prompts, chunk, tokenizer, policy)
            whole = _rendered(chunk, tokenizer, policy)
            ids = iter(_ids([text for text, error in whole if not error], tokenizer))
            for key, (_, error) in zip(_prompt_keys(chunk), whole, strict=True):
                prompt = prompts[key]
                outcome: Encoded | tuple[str, str]
                if error:
                    outcome = "wrong_form", error
                elif isinstance(prompt, str):
                    next(ids)
                    outcome = "wrong_form", prompt
                else:
                    outcome = _assemble(prompt, next(ids), policy)
                if isinstance(outcome, Encoded):
                    encoded.append(outcome)
                else:
                    drops.append((len(encoded), *outcome))
                    encoded.append(None)
            bar.advance(chunk.height)
    schema = {"response": pl.Int32, "reason": pl.String, "detail": pl.String}
    return encoded, pl.DataFrame(drops, schema=schema, orient="row")


def _prompt_keys(chunk: pl.DataFrame) -> list[tuple[str, str]]:
    return list(zip(chunk["kind"], chunk["prompt"], strict=True))


def _add_prompts(
    prompts: dict[tuple[str, str], Ids | str],
    chunk: pl.DataFrame,
    tokenizer: Any,
    policy: TokenPolicy,
) -> None:
    """Tokenize new prompts; if the template refuses one, keep its error message instead of ids."""
    new = [key for key in dict.fromkeys(_prompt_keys(chunk)) if key not in prompts]
    texts = []
    for key in new:
        text, error = _render(tokenizer, policy, *key, response=None)
        texts.append("" if error else text)
        prompts[key] = error
    for key, ids in zip(new, _ids(texts, tokenizer), strict=True):
        if not prompts[key]:
            prompts[key] = ids


def _rendered(chunk: pl.DataFrame, tokenizer: Any, policy: TokenPolicy) -> list[tuple[str, str]]:
    columns = (chunk["kind"], chunk["prompt"], chunk["response"])
    return [
        _render(tokenizer, policy, kind, prompt, response)
        for kind, prompt, response in zip(*columns, strict=True)
    ]


def _render(
    tokenizer: Any, policy: TokenPolicy, kind: str, prompt: str, response: str | None
) -> tuple[str, str]:
    """Render a response, or its prompt alone; returns the text and the template's error, or ""."""
    if policy.template == "plain":
        return prompt + (response or ""), ""
    messages = _messages(kind, prompt, "user")
    if response is not None:
        messages = messages + _messages(kind, response, "assistant")
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=response is None
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        return "", f"chat template: {reason_of(error)}"
    return text, ""


def _messages(kind: str, content: str, role: str) -> list[dict[str, str]]:
    if kind == "text":
        return [{"role": role, "content": content}]
    messages: list[dict[str, str]] = json.loads(content)
    return messages


def _ids(texts: Sequence[str], tokenizer: Any) -> list[Ids]:
    if not texts:
        return []
    rows: Iterable[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return [np.array(row, dtype=np.int32) for row in rows]


def _assemble(prompt: Ids, whole: Ids, policy: TokenPolicy) -> Encoded | tuple[str, str]:
    """Apply BOS, EOS and truncation to raw ids; or return (reason, detail) of a dropped row."""
    prompt, whole = _with_bos(prompt, policy), _with_eos(_with_bos(whole, policy), policy)
    n_prompt = _common_prefix(prompt, whole)
    kept = np.flatnonzero(whole != policy.pad)
    if n_prompt == len(whole) or kept.size == 0 or kept[-1] < n_prompt:
        return "empty_response", "no response token"
    encoded = Encoded(whole, n_prompt, int(kept[-1]), truncated=False)
    excess = len(whole) - policy.max_length
    if excess <= 0:
        return encoded
    over_long = "over_long", f"{len(whole)} tokens, max_length {policy.max_length}"
    if policy.truncation == "drop":
        return over_long
    head = int(policy.bos is not None and whole[0] == policy.bos)
    if n_prompt - excess < head + 1:
        return over_long
    return replace(
        encoded,
        ids=np.concatenate([whole[:head], whole[head + excess :]]),
        n_prompt=n_prompt - excess,
        final_position=encoded.final_position - excess,
        truncated=True,
    )


def _with_bos(ids: Ids, policy: TokenPolicy) -> Ids:
    if policy.bos is None:
        return ids
    present = 0
    while present < len(ids) and ids[present] == policy.bos:
        present += 1
    wanted = max(int(policy.add_bos), min(present, 1))
    return np.concatenate([np.full(wanted, policy.bos, dtype=np.int32), ids[present:]])


def _with_eos(ids: Ids, policy: TokenPolicy) -> Ids:
    if policy.eos is None:
        return ids
    present = 0
    while present < len(ids) and ids[len(ids) - 1 - present] == policy.eos:
        present += 1
    wanted = max(int(policy.template == "plain"), min(present, 1))
    body = ids[: len(ids) - present]
    return np.concatenate([body, np.full(wanted, policy.eos, dtype=np.int32)])


def _common_prefix(left: Ids, right: Ids) -> int:
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if differs.size else length


def reason_of(error: Exception) -> str:
    """The first line of a library's error message, shortened, for use in a one-line message."""
    lines = str(error).strip().splitlines()
    return repr(lines[0][:100]) if lines else type(error).__name__
