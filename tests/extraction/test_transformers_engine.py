"""Tests of the transformers engine: parity with a plain forward pass, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_lm import dense_tail_mean
from extract_models import CONFIGS, VOCABULARY
from transformers import AutoModelForCausalLM

from embrm.cache.tensors import to_tensor
from embrm.core.errors import UserError
from embrm.extraction.engine import Request
from embrm.extraction.positions import token_positions
from embrm.extraction.reading import read, read_shards
from embrm.extraction.statistics import response_statistics
from embrm.extraction.transformers_engine import TransformersEngine, load_engine
from embrm.lm.head import LmHead

VIEWS = ("last", "mean", "prenorm", "layer:0", "layer:2")
LENGTHS = [(3, 2), (1, 1), (5, 40), (0, 7), (60, 3), (17, 17), (2, 90)]
"""Numbers of (prompt, response) tokens, one without a prompt."""


def requests_of(k: int = 4) -> list[Request]:
    random = np.random.default_rng(0)
    made = []
    for number, (prompt, response) in enumerate(LENGTHS):
        length = prompt + response
        ids = random.integers(3, VOCABULARY, length).astype(np.int32)
        positions = token_positions(str(number), prompt, length, k, 0)
        made.append(Request(ids, prompt, length - 1 - (number == 2), positions))
    return made


def plain_forward(folder: Path, kind: str, request: Request) -> dict:
    """One sequence through transformers alone: full logits, log_softmax, hidden states."""
    # Gemma-2 defines capped attention scores, which only eager attention computes.
    eager = {"attn_implementation": "eager"} if kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()
    norm = model.base_model.ln_f if kind == "gpt2" else model.base_model.norm
    entered = []
    norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    ids = torch.from_numpy(request.ids.astype(np.int64))[None]
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    logits = output.logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    first = max(request.n_prompt, 1)
    final = request.final_position
    post = output.hidden_states[-1][0]
    return {
        "last": post[final],
        "mean": post[request.n_prompt :].mean(0),
        "prenorm": entered[0][0, final],
        "layer:0": output.hidden_states[0][0, final],
        "layer:2": output.hidden_states[2][0, final],
        "S": sum(float(logprobs[t - 1, request.ids[t]]) for t in range(first, ids.shape[1])),
        "post": post,
        "logits": logits,
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_states_s_and_token_rows_equal_a_plain_forward(
    model_folders: dict[str, Path], kind: str
) -> None:
    engine = load_engine(
        model_folders[kind], dtype="float32", device="cpu", views=VIEWS, top_k=5, tail_mean=True
    )
    requests = requests_of()
    together = read(engine, requests, 100_000)
    alone = read(engine, requests, 1)
    row = 0
    for i, request in enumerate(requests):
        expected = plain_forward(model_folders[kind], kind, request)
        for batch in (together, alone):
            assert batch.S[i] == pytest.approx(expected["S"], rel=1e-4)
            for view in VIEWS:
                _near(batch.states[view][i], expected[view])
                assert float(batch.norms[view][i]) == pytest.approx(
                    float(expected[view].norm()), rel=1e-4
                )
        for position in request.positions:
            logits = expected["logits"][position]
            target = int(request.ids[position + 1])
            for batch in (together, alone):
                tokens = batch.tokens.map(to_tensor)
                assert int(tokens.target[row]) == target
                _near(tokens.state[row], expected["post"][position])
                _near(tokens.target_logit[row], logits[target], scale=logits)
                _near(tokens.logsumexp[row], logits.logsumexp(0))
                _near(tokens.top_logits[row], logits.topk(5).values)
                _near(logits[tokens.top_ids[row].long()], logits.topk(5).values)
                top_ids = tokens.top_ids[row]
                tail = dense_tail_mean(engine.head, expected["post"][position], target, top_ids)
                _near(tokens.tail_mean[row], tail)
            row += 1
    assert row == len(together.tokens.target) > 0


def _near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    limit = 1e-4 * (expected if scale is None else scale).abs().max()
    assert (found - expected).abs().max() <= limit


def test_soft_caps_of_gemma2_change_the_results(model_folders: dict[str, Path]) -> None:
    """Without them the same weights give other numbers, so the parity above does test them."""
    engine = load_engine(model_folders["gemma2"], dtype="float32", device="cpu", top_k=1)
    assert engine.environment["attention"] == "eager"
    assert engine.head.softcap == 0.5
    states = torch.randn(3, 32)
    capped = engine.head.logits(states)
    assert capped.abs().max() <= 0.5
    free = LmHead(engine.head.weight).logits(states)
    assert (capped - free).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "gemma2"])
def test_half_precision_is_close_to_float32(
    model_folders: dict[str, Path], kind: str, dtype: str
) -> None:
    views = ("last", "mean")
    half = load_engine(model_folders[kind], dtype=dtype, device="cpu", views=views, top_k=3)
    full = load_engine(model_folders[kind], dtype="float32", device="cpu", views=views, top_k=3)
    low, high = read(half, requests_of(), 512), read(full, requests_of(), 512)
    for view in views:
        assert str(low.states[view].dtype) == f"torch.{dtype}"
        assert low.norms[view].dtype == torch.float32
        error = (low.states[view].float() - high.states[view]).norm()
        assert 0 < error < 0.1 * high.states[view].norm()
    assert np.allclose(low.S, high.S, rtol=0.05, atol=0.5)


def test_the_next_shard_begins_before_an_answer_is_yielded(
    model_folders: dict[str, Path],
) -> None:
    """Only its first batch is begun: the device stays busy, and memory is bounded."""
    engine = load_engine(model_folders["gpt2"], dtype="float32", device="cpu")
    begun: list[int] = []
    begin = engine._begin
    engine._begin = lambda some: (begun.append(len(some)), begin(some))[1]  # type: ignore[method-assign]
    first, second = requests_of(), requests_of()[:3]
    answers = read_shards(engine, [first, second], 1)
    next(answers)
    assert begun == [1] * (len(first) + 1)
    next(answers)
    assert begun == [1] * (len(first) + 3)


def test_views_that_the_model_lacks_are_refused(model_folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="layer:3"):
        load_engine(model_folders["gpt2"], dtype="float32", device="cpu", views=("layer:3",))


def test_logits_that_the_head_cannot_reproduce_are_refused(
    model_folders: dict[str, Path],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama-tied"]).eval()
    model.lm_head.register_forward_hook(lambda *call: call[-1] * 1.01)
    with pytest.raises(UserError, match="computes its logits in a way that embrm does not support"):
        TransformersEngine(model, ("last",), 0)


def test_a_model_without_a_base_is_refused(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama-tied"]).eval()
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing")
    with pytest.raises(UserError, match="has no base model, whose output embrm caches"):
        TransformersEngine(model, ("last",), 0)


def test_out_of_memory_suggests_a_smaller_batch(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(model_folders["gpt2"], dtype="float32", device="cpu")

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("embrm.extraction.transformers_engine.response_statistics", full)
    with pytest.raises(
        UserError, match=r"out of memory on cpu .*: lower batch_tokens \(--batch-tokens\)"
    ):
        next(engine.forward([requests_of()]))


def test_an_answer_is_yielded_before_the_next_batch_fails(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_engine(model_folders["gpt2"], dtype="float32", device="cpu")
    whole = read(engine, requests_of(), 512).S

    def full(head: LmHead, states: torch.Tensor, *more: Any, **options: Any) -> Any:
        if len(states) == LENGTHS[2][1]:
            raise torch.OutOfMemoryError
        return response_statistics(head, states, *more, **options)

    monkeypatch.setattr("embrm.extraction.transformers_engine.response_statistics", full)
    answers = read_shards(engine, [requests_of()[:2], requests_of()[2:]], 1)
    _, first = next(answers)
    assert np.allclose(first.S, whole[:2])
    with pytest.raises(UserError, match="out of memory"):
        next(answers)


def test_weights_with_nan_are_refused(model_folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama-tied"]).eval()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(UserError, match="logits that are NaN"):
        TransformersEngine(model, ("last",), 0)


def test_a_model_that_is_not_causal_is_refused(model_folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama-tied"]).eval()
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="is not causal"):
        TransformersEngine(model, ("last",), 0)


def test_a_model_without_final_norm_has_no_prenorm(model_folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama-tied"]).eval()
    model.model.norm = torch.nn.Identity()
    with pytest.raises(UserError, match="'prenorm' is not in this model"):
        TransformersEngine(model, ("prenorm",), 0)
