"""Best of n against enumeration, sampling and exact arithmetic."""

from decimal import Decimal, getcontext
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.metrics.best_of_n import Ranking, gao_fit, kl_bound, kl_estimate, weights

pools = st.lists(st.tuples(st.integers(-2, 2), st.integers(-9, 9)), min_size=1, max_size=8)


def arrays(points: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    proxy, gold = np.array(points, dtype=np.float64).T
    return proxy, gold


def enumerated(proxy: np.ndarray, gold: np.ndarray, n: int) -> float:
    """Mean over all subsets of n of the gold of the best, ties averaged."""
    taken = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[list(subset)])
        taken.append(np.mean([gold[i] for i in subset if proxy[i] == best]))
    return float(np.mean(taken))


@given(pools)
@settings(max_examples=200, deadline=None)
def test_equals_enumeration_of_all_subsets_with_ties(points: list[tuple[int, int]]) -> None:
    proxy, gold = arrays(points)
    ns = range(1, len(points) + 1)
    ranking = Ranking.by(proxy)
    assert ranking.expected(gold, ns) == pytest.approx(
        [enumerated(proxy, gold, n) for n in ns], abs=1e-12
    )
    assert ranking.expected_proxy(ns) == pytest.approx(
        [enumerated(proxy, proxy, n) for n in ns], abs=1e-12
    )


def test_agrees_with_sampling() -> None:
    generator = np.random.default_rng(0)
    gold = generator.standard_normal(40)
    proxy = (gold + 2 * generator.standard_normal(40)).round(1)
    found = Ranking.by(proxy).expected(gold, (3, 12))
    for n, expected in zip((3, 12), found, strict=True):
        drawn = generator.permuted(np.tile(np.arange(40), (40_000, 1)), axis=1)[:, :n]
        best = drawn[np.arange(len(drawn)), proxy[drawn].argmax(axis=1)]
        error = gold[best].std() / np.sqrt(len(drawn))
        assert abs(gold[best].mean() - expected) < 4 * error


@given(pools)
@settings(max_examples=100, deadline=None)
def test_best_of_1_is_the_mean_and_best_of_all_is_the_highest_block(
    points: list[tuple[int, int]],
) -> None:
    proxy, gold = arrays(points)
    first, last = Ranking.by(proxy).expected(gold, (1, len(points)))
    assert first == pytest.approx(gold.mean(), abs=1e-12)
    assert last == pytest.approx(gold[proxy == proxy.max()].mean(), abs=1e-12)


@given(pools)
@settings(max_examples=100, deadline=None)
def test_only_the_order_of_the_proxy_matters(points: list[tuple[int, int]]) -> None:
    proxy, gold = arrays(points)
    ns = range(1, len(points) + 1)
    found = Ranking.by(proxy).expected(gold, ns)
    np.testing.assert_allclose(Ranking.by(np.exp(proxy) - 7).expected(gold, ns), found, atol=1e-12)
    # With gold as the proxy the curve cannot fall, and no other proxy is better.
    ideal = Ranking.by(gold).expected(gold, ns)
    assert (np.diff(ideal) >= -1e-12).all()
    assert (ideal >= found - 1e-12).all()


