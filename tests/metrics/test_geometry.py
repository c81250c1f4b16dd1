"""Geometry of states against closed forms and numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrm.metrics.geometry import (
    SAMPLE,
    correlation,
    drift,
    effective_rank,
    norms_and_rank,
    sample,
)


def orthonormal(n: int, width: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    wide = torch.randn(width, n, generator=random, dtype=torch.float64)
    return torch.linalg.qr(wide).Q.T.contiguous()


@pytest.mark.parametrize(("n", "width"), [(7, 7), (5, 11), (1, 4)])
def test_orthonormal_states_have_full_rank(n: int, width: int) -> None:
    states = orthonormal(n, width)
    assert effective_rank(states) == pytest.approx(n, rel=1e-12)
    assert effective_rank(torch.cat([states, states])) == pytest.approx(n, rel=1e-6)
    found = norms_and_rank(states)
    assert found["norm"] == pytest.approx(1)
    assert found["norm_sd"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "width"), [(300, 20), (20, 300)])
def test_rank_one_states_have_rank_one_and_their_factors_norms(n: int, width: int) -> None:
    factors = torch.linspace(0.5, 3, n, dtype=torch.float64)
    direction = torch.full((width,), width**-0.5, dtype=torch.float64)
    found = norms_and_rank(torch.outer(factors, direction))
    assert found["effective_rank"] == pytest.approx(1, abs=1e-6)
    assert found["norm"] == pytest.approx(factors.mean().item())
    assert found["norm_sd"] == pytest.approx(factors.numpy().std())


def test_the_effective_rank_is_that_of_the_singular_values() -> None:
    random = np.random.default_rng(3)
    states = random.standard_normal((40, 9)) @ random.standard_normal((9, 25))
    values = np.linalg.svd(states, compute_uv=False)[:9]
    p = values / values.sum()
    expected = math.exp(-(p * np.log(p)).sum())
    assert effective_rank(torch.from_numpy(states)) == pytest.approx(expected, rel=1e-9)


def test_scale_changes_norms_and_neither_cv_nor_rank() -> None:
    states = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    one, four = norms_and_rank(states), norms_and_rank(4 * states)
    assert four["norm"] == 4 * one["norm"]
    assert four["norm_sd"] == 4 * one["norm_sd"]
    assert four["norm_cv"] == one["norm_cv"] > 0
    assert four["effective_rank"] == pytest.approx(one["effective_rank"], rel=1e-12)


def test_a_common_mean_lowers_the_rank() -> None:
    states = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
    assert effective_rank(states + 30) < effective_rank(states) - 2


def test_zero_states_have_no_rank_and_no_cv() -> None:
    assert math.isnan(norms_and_rank(torch.zeros(3, 4))["effective_rank"])
    assert math.isnan(norms_and_rank(torch.zeros(3, 4))["norm_cv"])


def test_drift_is_relative_to_every_state() -> None:
    before = torch.diag(torch.tensor([1.0, 2.0, 10.0]))
    after = before.clone()
    after[0, 1], after[2, 0] = 0.5, 1.0
    assert drift(before, after) == pytest.approx((0.5 + 0 + 0.1) / 3)
    assert drift(before, before) == 0
    assert drift(before, 3 * before) == pytest.approx(2)


@given(seed=st.integers(0, 1000), n=st.integers(3, 40))
def test_correlation_is_numpys(seed: int, n: int) -> None:
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    y = x + noise
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert correlation(x, -3 * x + 5) == pytest.approx(-1)
    missing = y.copy()
    missing[0] = np.nan
    assert correlation(x, missing) == pytest.approx(correlation(x[1:], y[1:]))


def test_constant_values_have_no_correlation() -> None:
    x = np.arange(5.0)
    assert math.isnan(correlation(x, np.full(5, 0.25)))
    assert math.isnan(correlation(x, np.full(5, np.nan)))
    assert math.isnan(correlation(x[:1], x[:1]))


@given(n=st.integers(0, 3000), step=st.integers(1, 3))
def test_a_sample_takes_one_row_of_every_equal_stretch(n: int, step: int) -> None:
    rows = np.arange(n) * step + 7
    found = sample(rows)
    assert len(found) == min(n, SAMPLE)
    assert np.isin(found, rows).all()
    if n <= SAMPLE:
        assert (found == rows).all()
    else:
        places = np.searchsorted(rows, found)
        ends = np.arange(SAMPLE + 1) * n // SAMPLE
        assert ((ends[:-1] <= places) & (places < ends[1:])).all()


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_sample_does_not_resonate_with_a_period(period: int) -> None:
    """Chosen and rejected responses often alternate."""
    counts = np.bincount(sample(np.arange(16 * SAMPLE)) % period)
    assert counts.min() > 0.9 * SAMPLE / period
