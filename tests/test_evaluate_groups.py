"""Kendall's tau-b against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from embrm.evaluate.groups import kendall_tau, kendall_taus

few_values = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=25)


@given(few_values)
@settings(max_examples=150, deadline=None)
def test_equals_scipy_with_many_ties(points: list[tuple[int, int]]) -> None:
    rewards, gold = np.array(points, dtype=np.float64).T
    with np.errstate(all="ignore"):
        oracle = kendalltau(rewards, gold).statistic
    assert kendall_tau(rewards, gold) == pytest.approx(oracle, nan_ok=True, abs=1e-12)


def test_closed_forms() -> None:
    up = np.arange(5.0)
    assert kendall_tau(up, 10 * up) == 1.0
    assert kendall_tau(up, -up) == -1.0
    # one tie in one ranking: (5 - 0) / sqrt(6 * 5)
    assert kendall_tau(np.array([0.0, 1, 2, 2]), np.arange(4.0)) == pytest.approx(5 / np.sqrt(30))


def test_undefined_is_nan() -> None:
    assert np.isnan(kendall_tau(np.array([1.0]), np.array([2.0])))
    assert np.isnan(kendall_tau(np.ones(3), np.arange(3.0)))
    assert np.isnan(kendall_tau(np.array([]), np.array([])))


def test_groups_are_told_apart_in_any_order() -> None:
    generator = np.random.default_rng(0)
    rewards, gold = generator.normal(size=(2, 300))
    groups = generator.integers(0, 12, size=300)
    groups[groups == 5] = 6  # group 5 is empty
    taus = kendall_taus(rewards, gold, groups, 12)
    for group in range(12):
        inside = groups == group
        oracle = kendalltau(rewards[inside], gold[inside]).statistic if inside.any() else np.nan
        assert taus[group] == pytest.approx(oracle, nan_ok=True)
    order = generator.permutation(300)
    np.testing.assert_array_equal(
        taus, kendall_taus(rewards[order], gold[order], groups[order], 12)
    )


def test_no_groups() -> None:
    empty = np.array([])
    assert kendall_taus(empty, empty, np.array([], dtype=np.int64), 0).shape == (0,)
    assert np.isnan(kendall_taus(empty, empty, np.array([], dtype=np.int64), 2)).all()
