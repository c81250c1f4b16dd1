"""Tests of the statistics of states against full logits and dense tail means."""

import numpy as np
import pytest
import torch
from dense_lm import dense_tail_mean, statistics_of

from embrm.lm.head import LmHead

HEADS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "soft-capped": {"softcap": 1.5},
    "all": {"bias": torch.linspace(-1, 1, 300), "scale": 0.5, "softcap": 2.0},
}


@pytest.mark.parametrize("top_k", [0, 1, 7, 299, 300])
@pytest.mark.parametrize("kind", HEADS)
def test_tail_means_equal_a_dense_computation(kind: str, top_k: int) -> None:
    generator = torch.Generator().manual_seed(3)
    head = LmHead(torch.randn(300, 12, generator=generator), **HEADS[kind])
    states = torch.randn(40, 12, generator=generator)
    order = head.logits(states).argsort(dim=1, descending=True)
    # Targets among the largest logits in even rows, the first left out and others in odd ones.
    targets = order[:, min(max(top_k - 1, 0), 299)].clone()
    targets[1::2] = order[1::2, min(top_k, 299)]
    targets[3::4] = order[3::4, min(top_k + 20, 299)]
    found = statistics_of(head, states, targets, top_k, tail_mean=True)
    for row, state in enumerate(states):
        expected = dense_tail_mean(head, state, int(targets[row]), found.top_ids[row])
        assert (found.tail_mean[row] - expected).abs().max() <= 1e-5
    if top_k == 300:
        assert not found.tail_mean.any()
    plain = statistics_of(head, states, targets, top_k)
    assert plain.tail_mean is None
    assert torch.equal(plain.logsumexp, found.logsumexp)


def test_a_tail_too_unlikely_for_float32_has_no_mean() -> None:
    # Token 0, the target, has nearly all probability, and token 1 nearly all of the tail's.
    head = LmHead(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    for gap, there in ((-13.0, True), (-15.0, False)):  # exp(-13.82) = 1e-6
        found = statistics_of(
            head, torch.tensor([[gap, gap - 40]]), torch.tensor([0]), tail_mean=True
        ).tail_mean
        assert torch.allclose(found, torch.tensor([[float(there), 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tail_means_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    # So wide that the head is cast to float32 in several blocks, the last one not full.
    generator = torch.Generator().manual_seed(0)
    vocabulary, width = 9000, 512
    head = LmHead((torch.randn(vocabulary, width, generator=generator) / 40).to(dtype))
    states = torch.randn(20, width, generator=generator).to(dtype)
    targets = torch.arange(20)
    found = statistics_of(head, states, targets, 5, tail_mean=True)
    assert found.tail_mean is not None
    assert found.tail_mean.dtype == dtype
    # The logits are those of the model in its dtype, so only the result is rounded.
    odds = torch.softmax(head.logits(states).double(), 1)
    odds.scatter_(1, targets[:, None], 0).scatter_(1, found.top_ids.long(), 0)
    expected = odds @ head.weight.double() / odds.sum(1, keepdim=True)
    error = (found.tail_mean.double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 1e-7).all()


def test_tail_means_give_the_first_order_change_of_the_tail() -> None:
    """logsumexp over the tail changes by mean·δ, which is what regularizers use."""
    generator = torch.Generator().manual_seed(1)
    head = LmHead(torch.randn(50, 6, generator=generator), softcap=3.0)
    states = torch.randn(9, 6, generator=generator)
    found = statistics_of(head, states, torch.zeros(9, dtype=torch.long), 4, tail_mean=True)
    assert found.tail_mean is not None
    out = torch.zeros(9, 50, dtype=torch.bool).scatter(1, found.top_ids.long(), True)
    out[:, 0] = True

    def tails(h: torch.Tensor) -> torch.Tensor:
        z = 3 * torch.tanh(h @ head.weight.double().T / 3)
        return z.masked_fill(out, -torch.inf).logsumexp(1)

    delta = 1e-3 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    moved = tails(states.double() + delta) - tails(states.double())
    predicted = (found.tail_mean.double() * delta).sum(1)
    assert (moved - predicted).abs().max() < 0.01 * moved.abs().max()


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 300])
@pytest.mark.parametrize("vocabulary", [7, 60_000])
def test_statistics_in_chunks_equal_full_logits(rows: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    head = LmHead(torch.randn(vocabulary, 8), torch.randn(vocabulary), scale=0.5, softcap=4.0)
    states, targets = torch.randn(rows, 8), torch.randint(0, vocabulary, (rows,))
    found = statistics_of(head, states, targets, top_k=9)
    logits = 4 * torch.tanh(0.5 * (states @ head.weight.T + head.bias) / 4)
    k = min(9, vocabulary)
    assert torch.allclose(found.target_logit, logits[torch.arange(rows), targets], atol=1e-5)
    assert torch.allclose(found.logsumexp, logits.logsumexp(1), atol=1e-5)
    assert torch.allclose(found.top_logits, logits.topk(k).values, atol=1e-5)
    assert torch.allclose(logits.gather(1, found.top_ids.long()), found.top_logits, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [60, 60_000])
def test_largest_logits_of_some_rows_equal_those_computed_for_all(vocabulary: int) -> None:
    torch.manual_seed(0)
    head = LmHead(torch.randn(vocabulary, 8), softcap=4.0)
    states, targets = torch.randn(300, 8), torch.randint(0, vocabulary, (300,))
    among = np.array([0, 3, 255, 256, 263, 299])
    every = statistics_of(head, states, targets, 5, tail_mean=True)
    found = statistics_of(head, states, targets, 5, tail_mean=True, among=among)
    assert torch.equal(found.logsumexp, every.logsumexp[among])
    assert torch.equal(found.top_ids, every.top_ids[among])
    assert torch.equal(found.top_logits, every.top_logits[among])
    assert every.tail_mean is not None
    assert torch.allclose(found.tail_mean, every.tail_mean[among], atol=1e-6)


def test_logits_beyond_the_range_of_exp_are_handled() -> None:
    head = LmHead(torch.eye(3) * 1000)
    found = statistics_of(head, torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([1]))
    assert found.logsumexp.tolist() == [1000.0]
    assert found.target_logit.tolist() == [-1000.0]
    assert found.top_ids.shape == (1, 0)


def test_statistics_of_nothing_are_empty() -> None:
    nothing = torch.empty(0, 3), torch.empty(0, dtype=torch.long)
    found = statistics_of(LmHead(torch.eye(3)), *nothing, 2)
    assert found.logsumexp.shape == (0,)
    assert found.tail_mean is None
    assert found.top_logits.shape == (0, 2)
    found = statistics_of(LmHead(torch.eye(3)), *nothing, tail_mean=True)
    assert found.tail_mean.shape == (0, 3)