@pytest.mark.parametrize("size", [1, 2, 7, 40, 500, 3000])
def test_weights_are_the_binomial_ratios_at_any_size(size: int) -> None:
    ns = sorted({1, min(2, size), min(16, size), max(1, size // 2), size})
    found = weights(size, ns)
    assert found.sum(axis=0) == pytest.approx(np.ones(len(ns)), abs=1e-11)
    for column, n in zip(found.T, ns, strict=True):
        for rank in {1, n, (n + size) // 2, size - 1 or 1, size}:
            exact = Fraction(comb(rank - 1, n - 1), comb(size, n))
            assert column[rank - 1] == pytest.approx(float(exact), rel=1e-10, abs=1e-300)


def test_pools_and_heads_are_independent() -> None:
    generator = np.random.default_rng(1)
    proxy = generator.integers(0, 6, (3, 5, 9)).astype(np.float32)
    proxy[1, 2] = np.arange(9)  # one without ties
    gold = generator.standard_normal((5, 9))
    found = Ranking.by(proxy).expected(gold, (1, 4, 9))
    assert found.shape == (3, 5, 3)
    for head in range(3):
        for pool in range(5):
            alone = Ranking.by(proxy[head, pool]).expected(gold[pool], (1, 4, 9))
            np.testing.assert_allclose(found[head, pool], alone, rtol=1e-12)


def test_zeros_of_both_signs_tie() -> None:
    ranking = Ranking.by(np.array([0.0, -0.0, -1.0], dtype=np.float32))
    assert ranking.expected(np.array([1.0, 3.0, 9.0]), (3,)) == pytest.approx([2.0])


def test_impossible_n_and_rewards_that_are_not_finite_are_refused() -> None:
    ranking = Ranking.by(np.zeros(5))
    with pytest.raises(UserError, match=r"n = 6: choose 1 to 5, the pools have 5 responses"):
        ranking.expected(np.zeros(5), (1, 6))
    with pytest.raises(UserError, match="n = 0"):
        ranking.expected_proxy((0,))
    with pytest.raises(UserError, match="2 of 4 rewards are not finite"):
        Ranking.by(np.array([[0.0, np.nan], [np.inf, 1.0]]))


def exact_estimate(n: int, S: Decimal) -> Decimal:
    """The published formula in 80 digits."""
    epsilon = S.exp()
    q = (1 - epsilon) ** n
    size = Decimal(n)
    inside = size.ln() + (n - 1) * (1 - epsilon).ln() - (size - 1) / size
    return q * inside + (1 - q) * ((1 - q) / epsilon).ln()


@pytest.mark.parametrize("n", [1, 2, 4, 37, 512])
def test_the_divergence_equals_the_formula_in_exact_arithmetic(n: int) -> None:
    getcontext().prec = 80
    S = np.array([-1e-6, -0.01, -0.3, -1.0, -3.0, -9.0, -20.0, -40.0, -60.0])
    exact = [float(exact_estimate(n, Decimal(float(one)))) for one in S]
    np.testing.assert_allclose(kl_estimate(n, S), exact, atol=2e-15 * n, rtol=1e-13)


@pytest.mark.parametrize("n", [1, 2, 37, 512])
def test_limits_of_the_divergence(n: int) -> None:
    [bound] = kl_bound((n,))
    likely = np.array([0.0, 1e-12])  # of S, rounding may leave a little above 0
    np.testing.assert_array_equal(kl_estimate(n, likely), 0.0)
    unlikely = np.array([-50.0, -300.0, -744.0, -746.0, -1e5])
    np.testing.assert_allclose(kl_estimate(n, unlikely), bound, rtol=1e-13, atol=1e-15)
    everywhere = kl_estimate(n, np.linspace(-60, 0, 500))
    assert (everywhere >= 0).all()
    assert (everywhere <= bound + 1e-12).all()


def test_the_divergence_of_two_equal_responses() -> None:
    """The best of n of a policy with two equally likely responses: 1 - 2^-n has the better one."""
    for n in (1, 2, 5, 30):
        top = 1 - 0.5**n
        truth = top * np.log(2 * top) + (1 - top) * np.log(2 * (1 - top))
        [estimate] = kl_estimate(n, np.log([0.5]))
        assert estimate <= kl_bound((n,))[0] + 1e-15
        assert estimate == pytest.approx(truth, abs=0.12)


@given(st.floats(-3, 3), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_the_fit_recovers_its_own_curve(alpha: float, beta: float) -> None:
    ns = (1, 2, 4, 8, 16, 32)
    d = np.sqrt(kl_bound(ns))
    fit = gao_fit(ns, np.stack([d * (alpha - beta * d), np.zeros(6)]))
    assert fit.alpha == pytest.approx([alpha, 0], abs=1e-12)
    assert fit.beta == pytest.approx([beta, 0], abs=1e-12)
    grid = np.linspace(0, d[-1], 20_001)
    curve = grid * (alpha - beta * grid)
    assert fit.drop(d[-1])[0] == pytest.approx(curve.max() - curve[-1], abs=1e-7)
    if alpha > 1e-3 and beta > 1e-3:
        assert fit.peak[0] == pytest.approx(alpha / (2 * beta))


def test_the_fit_without_a_peak_or_without_points() -> None:
    d = np.sqrt(kl_bound((1, 2, 4)))
    assert np.isnan(gao_fit((1, 2, 4), d * (1 + d)).peak)
    assert np.isnan(gao_fit((1, 2, 4), -d).peak)
    short = gao_fit((1, 2, 2), np.zeros((3, 3)))
    assert short.alpha.shape == (3,)
    assert np.isnan(short.alpha).all()
    assert np.isnan(short.drop(1.0)).all()
    assert gao_fit((2, 4), np.sqrt(kl_bound((2, 4)))).alpha == pytest.approx(1)


def test_noise_is_averaged_out_of_the_fit() -> None:
    generator = np.random.default_rng(2)
    ns = (1, 2, 4, 8, 16, 32, 64, 128)
    d = np.sqrt(kl_bound(ns))
    fit = gao_fit(ns, d * (1.2 - 0.4 * d) + 0.05 * generator.standard_normal((4000, 8)))
    assert fit.alpha.mean() == pytest.approx(1.2, abs=0.005)
    assert fit.beta.mean() == pytest.approx(0.4, abs=0.005)
