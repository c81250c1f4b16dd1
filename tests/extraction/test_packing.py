"""Tests of packing: a shared prompt is read once and changes no state; unsupported models."""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extract_models import CONFIGS, SIZES, VOCABULARY, save_model, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_texts import SHARED, VIEWS, texts
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.mistral.modeling_mistral import MistralAttention

from embrm.extraction import packing
from embrm.extraction.engine import Request
from embrm.extraction.packing import batches, pack_texts
from embrm.extraction.reading import read
from embrm.extraction.transformers_engine import TransformersEngine, load_engine


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_shared_prompt_changes_no_state(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path, kind, tokenizer())
    engine = load_engine(tmp_path, dtype="float32", device="cpu", views=VIEWS, top_k=3)
    assert engine.environment["batches"] == "packed"
    together = read(engine, SHARED, 10_000)
    alone = [read(engine, [request], 10_000) for request in SHARED]
    for view in VIEWS:
        expected = torch.cat([one.states[view] for one in alone])
        assert (together.states[view] - expected).abs().max() <= 1e-5 * expected.abs().max()
    S = np.concatenate([one.S for one in alone])
    assert np.allclose(together.S, S, rtol=1e-5)
    rows = np.concatenate([one.tokens.state for one in alone])
    assert np.abs(together.tokens.state - rows).max() <= 1e-5 * np.abs(rows).max()
    targets = np.concatenate([one.tokens.target for one in alone])
    assert np.array_equal(together.tokens.target, targets)
    logits = np.concatenate([one.tokens.top_logits for one in alone])
    assert np.abs(together.tokens.top_logits - logits).max() <= 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_the_number_of_tokens_read_is_as_computed(tmp_path: Path, budget: int) -> None:
    """Ten responses to each of three prompts: a batch reads its prompt once and has no padding."""
    save_model(tmp_path, "llama-tied", tokenizer())
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    engine = TransformersEngine(model, ("last",), 0)
    requests = texts([30, 12, 5], [[10, 2, 9, 4, 4, 6, 1, 8, 3, 3]] * 3)
    passed = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: passed.append(inputs[0].numel())
    )
    read(engine, requests, budget)
    whole = 10 * (30 + 12 + 5) + 3 * 50
    if budget == 1:
        assert sum(passed) == whole
    elif budget == 10_000:
        # The prompt of 5 tokens is too short to be shared.
        assert passed == [30 + 12 + 10 * 5 + 3 * 50]
    else:
        assert max(passed) <= budget
        # 60 tokens hold a prompt and half of its responses: it is read twice.
        times = {60: 2, 150: 1}[budget]
        assert sum(passed) == (30 + 12) * times + 10 * 5 + 3 * 50


@given(
    groups=st.lists(
        st.tuples(st.integers(0, 20), st.lists(st.integers(1, 30), min_size=1, max_size=6)),
        min_size=1,
        max_size=8,
    ),
    budget=st.integers(1, 200),
)
@settings(max_examples=150, deadline=None)
def test_batches_have_every_request_once_within_the_budget(
    groups: list[tuple[int, list[int]]], budget: int
) -> None:
    requests = texts([n for n, _ in groups], [own for _, own in groups])
    made = batches(requests, budget)
    assert sorted(index for batch in made for index in batch) == list(range(len(requests)))
    device = torch.device("cpu")
    for batch in made:
        some = [requests[index] for index in batch]
        packed = pack_texts(some, device)
        assert packed.ids.shape[1] <= budget or len(batch) == 1
        assert sum(len(one.ids) for one in some) <= 8 * budget or len(batch) == 1
        assert [own.stop for own in packed.segments[:-1]] == [
            own.start for own in packed.segments[1:]
        ]
        for request, places in zip(some, packed.places, strict=True):
            assert packed.ids[0, places].tolist() == request.ids.tolist()
            assert packed.positions[0, places].tolist() == list(range(len(request.ids)))


def test_responses_that_fit_into_a_batch_are_not_separated() -> None:
    requests = texts([40, 20, 20], [[10], [10, 10, 10], [5]])
    assert batches(requests, 60) == [[0], [1, 2, 3], [4]]


def test_copies_of_a_prompt_are_bounded() -> None:
    """40 responses fit beside their prompt, but with it have 1,640 keys and values in all."""
    made = batches(texts([40], [[1] * 40]), 80)
    assert [len(batch) for batch in made] == [15, 15, 10]  # of 41 tokens each, at most 640


def test_offsets_agree_with_the_segments() -> None:
    """Checks the arguments of the GPU kernel, which cannot run here."""
    packed = pack_texts(SHARED, torch.device("cpu"))
    offsets = packed.offsets
    assert len(offsets.queries) == len(offsets.keys) == len(packed.segments) + 1
    for index, (start, stop, begin, end) in enumerate(packed.segments):
        assert offsets.queries[index : index + 2].tolist() == [start, stop]
        keys = offsets.places[offsets.keys[index] : offsets.keys[index + 1]].tolist()
        assert keys == [*range(begin, end), *range(start, stop)]
    assert offsets.most_queries == max(stop - start for start, stop, _, _ in packed.segments)
    assert offsets.most_keys == 52


