"""Token rows: uniform sampling, and truncated softmaxes against the full vocabulary in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_tokens import Dense, toy_tokens

from embrm.training.regularizers import log_probability_change
from embrm.training.row_store import RowStore
from embrm.training.token_rows import PackedLogits, TokenBatch, TokenStore

HEADS = [
    {},
    {"bias": True},
    {"scale": 0.25, "bias": True},
    {"softcap": 1.5},
    {"softcap": 3.0, "scale": 2.0, "bias": True},
]
"""Heads of language models: plain, biased, scaled as Cohere's, soft-capped as Gemma's, and all."""


def _all_rows(data: TokenStore, **options: object) -> TokenBatch:
    responses = torch.arange(len(data.S))
    settings = {"rows": None, "top_k": None, "draws": np.zeros(len(data.S))} | options
    return data.read(responses, **settings)  # type: ignore[arg-type]


def _at(tokens: TokenBatch, shift: Tensor) -> Tensor:
    """The change of w·h, [n, C], when the states are shifted by shift [n, d]."""
    if tokens.candidates is None:
        return shift @ tokens.vectors.T.to(shift.dtype)
    vectors = tokens.vectors[tokens.candidates].to(shift.dtype)
    return torch.einsum("ncd,nd->nc", vectors, shift)


# Sampling


@settings(deadline=None)
@given(held=st.lists(st.integers(0, 9), min_size=1, max_size=5), rows=st.integers(1, 10))
def test_every_row_of_a_response_is_equally_likely(held: list[int], rows: int) -> None:
    data, _ = toy_tokens(held, top_k=1)
    for response, count in enumerate(held):
        seen = np.zeros(sum(held), int)
        for start in range(count):  # every start that a draw can have, once
            draws = np.array([(start + 0.5) / count])
            numbers, owner = data.sample(np.array([response]), rows, draws)
            assert len(numbers) == len({*numbers.tolist()}) == min(rows, count)
            assert not owner.any()
            seen[numbers] += 1
        first = sum(held[:response])
        assert (seen[first : first + count] == min(rows, count)).all()
        assert seen.sum() == count * min(rows, count)


@settings(deadline=None)
@given(
    held=st.lists(st.integers(0, 9), min_size=2, max_size=6),
    rows=st.none() | st.integers(1, 10),
    data=st.data(),
)
def test_the_sample_of_a_response_does_not_depend_on_other_responses(
    held: list[int], rows: int | None, data: st.DataObject
) -> None:
    tokens, _ = toy_tokens(held, top_k=1)
    draws = np.array([data.draw(st.floats(0, 1, exclude_max=True)) for _ in held])
    order = np.array(data.draw(st.permutations(range(len(held)))))
    numbers, owner = tokens.sample(order, rows, draws)
    assert (np.diff(owner) >= 0).all()
    for place, response in enumerate(order):
        alone, _ = tokens.sample(np.array([response]), rows, draws[place : place + 1])
        assert numbers[owner == place].tolist() == alone.tolist()
        if rows is None or rows >= held[response]:
            assert len(alone) == held[response]


def test_sampled_rows_are_weighted_by_the_positions_they_stand_for() -> None:
    data, dense = toy_tokens()
    responses = torch.tensor([4, 0, 3, 2])
    draws = np.array([0.9, 0.1, 0.5, 0.99])
    tokens = data.read(responses, rows=2, top_k=None, draws=draws)
    numbers, owner = data.sample(responses.numpy(), 2, draws)
    assert tokens.response.tolist() == owner.tolist() == [0, 0, 1, 1, 3, 3]
    torch.testing.assert_close(tokens.X.double(), dense.H[numbers])
    expected = [data.positions[responses[place]] / 2 for place in owner]
    assert tokens.share.tolist() == expected
    # Row for row the shares of a response add up to its positions: the estimate has no bias.
    torch.testing.assert_close(tokens.S.double(), torch.from_numpy(data.S)[responses], rtol=1e-6,
                               atol=0)  # fmt: skip


# Truncated softmaxes


@pytest.mark.parametrize("top_k", [None, 2, 5])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_candidates_have_their_log_probabilities_and_the_tail_has_the_rest(
    head: dict[str, float], top_k: int | None
) -> None:
    data, dense = toy_tokens(**head)  # type: ignore[arg-type]
    tokens = _all_rows(data, top_k=top_k)
    k, log_p = top_k or 5, dense.log_p(dense.H)
    largest = log_p.topk(k, 1).indices
    doubled = (largest == dense.target[:, None]).any(1)
    assert 0 < doubled.sum() < len(doubled)  # targets of both sorts
    assert tokens.candidates is not None
    assert not tokens.target.any()
    for row, target in enumerate(dense.target.tolist()):
        distinct = {target, *largest[row].tolist()}
        valid = [c for c in range(k + 1) if tokens.log_p[row, c] > -torch.inf]
        assert len(valid) == len(distinct)
        ids = [target, *largest[row].tolist()]
        for c in valid:
            assert tokens.log_p[row, c].item() == pytest.approx(log_p[row, ids[c]].item(), 1e-5)
            vector = tokens.vectors[tokens.candidates[row, c]]
            assert torch.equal(vector.double(), dense.W[ids[c]])
        rest = [j for j in range(len(dense.W)) if j not in distinct]
        tail = log_p[row, rest].logsumexp(0).item()
        assert tokens.log_p[row, -1].item() == pytest.approx(tail, abs=1e-4)
    total = tokens.log_p.double().exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_a_tail_too_small_for_float32_is_left_out() -> None:
    data, _ = toy_tokens(vocabulary=6, top_k=6)
    assert (_all_rows(data).log_p[:, -1] == -torch.inf).all()
    assert (_all_rows(data, top_k=2).log_p[:, -1] > -torch.inf).any()


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_whole_vocabulary_is_dense(head: dict[str, float]) -> None:
    data, dense = toy_tokens(**head)  # type: ignore[arg-type]
    tokens = _all_rows(data, top_k="all")
    assert tokens.candidates is None
    assert tokens.target.tolist() == dense.target.tolist()
    torch.testing.assert_close(tokens.log_p.double(), dense.log_p(dense.H), rtol=1e-5, atol=1e-5)
    shift = _shifts(dense, 1.0)
    change = dense.logits(dense.H + shift) - dense.logits(dense.H)
    found = tokens.changes(_at(tokens, shift.float())).double()
    torch.testing.assert_close(found, change, rtol=1e-3, atol=1e-4)
    known = _dense_change(dense, shift)
    found = log_probability_change(tokens, _at(tokens, shift.float())).double()
    torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


def _shifts(dense: Dense, size: float) -> Tensor:
    random = np.random.default_rng(8)
    return size * torch.from_numpy(random.standard_normal(tuple(dense.H.shape)))


def _dense_change(dense: Dense, shift: Tensor) -> Tensor:
    """log p̃(target) - log p(target), [N]."""
    change = dense.log_p(dense.H + shift) - dense.log_p(dense.H)
    return change.gather(1, dense.target[:, None])[:, 0]


def _gradient(tokens: TokenBatch) -> Tensor:
    """∂(log p̃(target))/∂δ at δ = 0, [n, d]."""
    shift = torch.zeros(tokens.X.shape, requires_grad=True)
    change = log_probability_change(tokens, _at(tokens, shift))
    assert not change.any()  # to the bit
    (gradient,) = torch.autograd.grad(change.sum(), shift)
    return gradient.double()


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_the_error_of_a_truncated_gradient_is_the_mass_and_mean_of_its_tail(
    head: dict[str, float], top_k: int | None
) -> None:
    """With the tail's mean there is no error, even if fewer logits are read than are cached."""
    data, dense = toy_tokens(**head, tail_means=False)  # type: ignore[arg-type]
    slopes, p = dense.gradients(dense.H), dense.log_p(dense.H).exp()
    places = torch.arange(len(p))
    exact = slopes[places, dense.target] - torch.einsum("nv,nvd->nd", p, slopes)
    tail = p.scatter(1, p.topk(top_k or 5, 1).indices, 0.0)
    tail = tail.scatter(1, dense.target[:, None], 0.0)
    missing = torch.einsum("nv,nvd->nd", tail, slopes)  # p_tail · E_tail[∂z/∂h]
    assert missing.norm(dim=1).min() > 1e-3
    found = _gradient(_all_rows(data, top_k=top_k))
    torch.testing.assert_close(found - exact, missing, rtol=1e-3, atol=2e-5)

    with_means, _ = toy_tokens(**head)  # type: ignore[arg-type]
    found = _gradient(_all_rows(with_means, top_k=top_k))
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-5)


