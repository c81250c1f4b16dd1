"""The comparison of an exported folder with its run: distances and orders of rewards."""

from types import SimpleNamespace

import pytest
import torch

from embrm.core.errors import UserError
from embrm.exports.parity import check_parity, reordered


def test_pairs_of_responses_whose_order_is_lost_are_counted() -> None:
    expected = torch.tensor([0.0, 1.0, 2.0, 2.0])
    for found, share in (
        ([0.0, 1.0, 2.0, 3.0], 0),  # a tie of the run's may be broken
        ([0.0, 0.0, 2.0, 2.0], 1 / 5),
        ([1.0, 0.0, 2.0, 2.0], 1 / 5),
        ([3.0, 2.0, 1.0, 1.0], 1),
    ):
        assert reordered(torch.tensor(found), expected) == share
    assert reordered(torch.ones(1), torch.ones(1)) == 0


def _checked(expected: torch.Tensor, dtype: str, offset: float, found: torch.Tensor) -> None:
    """Parity with a folder that gives the rewards `found` to every way of reading."""
    exported = SimpleNamespace(offset=offset, rewards=lambda *_, **__: found)
    rows = list(range(len(expected)))
    prepared = SimpleNamespace(spec=SimpleNamespace(dtype=dtype), encoded=rows)
    check_parity(exported, expected, prepared, rows, 1e-4)


def test_logits_too_coarse_for_the_rewards_are_refused() -> None:
    """All within 5e-2 of the largest |logit|, but bfloat16 has 1/16 between 8 and 16."""
    for spread, fits in ((4.0, True), (0.5, False)):
        expected = torch.linspace(-spread, spread, 100)
        found = (expected + 12).bfloat16().float() - 12
        if fits:
            _checked(expected, "bfloat16", 12.0, found)
            continue
        with pytest.raises(UserError, match=r"reorders .*% of the pairs .* 3%: .*--custom"):
            _checked(expected, "bfloat16", 12.0, found)


def test_an_offset_does_not_widen_the_tolerance_of_float32() -> None:
    expected = torch.linspace(-1, 1, 9)
    _checked(expected, "float32", 100.0, expected + 5e-5)
    with pytest.raises(UserError, match=r"differ by 0\.005 .*more than 0\.0001"):
        _checked(expected, "float32", 100.0, expected + 5e-3)
