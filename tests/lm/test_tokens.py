"""Tests of tokenization: BOS, EOS, prompt boundary, truncation, final position, refusals."""

import json

import numpy as np
import polars as pl
import pytest
from extract_models import BOS_CHAT, CHAT, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.lm.tokens import Encoded, TokenPolicy, encode, load_tokenizer, token_policy

PAD, BOS, EOS = 0, 1, 2
PLAIN = tokenizer(template=None)


def policy_of(fast, **options) -> TokenPolicy:
    return token_policy(
        fast, **({"template": "auto", "max_length": 64, "truncation": "drop"} | options)
    )


def rows(*triples: tuple[str, str, str]) -> pl.DataFrame:
    return pl.DataFrame(list(triples), schema=["kind", "prompt", "response"], orient="row")


def one(fast, prompt: str, response: str, kind: str = "text", **options) -> Encoded:
    [entry], drops = encode(rows((kind, prompt, response)), fast, policy_of(fast, **options))
    assert drops.is_empty()
    assert entry is not None
    return entry


def dropped(fast, prompt: str, response: str, **options) -> tuple[int, str, str]:
    [entry], drops = encode(rows(("text", prompt, response)), fast, policy_of(fast, **options))
    assert entry is None
    return drops.row(0)


def messages(*turns: tuple[str, str]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in turns])


def test_chat_is_rendered_by_the_template() -> None:
    fast = tokenizer()
    found = one(fast, "Who wrote this?", "A poor answer.")
    turns = json.loads(messages(("user", "Who wrote this?"), ("assistant", "A poor answer.")))
    assert found.ids.tolist() == fast.apply_chat_template(turns)["input_ids"]
    prompt = fast.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert found.ids[: found.n_prompt].tolist() == prompt
    assert fast.decode(found.ids[found.n_prompt :]) == "A poor answer.<|im_end|>\n"
    assert found.final_position == len(found.ids) - 1
    assert found.n_prompt + found.n_response == len(found.ids)


def test_a_text_row_equals_a_chat_row_with_one_turn_each() -> None:
    fast = tokenizer()
    text = one(fast, "Who?", "The river.")
    chat = one(fast, messages(("user", "Who?")), messages(("assistant", "The river.")), kind="chat")
    assert text.ids.tolist() == chat.ids.tolist()
    assert text.n_prompt == chat.n_prompt


def test_multi_turn_prompts_keep_every_turn() -> None:
    fast = tokenizer()
    prompt = messages(("user", "Who?"), ("assistant", "The river."), ("user", "The year?"))
    found = one(fast, prompt, messages(("assistant", "1 2 3")), kind="chat")
    assert fast.decode(found.ids[: found.n_prompt]).count("<|im_start|>") == 4


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", [None, CHAT, BOS_CHAT])
@pytest.mark.parametrize("prefix", ["", "<s>", "<s><s>"])
def test_bos_occurs_exactly_once_if_the_tokenizer_adds_it(
    bos: bool, side: str, template: str, prefix: str
) -> None:
    found = one(tokenizer(bos=bos, side=side, template=template), f"{prefix}Who?", "The year.")
    text_has_it = template is None and prefix != ""
    inside = 0 if template is None else prefix.count("<s>")
    expected = int(bos or template == BOS_CHAT or text_has_it)
    assert (found.ids == BOS).sum() == expected + inside
    if expected:
        assert found.ids[0] == BOS
        assert found.ids[1] != BOS


@pytest.mark.parametrize("suffix", ["", "</s>", "</s></s>"])
def test_eos_occurs_exactly_once_in_plain_text(suffix: str) -> None:
    found = one(PLAIN, "Who?", f" The year.{suffix}")
    assert found.ids[-1] == EOS
    assert (found.ids == EOS).sum() == 1
    assert found.final_position == len(found.ids) - 1


def test_chat_ends_as_its_template_ends() -> None:
    ended = CHAT.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}</s></s>")
    assert one(tokenizer(template=ended), "Who?", "The year.").ids[-2:].tolist() == [4, EOS]
    assert EOS not in one(tokenizer(), "Who?", "The year.").ids


def test_plain_text_is_prompt_and_response_joined() -> None:
    found = one(PLAIN, "Who?", " The year.")
    assert PLAIN.decode(found.ids) == "Who? The year.</s>"
    assert PLAIN.decode(found.ids[: found.n_prompt]) == "Who?"


def test_a_token_across_the_prompt_boundary_is_a_response_token() -> None:
    [merged] = PLAIN(" answer", add_special_tokens=False)["input_ids"]
    found = one(PLAIN, "A ans", "wer")
    assert merged not in PLAIN("A ans")["input_ids"]
    assert PLAIN.decode(found.ids[: found.n_prompt]) == "A"
    assert found.ids[found.n_prompt :].tolist() == [merged, EOS]


