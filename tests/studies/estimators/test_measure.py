"""Errors of the regularizers' estimators: against dense softmax, enumerated samples and theory."""

import json
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from command_line import Outcome, refused
from dense_lm import statistics_of
from torch import Tensor
from toy_cache import toy_cache

from embrm.cache.schema import ShardRows, TokenRows
from embrm.cache.tensors import to_stored
from embrm.cache.writer import open_writer
from embrm.core.errors import UserError
from embrm.lm.head import LmHead
from embrm.studies.estimators import bias as biases
from embrm.studies.estimators import measure as estimators
from embrm.studies.estimators.measure import (
    DRIFTS,
    EstimatorErrors,
    TruncationError,
    exact_changes,
    measure_estimators,
    sampling_error,
)
from embrm.studies.estimators.table import advice, estimator_tables, recommendations
from embrm.training.row_store import RowStore
from embrm.training.token_rows import TokenStore


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(biases, "_DRAWS", 8)


@pytest.fixture
def no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no bias, which takes seconds, where only linear errors are tested."""
    monkeypatch.setattr(estimators, "estimator_biases", lambda *_: ())


VOCABULARY, WIDTH, RESPONSES, SHARD = 60, 8, 20, 8


@dataclass(frozen=True)
class Made:
    """The LM head that `make` used, and the states and targets of the token rows that it cached."""

    head: LmHead
    states: Tensor
    targets: Tensor


def make(
    folder: Path,
    *,
    top_k: int = 16,
    tail_mean: bool = False,
    rows: int = 4,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    without: str | None = None,
) -> Made:
    """Write a cache of random token states: response i has 3 + i positions and at most `rows` rows.

    without: the name of a tensor of the LM head that is not stored.
    """
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random)
    bias = torch.randn(VOCABULARY, generator=random) / 3
    head = LmHead(weight, bias, 0.6, softcap)
    n_response = np.arange(3, 3 + RESPONSES, dtype=np.int32)
    n_prompt = np.where(np.arange(RESPONSES) == 2, 0, 5).astype(np.int32)
    counts = np.minimum(n_response - (n_prompt == 0), rows)
    states = torch.randn(int(counts.sum()), WIDTH, generator=random).to(dtype)
    targets = head.logits(states.float()).softmax(1).multinomial(1, generator=random)[:, 0]
    found = statistics_of(head, states.float(), targets, top_k, tail_mean=tail_mean)
    response = np.repeat(np.arange(RESPONSES, dtype=np.int32), counts)
    stored = {name: value for name, value in head.tensors().items() if name != without}
    none = pl.DataFrame(schema={"split": pl.String})
    with open_writer(
        folder,
        identity={"made": folder.name},
        environment={},
        extraction={},
        data={},
        tables={"pairs": none, "members": none, "exclusions": none, "leaks": none},
        n_responses=RESPONSES,
        shard_rows=SHARD,
        lm_head=lambda: stored,
    ) as writer:
        for index, first in enumerate(range(0, RESPONSES, SHARD)):
            part = slice(first, min(first + SHARD, RESPONSES))
            n = part.stop - first
            own = (response >= first) & (response < part.stop)
            last = torch.ones(n, WIDTH, dtype=dtype)
            tails = found.tail_mean
            writer.write_shard(
                index,
                ShardRows(
                    first=first,
                    response_id=[f"{row:016x}" for row in range(first, part.stop)],
                    prompt_id=["prompt"] * n,
                    n_prompt=n_prompt[part],
                    n_response=n_response[part],
                    truncated=np.zeros(n, bool),
                    final_position=(n_prompt + n_response - 1)[part],
                    final_token=np.zeros(n, np.int32),
                    S=np.full(n, -9.0),
                    states={"last": to_stored(last)},
                    norms={"last": last.float().norm(dim=1).numpy()},
                ),
                TokenRows(
                    response=response[own],
                    position=np.zeros(int(own.sum()), np.int32),
                    target=targets.numpy().astype(np.int32)[own],
                    target_logit=found.target_logit.numpy()[own],
                    logsumexp=found.logsumexp.numpy()[own],
                    state=to_stored(states[own]),
                    top_ids=found.top_ids.numpy()[own],
                    top_logits=found.top_logits.numpy()[own],
                    tail_mean=None if tails is None else to_stored(tails[own].to(dtype)),
                )
                if rows
                else None,
            )
        writer.finish()
    return Made(head, states, targets)


def entries(errors: EstimatorErrors, **wanted: Any) -> list[TruncationError]:
    return [
        entry
        for entry in errors.truncation
        if all(getattr(entry, name) == value for name, value in wanted.items())
    ]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("block", [7, 1 << 13])
def test_exact_changes_equal_those_of_a_dense_softmax(
    softcap: float | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimators, "_VOCABULARY_BLOCK", block)
    random = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(20, 5, generator=random), torch.randn(20, generator=random)
    X, shifts = torch.randn(6, 5, generator=random), torch.randn(2, 6, 5, generator=random)
    target = torch.randint(20, (6,), generator=random)
    found = exact_changes(LmHead(weight, bias, 0.7, softcap), X, target, shifts)

    def log_p(states: Tensor) -> Tensor:
        z = 0.7 * (states @ weight.double().T + bias.double())
        return (z if softcap is None else softcap * torch.tanh(z / softcap)).log_softmax(-1)

    before = log_p(X.double())
    for shift, change, change_gradient, kl, kl_gradient in zip(
        shifts, found.change, found.change_gradient, found.kl, found.kl_gradient, strict=True
    ):
        leaf = shift.double().requires_grad_()
        after = log_p(X.double() + leaf)
        expected = (after - before)[torch.arange(6), target]
        divergence = (before.exp() * (before - after)).sum(1)
        torch.testing.assert_close(change, expected.detach())
        torch.testing.assert_close(kl, divergence.detach())
        [of_change] = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)
        [of_kl] = torch.autograd.grad(divergence.sum(), leaf)
        torch.testing.assert_close(change_gradient, of_change)
        torch.testing.assert_close(kl_gradient, of_kl)


@pytest.mark.usefixtures("no_bias")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tail_mean", [False, True])
def test_estimates_from_the_whole_vocabulary_are_exact(
    tmp_path: Path, softcap: float | None, tail_mean: bool
) -> None:
    make(tmp_path, top_k=VOCABULARY, softcap=softcap, tail_mean=tail_mean)
    errors = measure_estimators(tmp_path)
    assert errors.grm_top_k is not None
    assert errors.preserve_top_k is not None
    for entry in entries(errors, top_k=VOCABULARY):
        assert entry.tail < 1e-6
        assert max(entry.change, entry.change_gradient, entry.kl_gradient) < 1e-4
        assert entry.kl < 5e-3  # at drift 0.01 KL is 1e-5 nats, a difference of sums near 1


@pytest.mark.usefixtures("no_bias")
def test_a_tail_of_one_token_is_exact_with_its_mean(tmp_path: Path) -> None:
    make(tmp_path, top_k=VOCABULARY - 1, tail_mean=True)
    for entry in entries(measure_estimators(tmp_path), top_k=VOCABULARY - 1, tail_mean=True):
        assert max(entry.change, entry.change_gradient, entry.kl_gradient) < 1e-4
        assert entry.kl < 5e-3


@pytest.mark.usefixtures("no_bias")
def test_errors_fall_with_top_k(tmp_path: Path) -> None:
    make(tmp_path, top_k=48)
    errors = measure_estimators(tmp_path)
    for drift in DRIFTS:
        found = entries(errors, drift=drift)
        assert [entry.top_k for entry in found] == [1, 2, 4, 8, 16, 32, 48]
        for name in ("tail", "tail_95", "tail_max", "change_gradient", "kl", "kl_gradient"):
            values = [getattr(entry, name) for entry in found]
            assert values == sorted(values, reverse=True), name
        assert found[-1].change < found[0].change / 2


@pytest.mark.usefixtures("no_bias")
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_tail_means_make_the_gradient_exact_to_first_order(
    tmp_path: Path, softcap: float | None
) -> None:
    make(tmp_path, top_k=8, tail_mean=True, softcap=softcap)
    errors = measure_estimators(tmp_path)
    small, large = (
        {entry.tail_mean: entry for entry in entries(errors, drift=drift, top_k=8)}
        for drift in DRIFTS
    )
    for name in ("change", "change_gradient"):
        without, given = getattr(small[False], name), getattr(small[True], name)
        assert given < without / 10
        assert getattr(large[True], name) < getattr(large[False], name)
        # At ten times the drift the relative error grows tenfold with tail means, because it is of
        # the next order in δ; without them it stays.
        assert 5 < getattr(large[True], name) / given < 20
        assert 0.5 < getattr(large[False], name) / without < 2
    assert errors.tail_mean
    assert {entry.tail_mean for entry in errors.truncation} == {False, True}


@pytest.mark.usefixtures("no_bias")
def test_tails_are_the_probability_of_all_other_tokens(tmp_path: Path) -> None:
    made = make(tmp_path, top_k=5)
    p = made.head.logits(made.states).softmax(1)
    kept = torch.zeros_like(p).scatter_(1, p.topk(4).indices, 1)
    kept.scatter_(1, made.targets[:, None], 1)
    tail = (p * (1 - kept)).sum(1)
    for entry in entries(measure_estimators(tmp_path), top_k=4):
        assert entry.tail == pytest.approx(float(tail.mean()), rel=1e-4)
        assert entry.tail_95 == pytest.approx(float(tail.quantile(0.95)), rel=1e-4)
        assert entry.tail_max == pytest.approx(float(tail.max()), rel=1e-4)


@pytest.mark.usefixtures("no_bias")
def test_the_size_of_chunks_does_not_change_the_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, tail_mean=True)
    whole = measure_estimators(tmp_path)
    assert measure_estimators(tmp_path) == whole
    monkeypatch.setattr(estimators, "_LOGIT_BYTES", 1)
    for one, other in zip(measure_estimators(tmp_path).truncation, whole.truncation, strict=True):
        assert vars(one) == pytest.approx(vars(other), rel=1e-3)


@pytest.mark.usefixtures("no_bias")
def test_bfloat16_states_are_read_as_stored(tmp_path: Path) -> None:
    make(tmp_path, top_k=VOCABULARY, dtype=torch.bfloat16)
    for entry in entries(measure_estimators(tmp_path), top_k=VOCABULARY, drift=0.1):
        assert max(entry.change, entry.change_gradient, entry.kl, entry.kl_gradient) < 1e-3


@pytest.mark.usefixtures("no_bias")
def test_the_sample_has_all_rows_of_its_responses(tmp_path: Path) -> None:
    make(tmp_path, rows=4)
    every, three = measure_estimators(tmp_path), measure_estimators(tmp_path, sample=3)
    # Response 0 has 3 positions. Response 2 has no prompt, so only 4 of its 5 tokens have a state
    # that predicts them.
    assert (every.responses, every.rows) == (RESPONSES, 3 + 4 * (RESPONSES - 1))
    assert (three.responses, three.rows) == (3, 3 + 4 + 4)
    assert every.vocabulary == VOCABULARY
    data = estimators._sampled(estimators.open_cache(tmp_path), 100)
    assert data.positions.tolist() == [3, 4, 4, *range(6, 3 + RESPONSES)]


@pytest.mark.parametrize("drift", DRIFTS)
def test_shifts_have_their_drift_and_rank(tmp_path: Path, drift: float) -> None:
    make(tmp_path)
    data = estimators._sampled(estimators.open_cache(tmp_path), 100)
    shifts = estimators._shifts(data, drift)
    ratio = shifts.norm(dim=1) / data.states.values.norm(dim=1)
    assert float(ratio.mean()) == pytest.approx(drift, rel=1e-5)
    # Every fourth response has the same adapter, which is linear in the state.
    owner = np.repeat(np.arange(RESPONSES), np.diff(data.starts)) % 4
    own = torch.from_numpy(owner == 0)
    found = torch.linalg.lstsq(data.states.values[own], shifts[own])
    torch.testing.assert_close(data.states.values[own] @ found.solution, shifts[own])


def token_data(parts: list[list[float]], positions: list[int]) -> tuple[TokenStore, Tensor]:
    """What `sampling_error` reads: a store with the rows of each response, and ℓ̃ - ℓ of all rows.

    parts: ℓ̃ - ℓ of the cached rows of each response. positions: how many positions each has.
    """
    nothing = RowStore(torch.zeros(0, 1))
    data = TokenStore(
        states=nothing,
        packed_logits=nothing,
        tail_means=None,
        head=LmHead(nothing.values),
        weight_rows=nothing,
        starts=np.cumsum([0, *map(len, parts)]),
        positions=np.array(positions),
        S=np.zeros(len(parts)),
    )
    return data, torch.tensor([value for part in parts for value in part], dtype=torch.float64)


VALUES = [0.3, -1.2, 0.8, 2.5, 0.1]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
def test_sampling_error_equals_that_over_all_possible_samples(rows: int) -> None:
    taken = min(rows, 5)
    estimates = [5 / taken * sum(some) for some in combinations(VALUES, taken)]
    nats, relative = sampling_error(*token_data([VALUES], [5]), rows)
    total = sum(VALUES)
    expected = float(np.sqrt(np.mean([(one - total) ** 2 for one in estimates])))
    assert nats == pytest.approx(expected, abs=1e-12)
    assert relative == pytest.approx(expected / total, abs=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_sampling_error_is_unbiased_where_few_positions_are_cached(rows: int) -> None:
    """If each sample of three of the five positions is cached as a response of its own, the error
    is on average that of a response with all five cached."""
    cached = [list(some) for some in combinations(VALUES, 3)]
    found = sampling_error(*token_data(cached, [5] * len(cached)), rows)
    assert found == pytest.approx(sampling_error(*token_data([VALUES], [5]), rows))


def test_responses_without_a_variance_are_left_out() -> None:
    """One cached row of nine positions has an unknown variance, one of one position has none."""
    alone = sampling_error(*token_data([VALUES], [5]), 2)
    assert sampling_error(*token_data([[7.0], VALUES, []], [9, 5, 3]), 2) == alone
    nats, _ = sampling_error(*token_data([[7.0], VALUES], [1, 5]), 2)
    assert alone[0] is not None
    assert nats == pytest.approx(alone[0] / 2**0.5)
    assert sampling_error(*token_data([[7.0]], [9]), 2) == (None, None)


def test_a_change_smaller_than_its_noise_has_no_relative_error() -> None:
    nats, relative = sampling_error(*token_data([[1.0, -1.0]], [50]), 2)
    assert nats == pytest.approx((50**2 * (1 / 2 - 1 / 50) * 2) ** 0.5)
    assert relative is None


@pytest.mark.usefixtures("no_bias")
def test_the_smallest_settings_within_the_target_are_recommended(tmp_path: Path) -> None:
    make(tmp_path, top_k=32, tail_mean=True, rows=8)
    first = measure_estimators(tmp_path)
    own = entries(first, drift=0.1, tail_mean=True)
    for entry in own:
        found = measure_estimators(tmp_path, target=entry.change_gradient)
        within = [e.top_k for e in own if e.change_gradient <= entry.change_gradient]
        assert found.grm_top_k == min(within)
        found = measure_estimators(tmp_path, target=entry.kl_gradient)
        assert found.preserve_top_k == min(
            e.top_k for e in own if e.kl_gradient <= entry.kl_gradient
        )
    sampled = [entry for entry in first.sampling if entry.drift == 0.1]
    assert [entry.token_rows for entry in sampled] == [1, 2, 4, 8]
    relative = [entry.relative for entry in sampled]
    assert relative == sorted(relative, key=lambda error: -(error or 0))
    assert relative[1] is not None
    found = measure_estimators(tmp_path, target=relative[1])
    assert (found.token_rows, found.token_rows_error) == (2, relative[1])
    none = measure_estimators(tmp_path, target=1e-9)
    assert (none.grm_top_k, none.preserve_top_k) == (None, None)
    assert (none.token_rows, none.token_rows_error) == (8, relative[3])


@pytest.mark.usefixtures("no_bias")
def test_advice_names_the_options_that_can_help(tmp_path: Path) -> None:
    make(tmp_path)
    errors = measure_estimators(tmp_path)
    assert advice(errors, "grm") == (
        "extract with --tail-mean or a larger --top-k, or take 'all' 60 tokens"
    )
    larger = "extract with a larger --top-k"
    assert advice(errors, "preserve") == f"{larger}, or take 'all' 60 tokens"
    assert advice(replace(errors, tail_mean=True, vocabulary=32_769), "grm") == larger
    assert "'all'" in advice(replace(errors, vocabulary=32_768), "preserve")


@pytest.mark.usefixtures("no_bias")
def test_one_row_per_response_gives_no_sampling_error(tmp_path: Path) -> None:
    make(tmp_path, rows=1)
    errors = measure_estimators(tmp_path)
    assert [(entry.token_rows, entry.nats) for entry in errors.sampling] == [(1, None)] * 2
    assert (errors.token_rows, errors.token_rows_error) == (1, None)


@pytest.mark.usefixtures("few_draws")
def test_the_command_prints_tables_and_settings(embrm: Any, tmp_path: Path) -> None:
    make(tmp_path, tail_mean=True, rows=8)
    outcome: Outcome = embrm("cache", "probe", tmp_path, "--regularizer", "--target", 1e-6)
    assert outcome.code == 0
    for part in (
        "largest",
        "token_rows",
        "grm-*: top_k = none",
        "preserve-*",
        "or take 'all' 60 tokens",
    ):
        assert part in outcome.out
    lines = [line for line in outcome.out.splitlines() if not line.startswith("grm-dpo: ")]
    assert max(map(len, lines)) <= 100
    assert "grm-dpo: token_rows = none: grm-dpo cannot be trusted on this cache" in outcome.out
    outcome = embrm("cache", "probe", tmp_path, "--regularizer", "--target", 100)
    assert "grm-*: top_k = 1\ngrm-*: token_rows = 1\n" in outcome.out
    assert "preserve-*: top_k = 1\n" in outcome.out
    assert "'all'" not in outcome.out


@pytest.mark.usefixtures("few_draws")
def test_the_command_prints_json(embrm: Any, tmp_path: Path) -> None:
    make(tmp_path, rows=1)  # so that some entries are null

    out = embrm("cache", "probe", tmp_path, "--regularizer", "--sample", 5, "--json").out
    found = json.loads(out, parse_constant=pytest.fail)
    assert set(found) == set(EstimatorErrors.__dataclass_fields__)
    assert set(found["truncation"][0]) == set(TruncationError.__dataclass_fields__)
    names = {"drift", "token_rows", "estimator", "loss", "gradient", "gradient_error"}
    assert set(found["bias"][0]) == names | {"sign_agrees"}
    assert {entry["estimator"] for entry in found["bias"]} == {"plug-in"}
    assert (found["pairs"], found["random_pairs"], found["dpo_token_rows"]) == (2, True, None)
    assert set(found["sampling"][0]) == {"drift", "token_rows", "nats", "relative"}
    assert (found["responses"], found["target"]) == (5, 0.05)


def test_caches_that_lack_something_are_refused(embrm: Any, tmp_path: Path) -> None:
    plain = toy_cache(tmp_path / "plain", prompts=5)
    refused(embrm("cache", "probe", plain, "--regularizer"), "no token rows", "--token-rows 8")
    make(tmp_path / "bare", top_k=0)
    refused(embrm("cache", "probe", tmp_path / "bare", "--regularizer"), "--top-k 32")
    make(tmp_path / "headless", without="weight")
    refused(embrm("cache", "probe", tmp_path / "headless", "--regularizer"), "no LM head")
    refused(embrm("cache", "probe", tmp_path / "absent", "--regularizer"), "absent")


def test_one_response_has_no_pair_whose_bias_could_be_measured(tmp_path: Path) -> None:
    make(tmp_path)
    errors = measure_estimators(tmp_path, sample=1)
    assert (errors.bias, errors.pairs, errors.dpo_token_rows) == ((), 0, None)
    assert len(estimator_tables(errors)) == 2
    assert any("raise --sample" in line for line in recommendations(errors))


@pytest.mark.usefixtures("few_draws")
def test_all_positions_are_recommended_where_no_fewer_suffice(tmp_path: Path) -> None:
    make(tmp_path, rows=RESPONSES + 3)
    errors = measure_estimators(tmp_path, target=1e-6)
    assert errors.dpo_token_rows == RESPONSES + 2
    line = f"grm-dpo: token_rows = {RESPONSES + 2}, empirical-bayes"
    assert line in recommendations(errors)
    some = replace(errors, bias=(*errors.bias[:-1], replace(errors.bias[-1], gradient=0.01)))
    assert any(text.startswith(f"{line}; the cache lacks") for text in recommendations(some))


def test_options_of_the_other_probe_are_refused(embrm: Any, tmp_path: Path) -> None:
    make(tmp_path)
    refused(embrm("cache", "probe", tmp_path, "--target", 0.1), "--target", "--regularizer")
    refused(embrm("cache", "probe", tmp_path, "--regularizer", "--device", "cpu"), "--device")
    refused(embrm("cache", "probe", tmp_path, "--regularizer", "--engine", "vllm"), "--engine")
    refused(embrm("cache", "probe", tmp_path, "--engine", "vlm"), "did you mean 'vllm'")


@pytest.mark.usefixtures("no_bias")
def test_a_sample_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    real = estimators._sampled

    def emptied(cache: Any, size: int) -> TokenStore:
        data = real(cache, size)
        return replace(data, states=RowStore(data.states.values[:0]))

    monkeypatch.setattr(estimators, "_sampled", emptied)
    with pytest.raises(
        UserError, match=r"none of 7 responses has token rows: raise sample \(--sample\)"
    ):
        measure_estimators(tmp_path, sample=7)
