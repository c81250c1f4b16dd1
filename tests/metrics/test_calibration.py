"""Temperature and expected calibration error against closed forms and a grid."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from embrm.metrics.calibration import expected_calibration_error, fit_temperature


def ece(
    margins: np.ndarray,
    temperature: float = 1.0,
    bins: int = 15,
    weights: np.ndarray | None = None,
) -> float:
    """With hard labels."""
    weights = np.ones(len(margins)) if weights is None else weights
    correct = weights * np.where(margins == 0, 0.5, margins > 0)
    confidence = expit(np.abs(margins) / temperature)
    return expected_calibration_error(confidence, correct, weights, bins)


def test_two_margins_have_a_closed_form() -> None:
    """Three of four pairs right at |Δ| = 2: sigmoid(2/T) must be 3/4."""
    assert fit_temperature(np.array([2.0, 2.0, 2.0, -2.0])) == pytest.approx(2 / np.log(3))


def test_calibrated_margins_need_no_temperature() -> None:
    generator = np.random.default_rng(0)
    size = generator.gamma(2.0, size=200_000)
    margins = np.where(generator.random(size.size) < expit(size), size, -size)
    assert fit_temperature(margins) == pytest.approx(1.0, abs=0.02)
    assert fit_temperature(7 * margins) == pytest.approx(7.0, abs=0.14)
    assert ece(margins) < 0.01
    assert ece(7 * margins) > 0.1
    assert ece(7 * margins, temperature=7.0) < 0.01


def test_equals_logistic_regression_on_the_margin() -> None:
    generator = np.random.default_rng(1)
    margins = generator.normal(0.4, 1.3, size=500)
    both = np.concatenate([margins, -margins])[:, None]
    outcome = np.repeat([1, 0], 500)
    oracle = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(both, outcome)
    assert fit_temperature(margins) == pytest.approx(1 / oracle.coef_[0, 0], rel=1e-5)


@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=40).filter(
        lambda values: min(values) < -1 and sum(values) > 2
    ),
    st.floats(1e-3, 1e3),
)
@settings(max_examples=60, deadline=None)
def test_scales_with_the_margins_and_beats_its_neighbours(values: list[float], c: float) -> None:
    margins = np.array(values)
    temperature = fit_temperature(margins)
    assert fit_temperature(c * margins) == pytest.approx(c * temperature, rel=1e-6)

    def loss(at: float) -> float:
        return float(np.logaddexp(0, -margins / at).mean())

    assert loss(temperature) <= min(loss(0.98 * temperature), loss(1.02 * temperature)) + 1e-12


@pytest.mark.parametrize("scale", [1e-160, 1e-30, 1.0, 1e30])
def test_margins_without_a_minimum_have_no_temperature(scale: float) -> None:
    right = scale * np.array([1.0, 2.0, 0.5])
    assert np.isnan(fit_temperature(right))
    assert np.isnan(fit_temperature(-right))
    assert np.isnan(fit_temperature(np.array([scale, -scale])))
    assert np.isfinite(fit_temperature(scale * np.array([1.0, 2.0, -0.5])))


def test_no_margins_have_no_temperature() -> None:
    assert np.isnan(fit_temperature(np.zeros(4)))
    assert np.isnan(fit_temperature(np.array([])))
    assert np.isnan(fit_temperature(np.array([3.0, 0.0]), weights=np.array([0.0, 1.0])))


def test_weights_count_like_copies() -> None:
    margins, weights = np.array([2.0, -1.0, 0.3]), np.array([3.0, 1.0, 2.0])
    copies = np.repeat(margins, [3, 1, 2])
    assert fit_temperature(margins, weights) == pytest.approx(fit_temperature(copies))
    assert ece(margins, weights=weights) == pytest.approx(ece(copies))


def test_calibration_error_of_one_bin_by_hand() -> None:
    """Confidence 0.75 and half of the pairs right: the gap is 1/4."""
    margin = np.log(3)
    assert ece(np.array([margin, -margin])) == pytest.approx(0.25)


def test_calibration_error_against_a_loop() -> None:
    generator = np.random.default_rng(2)
    margins = generator.normal(0.5, 2, size=400)
    confidence = expit(np.abs(margins))
    expected = 0.0
    edges = np.linspace(0.5, 1.0, 11)
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            gap = (margins[inside] > 0).mean() - confidence[inside].mean()
            expected += inside.mean() * abs(gap)
    assert ece(margins, bins=10) == pytest.approx(expected)


def test_confidence_1_is_in_the_last_bin() -> None:
    assert ece(np.array([1e6, 1e6])) == 0.0
    assert ece(np.array([1e6, -1e6])) == pytest.approx(0.5)


def test_ties_are_perfectly_calibrated() -> None:
    assert ece(np.zeros(9)) == 0.0


def test_no_pairs_have_no_calibration_error() -> None:
    assert np.isnan(ece(np.array([])))
