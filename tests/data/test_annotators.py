"""Tests of simulated annotators: published error rates, and one draw shared by all qualities."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from embrm.data.annotators import annotate, win_probability

PAIRS = 20_000


def _pairs(scale: float = 1.0) -> pl.DataFrame:
    """Pairs of responses with Gaussian gold scores, the better one chosen."""
    gold = np.random.default_rng(0).standard_normal((2, PAIRS)) * scale
    ids = [f"{number:016x}" for number in range(PAIRS)]
    return pl.DataFrame({"pair_id": ids, "margin": np.abs(gold[0] - gold[1])})


@pytest.mark.parametrize(
    ("quality", "error"),
    [(0.1, 0.47), (0.5, 0.37), (1, 0.275), (3, 0.12), (5, 0.076), (10, 0.039)],
)
def test_error_rates_of_gaussian_gold(quality: float, error: float) -> None:
    """The rates of arXiv 2502.04357 for unit variance hold at any scale of gold."""
    for scale in (1.0, 50.0):
        labels = annotate(_pairs(scale), scale, quality, seed=0)
        # Three standard deviations of the sample mean, plus the rounding of the published rates.
        assert (labels["label"] == 0).mean() == pytest.approx(error, abs=0.011 + 0.003)


def test_expected_error_by_quadrature() -> None:
    """E[sigmoid(-q|d|)] over d ~ N(0, 2), the difference of two unit Gaussians."""
    published = {0.1: 0.47, 0.5: 0.37, 1: 0.275, 3: 0.12, 5: 0.076, 10: 0.039}
    for quality, error in published.items():

        def wrong(d: float, quality: float = quality) -> float:
            return 2 * win_probability(-d, 1.0, quality) * norm.pdf(d, scale=2**0.5)

        assert quad(wrong, 0, np.inf)[0] == pytest.approx(error, abs=0.0025)


@given(st.floats(0, 5), st.floats(5, 20))
def test_errors_of_a_better_annotator_are_a_subset_of_a_worse_ones(low: float, high: float) -> None:
    pairs = _pairs().head(300)
    worse, better = (annotate(pairs, 1.0, quality, seed=3)["label"] for quality in (low, high))
    assert ((better == 0) <= (worse == 0)).all()


def test_draws_depend_only_on_the_pair_and_the_seed() -> None:
    pairs = _pairs().head(500)
    whole = dict(annotate(pairs, 1.0, 1, seed=0).rows())
    some = annotate(pairs.reverse().head(100), 1.0, 1, seed=0)
    assert dict(some.rows()).items() <= whole.items()
    assert dict(annotate(pairs, 1.0, 1, seed=1).rows()) != whole
    assert 0.4 < np.mean([*annotate(pairs, 1.0, 0, seed=0)["label"]]) < 0.6