def test_final_position_is_the_rightmost_token_that_is_not_pad() -> None:
    found = one(PLAIN, "Who?", " The<pad> year", pad_token="<pad>")
    assert found.final_position == len(found.ids) - 1
    same = tokenizer(template=None, pad_token="</s>")
    found = one(same, "Who?", " The year", allow_pad_eos=True)
    assert found.final_position == len(found.ids) - 2
    assert found.ids[-1] == EOS
    assert found.final_token == found.ids[-2]


def test_a_response_of_pad_tokens_is_empty() -> None:
    same = tokenizer(template=None, pad_token="</s>")
    assert dropped(same, "Who?", "", allow_pad_eos=True)[1] == "empty_response"
    assert dropped(tokenizer(template="{{ '' }}"), "Who?", "x")[1] == "empty_response"


def test_over_long_rows_are_dropped_with_their_length() -> None:
    length = len(one(PLAIN, "Who?", " The year.").ids)
    assert one(PLAIN, "Who?", " The year.", max_length=length)
    row, reason, detail = dropped(PLAIN, "Who?", " The year.", max_length=length - 1)
    assert (row, reason) == (0, "over_long")
    assert detail == f"{length} tokens, max_length {length - 1}"


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.text("abc ?\n", min_size=1, max_size=40),
    response=st.text("xyz .", min_size=1, max_size=30),
    max_length=st.integers(2, 60),
    bos=st.booleans(),
)
def test_left_truncation_cuts_only_the_prompt(
    prompt: str, response: str, max_length: int, bos: bool
) -> None:
    fast = _BOTH[bos]
    whole = one(fast, prompt, response, max_length=10_000)
    options = {"max_length": max_length, "truncation": "left"}
    [cut], drops = encode(rows(("text", prompt, response)), fast, policy_of(fast, **options))
    if cut is None:
        needed = whole.n_response + bos + 1
        assert drops["reason"].to_list() == ["over_long"]
        assert needed > max_length or whole.n_prompt <= bos
        return
    assert len(cut.ids) == min(len(whole.ids), max_length)
    assert cut.truncated == (len(whole.ids) > max_length)
    assert cut.ids[cut.n_prompt :].tolist() == whole.ids[whole.n_prompt :].tolist()
    assert cut.final_token == whole.final_token
    assert (cut.ids[: int(bos)] == BOS).all()
    assert cut.ids[int(bos) :].tolist() == whole.ids[len(whole.ids) - len(cut.ids) + bos :].tolist()


_BOTH = {bos: tokenizer(bos=bos, template=None) for bos in (False, True)}


def test_rows_keep_their_order_across_chunks_and_drops() -> None:
    table = rows(*[("text", f"Who {i % 7}?", " 1" * (i % 40 + 1)) for i in range(2500)])
    encoded, drops = encode(table, PLAIN, policy_of(PLAIN, max_length=40))
    assert len(encoded) == 2500
    assert drops["response"].to_list() == [i for i, entry in enumerate(encoded) if entry is None]
    assert drops.height > 0
    for i in (0, 1023, 1024, 2047, 2048, 2496):
        entry = encoded[i]
        assert entry is not None
        assert PLAIN.decode(entry.ids) == f"Who {i % 7}?" + " 1" * (i % 40 + 1) + "</s>"
        assert entry.ids.dtype == np.int32


def test_a_row_that_the_template_refuses_is_dropped_with_its_message() -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    fast = tokenizer(template=strict + CHAT)
    bad = ("chat", messages(("assistant", "Hello")), messages(("assistant", "Who?")))
    good = ("text", "Who?", "The year.")
    encoded, drops = encode(rows(good, bad, good), fast, policy_of(fast))
    assert [entry is None for entry in encoded] == [False, True, False]
    [(row, reason, detail)] = drops.rows()
    assert (row, reason) == (1, "wrong_form")
    assert "user first" in detail
    assert encoded[0].ids.tolist() == encoded[2].ids.tolist()


def test_conversations_need_a_template() -> None:
    chat = rows(("chat", messages(("user", "Who?")), messages(("assistant", "1"))))
    with pytest.raises(UserError, match="conversations"):
        encode(chat, PLAIN, policy_of(PLAIN))
    with pytest.raises(UserError, match="conversations"):
        encode(chat, tokenizer(), policy_of(tokenizer(), template="plain"))
    with pytest.raises(UserError, match="no chat template"):
        policy_of(PLAIN, template="chat")


def test_pad_token_refusals_and_remedies() -> None:
    none = tokenizer(pad_token=None)
    with pytest.raises(UserError, match="--pad-token"):
        policy_of(none)
    assert policy_of(none, pad_token="<pad>").pad == PAD
    with pytest.raises(UserError, match="not in the tokenizer's vocabulary"):
        policy_of(none, pad_token="<pat>")
    same = tokenizer(pad_token="</s>")
    with pytest.raises(UserError, match="--allow-pad-eos"):
        policy_of(same)
    with pytest.raises(UserError, match="--allow-pad-eos"):
        policy_of(none, pad_token="</s>")
    assert policy_of(same, allow_pad_eos=True).pad == EOS


def test_a_folder_without_tokenizer_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