@pytest.mark.parametrize("window", [None, 7, 24])
def test_the_variable_length_kernel_computes_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """It runs on GPUs only; a stand-in does what its documentation says, one sequence at a time."""

    def documented(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> torch.Tensor:
        before, after = window_size
        assert (max_q, max_k, after) == (
            cu_seq_q.diff().max().item(),
            cu_seq_k.diff().max().item(),
            0,
        )
        out = []
        for q, k, v in zip(
            query.tensor_split(cu_seq_q[1:-1].long()),
            key.tensor_split(cu_seq_k[1:-1].long()),
            value.tensor_split(cu_seq_k[1:-1].long()),
            strict=True,
        ):
            # The last query is aligned with the last key.
            at = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
            seen = (at >= 0) & ((at <= before) | (before < 0))
            heads = (each.transpose(0, 1)[None] for each in (q, k, v))
            mixed = scaled_dot_product_attention(
                *heads, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
            )
            out.append(mixed[0].transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(packing, "varlen_attn", documented)
    packed = pack_texts(SHARED, torch.device("cpu"))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, packed.ids.shape[1], 8) for n in (4, 2, 2))
    found = packing._attend_at_once(query, key, value, packed.offsets, 0.3, window)
    expected, _ = packing._attend(
        None, query, key, value, None, packed=packed, scaling=0.3, sliding_window=window
    )
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_state_space_model_is_read_padded_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = TransformersEngine(model, ("last",), 0)
    assert engine.environment["batches"] == "padded"
    warning = capsys.readouterr().err.splitlines()[-1]
    assert "MambaForCausalLM is read in padded batches" in warning
    assert "depend on other texts" in warning
    _near_plain(engine, model, SHARED)


def test_a_model_that_scales_attention_by_absolute_position_is_read_padded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As Llama 4 does, in steps far longer than the texts that the engine tries packing with."""
    config = MistralConfig(**SIZES)
    config.attn_temperature_tuning = True
    engine = TransformersEngine(AutoModelForCausalLM.from_config(config).eval(), ("last",), 0)
    assert engine.environment["batches"] == "padded"
    assert "depend on where its text is packed" in capsys.readouterr().err


WINDOW = {"sliding_window": 24}
MIXED = WINDOW | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, **WINDOW),
        Phi3Config(**SIZES, **WINDOW),
        Qwen2Config(**SIZES | MIXED, use_sliding_window=True),
        # Soft-capped scores take another path through packed attention.
        Gemma2Config(**SIZES | MIXED),
        Gemma3TextConfig(**SIZES | MIXED),
        # This model ignores the setting.
        LlamaConfig(**SIZES, **WINDOW),
    ],
    ids=lambda config: config.model_type,
)
def test_a_sliding_window_is_applied_to_packed_texts(
    config: PreTrainedConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts of up to 52 tokens; windows reach shared prompts wholly, partly or not at all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = TransformersEngine(model, ("last",), 0)
    assert len(engine.batches(SHARED, 10_000)) == 1
    assert "padded" not in capsys.readouterr().err
    _near_plain(engine, model, SHARED)


def in_the_mask_alone(monkeypatch: pytest.MonkeyPatch) -> PreTrainedConfig:
    forward = MistralAttention.forward

    def untold(self: MistralAttention, *args: Any, **inputs: Any) -> Any:
        config, self.config = self.config, copy(self.config)
        self.config.sliding_window = None
        try:
            return forward(self, *args, **inputs)
        finally:
            self.config = config

    monkeypatch.setattr(MistralAttention, "forward", untold)
    return MistralConfig(**SIZES, **WINDOW)


def told_of_but_not_in_the_mask(_: pytest.MonkeyPatch) -> PreTrainedConfig:
    return OlmoeConfig(**SIZES | {"num_experts": 4, "num_experts_per_tok": 2}, **WINDOW)


@pytest.mark.parametrize("made", [in_the_mask_alone, told_of_but_not_in_the_mask])
def test_texts_longer_than_a_window_that_is_only_in_the_mask_are_read_padded(
    made: Callable[[pytest.MonkeyPatch], PreTrainedConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made(monkeypatch)).eval()
    engine = TransformersEngine(model, ("last",), 0)
    assert "texts of more than 24 tokens" in capsys.readouterr().err
    batched = engine.batches(SHARED, 10_000)
    longest = [max(len(SHARED[index].ids) for index in batch) for batch in batched]
    assert longest[0] <= 24 < longest[1] == 52
    _near_plain(engine, model, SHARED)


def _near_plain(
    engine: TransformersEngine, model: torch.nn.Module, requests: list[Request]
) -> None:
    found = read(engine, requests, 10_000).states["last"]
    model.set_attn_implementation("eager")
    for state, request in zip(found, requests, strict=True):
        with torch.no_grad():
            ids = torch.from_numpy(request.ids.astype(np.int64))[None]
            expected = model.base_model(input_ids=ids).last_hidden_state[0, -1]
        assert (state - expected).abs().max() <= 1e-4 * expected.abs().max()
