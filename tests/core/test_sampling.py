"""Evenly spaced samples of rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrm.core.sampling import evenly_spaced


@given(count=st.integers(1, 10**6), size=st.integers(1, 3000), nearest=st.booleans())
def test_indices_are_distinct_ascending_and_even(count: int, size: int, nearest: bool) -> None:
    rows = evenly_spaced(count, size, nearest=nearest)
    assert len(rows) == min(count, size)
    assert rows[0] == 0
    if len(rows) > 1:
        assert rows[-1] == count - 1
        steps = np.diff(rows)
        assert steps.min() >= 1
        assert steps.max() - steps.min() <= 2


@pytest.mark.parametrize(("nearest", "expected"), [(False, [0, 3, 7]), (True, [0, 4, 7])])
def test_rounding(nearest: bool, expected: list[int]) -> None:
    assert evenly_spaced(8, 3, nearest=nearest).tolist() == expected


def test_nothing_to_choose_from() -> None:
    assert evenly_spaced(0, 5).tolist() == evenly_spaced(5, 0).tolist() == []