def test_the_truncation_error_falls_to_zero_as_logits_are_added() -> None:
    errors = []
    for top_k in (1, 4, 16, 22, 23):
        data, dense = toy_tokens((40,), top_k=top_k, tail_means=False)
        shift = _shifts(dense, 0.5)
        tokens = _all_rows(data)
        found = log_probability_change(tokens, _at(tokens, shift.float())).double()
        errors.append((found - _dense_change(dense, shift)).abs().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[2]
    assert errors[-1] < 1e-5


def test_tail_means_leave_an_error_of_second_order() -> None:
    errors = {}
    for means in (True, False):
        data, dense = toy_tokens((40,), top_k=4, tail_means=means)
        tokens = _all_rows(data)
        for size in (0.04, 0.02):
            shift = _shifts(dense, size)
            found = log_probability_change(tokens, _at(tokens, shift.float())).double()
            errors[means, size] = (found - _dense_change(dense, shift)).abs().mean().item()
    assert errors[True, 0.02] / errors[True, 0.04] == pytest.approx(1 / 4, abs=0.04)
    assert errors[False, 0.02] / errors[False, 0.04] == pytest.approx(1 / 2, abs=0.06)
    assert errors[True, 0.02] < errors[False, 0.02] / 10


# Storage


def test_token_ids_keep_their_bits_among_floats() -> None:
    ids = np.array([[0, 1, 127_999], [2**31 - 1, 255_999, 8_388_608]], np.int32)
    ones = np.ones((2, 3), np.float32)
    packed = PackedLogits.pack(ids[:, 0], ones[:, 0], ones[:, 1], ids, ones)
    assert packed.matrix.shape[1] == PackedLogits.width(packed.top_k)
    taken = PackedLogits(RowStore(packed.matrix).take(torch.tensor([1, 0])))
    assert taken.target.tolist() == ids[::-1, 0].tolist()
    assert taken.ids(3)[:, 1:].tolist() == ids[::-1].tolist()
    assert taken.ids(1).tolist() == ids[::-1, [0, 0]].tolist()


def test_token_rows_are_the_same_in_memory_and_streamed(tmp_path: Path) -> None:
    data, _ = toy_tokens(tuple(range(40)))

    def streamed(states: RowStore, name: str) -> RowStore:
        path = tmp_path / name
        path.write_bytes(states.values.numpy().tobytes())
        shape = (states.values.shape[0], states.values.shape[1])
        return RowStore.of_file(path, shape, torch.float32, resident=1)

    assert data.tail_means is not None
    mapped = TokenStore(
        states=streamed(data.states, "states"),
        packed_logits=streamed(data.packed_logits, "logits"),
        tail_means=streamed(data.tail_means, "tails"),
        head=data.head,
        weight_rows=streamed(data.weight_rows, "weight"),
        starts=data.starts,
        positions=data.positions,
        S=data.S,
    )
    responses, draws = torch.tensor([7, 30, 2, 39]), np.array([0.1, 0.5, 0.9, 0.3])
    for top_k in (None, 2, "all"):
        one, two = (
            each.read(responses, rows=3, top_k=top_k, draws=draws) for each in (data, mapped)
        )
        mapped.release_pages()
        for name in ("X", "response", "share", "S", "vectors", "target", "uncapped", "log_p"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
