"""Tests of log-probabilities in blocks: equal to the direct computation, in bounded memory."""

import pytest
import torch
from torch import Tensor

from embrm.lm import likelihood
from embrm.lm.head import LmHead
from embrm.lm.likelihood import log_probabilities

ROWS, WIDTH, VOCABULARY = 150, 12, 90


def _naive(
    states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, head: LmHead
) -> Tensor:
    logits = states @ weight.T + (0 if bias is None else bias)
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_direct_computation(
    softcap: float | None, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "_LOGIT_BYTES", {"cpu": 0})  # several blocks
    random = torch.Generator().manual_seed(0)
    states = torch.randn(ROWS, WIDTH, generator=random, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=random, requires_grad=True) if with_bias else None
    targets = torch.randint(VOCABULARY, (ROWS,), generator=random)
    outer = torch.randn(ROWS, generator=random)
    head = LmHead(weight, bias, scale=0.7, softcap=softcap)
    leaves = [leaf for leaf in (states, weight, bias) if leaf is not None]
    found = log_probabilities(head, states, targets)
    gradients = torch.autograd.grad((found * outer).sum(), leaves)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = _naive(wide[0], targets, wide[1], wide[2] if with_bias else None, head)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    naive = torch.autograd.grad((expected * outer.double()).sum(), wide)
    for one, other in zip(gradients, naive, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_at_most_one_block_of_logits_is_in_memory_and_none_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(likelihood, "_LOGIT_BYTES", {"cpu": 0})
    sizes, kept = [], []
    logits = LmHead.logits

    def watched(head: LmHead, states: Tensor) -> Tensor:
        sizes.append(len(states))
        return logits(head, states)

    monkeypatch.setattr(LmHead, "logits", watched)
    states = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = log_probabilities(LmHead(weight), states, torch.zeros(ROWS, dtype=torch.int64))
    found.sum().backward()
    assert max(sizes) == likelihood._LEAST_ROWS < ROWS
    assert sum(sizes) == 2 * ROWS  # once forward, once backward
    assert max(kept) == states.numel() < ROWS * VOCABULARY


def test_a_frozen_head_gets_no_gradient() -> None:
    states = torch.randn(5, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH)
    log_probabilities(LmHead(weight), states, torch.arange(5)).sum().backward()
    assert states.grad is not None
    assert weight.grad is None


def test_under_autocast_forward_and_backward_compute_in_its_dtype() -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(ROWS, WIDTH, generator=random, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random, requires_grad=True)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=random)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_probabilities(LmHead(weight), states, targets)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found.sum(), [states, weight])
    narrow = [leaf.detach().bfloat16().double().requires_grad_() for leaf in (states, weight)]
    expected = _naive(narrow[0], targets, narrow[1], None, LmHead(weight))
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.05)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), narrow), strict=True):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() < 0.02 * other.norm()
