"""Tests of the LM head: slopes, the inverse of soft-capping, and changes of logits."""

import pytest
import torch

from embrm.lm.head import LmHead


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_slopes_are_derivatives_and_capping_can_be_undone(softcap: float | None) -> None:
    head = LmHead(torch.eye(9), scale=1.3, softcap=softcap)
    h = torch.linspace(-2, 2, 9)[None]
    z = head.logits(h)
    torch.testing.assert_close(head.uncapped(z), 1.3 * h, rtol=1e-4, atol=1e-5)
    leaf = torch.zeros(1, 9, requires_grad=True)
    changes = head.changes(head.uncapped(z), leaf)
    (slopes,) = torch.autograd.grad(changes.sum(), leaf)
    torch.testing.assert_close(head.slopes_of_uncapped(head.uncapped(z)), slopes)
    torch.testing.assert_close(torch.as_tensor(head.slopes(z)).expand(1, 9), slopes)
    moved = head.logits(h + 0.5) - z
    torch.testing.assert_close(head.changes(head.uncapped(z), torch.full((1, 9), 0.5)), moved,
                               rtol=1e-3, atol=1e-5)  # fmt: skip


def test_logits_at_their_cap_stay_finite() -> None:
    head = LmHead(torch.eye(2), softcap=30.0)
    uncapped = head.uncapped(torch.tensor([[30.0, -30.0]]))
    assert uncapped.isfinite().all()
    leaf = torch.full((1, 2), 5.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(head.changes(uncapped, leaf).sum(), leaf)
    assert gradient.isfinite().all()
