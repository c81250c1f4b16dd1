"""Kendall's tau-b against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from embrm.metrics import groups as module
from embrm.metrics.groups import Rankings


def kendall_taus(
    rewards: np.ndarray, gold: np.ndarray, groups: np.ndarray, count: int
) -> np.ndarray:
    return Rankings.of(np.arange(len(gold)), gold, groups, count).taus(rewards)


def kendall_tau(rewards: np.ndarray, gold: np.ndarray) -> float:
    return kendall_taus(rewards, gold, np.zeros(len(gold), dtype=np.int64), 1)[0]


few_values = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=25)


@given(few_values)
@settings(max_examples=150, deadline=None)
def test_equals_scipy_with_many_ties(points: list[tuple[int, int]]) -> None:
    rewards, gold = np.array(points, dtype=np.float64).T
    with np.errstate(all="ignore"):
        oracle = kendalltau(rewards, gold).statistic
    assert kendall_tau(rewards, gold) == pytest.approx(oracle, nan_ok=True, abs=1e-12)


def test_orders_with_a_known_tau() -> None:
    up = np.arange(5.0)
    assert kendall_tau(up, 10 * up) == 1.0
    assert kendall_tau(up, -up) == -1.0
    # one tie in one ranking: (5 - 0) / sqrt(6 * 5)
    assert kendall_tau(np.array([0.0, 1, 2, 2]), np.arange(4.0)) == pytest.approx(5 / np.sqrt(30))


def test_tau_is_nan_where_undefined() -> None:
    assert np.isnan(kendall_tau(np.array([1.0]), np.array([2.0])))
    assert np.isnan(kendall_tau(np.ones(3), np.arange(3.0)))
    assert np.isnan(kendall_tau(np.array([]), np.array([])))


def test_groups_are_separated_whatever_the_order_of_rows() -> None:
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


@pytest.mark.parametrize("cells", [1, 1 << 16])
def test_groups_of_every_size_equal_scipy(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many groups of one size, single members, one group too large to compare pair by pair."""
    monkeypatch.setattr(module, "_CELLS", cells)
    generator = np.random.default_rng(1)
    sizes = np.array([4] * 30 + [1, 0, 2, 2, 128, 129, 1500])
    groups = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rewards, gold = np.round(generator.normal(size=(2, len(groups))) * 3)
    taus = kendall_taus(rewards, gold, groups, len(sizes))
    for group in range(len(sizes)):
        inside = groups == group
        oracle = np.nan
        if inside.sum() > 1:
            with np.errstate(all="ignore"):
                oracle = kendalltau(rewards[inside], gold[inside]).statistic
        assert taus[group] == pytest.approx(oracle, nan_ok=True, abs=1e-12)
    assert np.isfinite(taus).sum() > 30


def test_a_large_group_by_hand() -> None:
    """1,000 members in order except that the first comes last: 999 of 499,500 pairs disagree."""
    up = np.arange(1000.0)
    assert kendall_tau(np.roll(up, 1), up) == pytest.approx(1 - 2 * 999 / 499_500)
    assert np.isnan(kendall_tau(np.ones(1000), up))


def test_rewards_are_taken_from_the_responses_of_the_group() -> None:
    rankings = Rankings.of(np.array([5, 2, 0]), np.array([1.0, 2.0, 3.0]), np.zeros(3, int), 1)
    assert rankings.taus(np.array([9.0, -7, 8, -7, -7, 7]))[0] == 1.0
