"""Reliability diagrams against scikit-learn's calibration curve and closed forms."""

import numpy as np
import polars as pl
import pytest
from scipy.special import expit
from sklearn.calibration import calibration_curve

from embrm.metrics.accuracy import EvaluationSplit
from embrm.metrics.calibration import BINS
from embrm.metrics.reliability import FEW, reliability

MEMBERS = pl.DataFrame(
    schema={"response": pl.Int64, "prompt_id": pl.String, "subset": pl.String, "gold": pl.Float64}
)


def split_of(pairs: int, per_prompt: int = 4, **columns: object) -> EvaluationSplit:
    """A split whose pair i has the responses 2i and 2i + 1."""
    table = pl.DataFrame(
        {
            "chosen": [2 * pair for pair in range(pairs)],
            "rejected": [2 * pair + 1 for pair in range(pairs)],
            "prompt_id": [f"prompt {pair // per_prompt}" for pair in range(pairs)],
            "subset": pl.Series([None] * pairs, dtype=pl.String),
            "label": [1.0] * pairs,
            "weight": [1.0] * pairs,
            **columns,
        }
    )
    return EvaluationSplit.of(table, MEMBERS, np.ones(2 * pairs, np.int32))


def rewards_of(margins: np.ndarray) -> np.ndarray:
    return np.stack([margins, np.zeros_like(margins)], axis=1).ravel().astype(np.float32)[None]


def test_bins_are_those_of_scikit_learn_and_sum_to_the_calibration_error() -> None:
    margins = np.random.default_rng(0).normal(0.4, 1.5, 2000).astype(np.float32)
    split, rewards = split_of(2000), rewards_of(margins)
    for temperature in (1.0, 0.5, 3.0):
        found = reliability(split, rewards, np.array([temperature]))
        sure = expit(np.abs(margins.astype(np.float64)) / temperature)
        # scikit-learn's bins cover [0, 1]; the preferred response is never below ½.
        observed, predicted = calibration_curve(margins > 0, sure, n_bins=2 * BINS)
        assert found["observed"].to_numpy() == pytest.approx(observed, abs=1e-7)
        assert found["predicted"].to_numpy() == pytest.approx(predicted)
        assert found["pairs"].sum() == 2000
        assert (found["predicted"] >= found["lowest"]).all()
        assert (found["predicted"] <= found["highest"]).all()
        gaps = found["pairs"] * (found["observed"] - found["predicted"]).abs()
        metrics, _ = split.evaluate(rewards[0], temperature)
        assert gaps.sum() / 2000 == pytest.approx(metrics["ece_calibrated"], abs=1e-7)


def test_labels_weights_and_ties_have_closed_forms() -> None:
    """Two pairs in one bin: one of weight 3 whose label says 80 %, ranked the other way round, and
    a tie alone in another."""
    margins = np.array([-1.0, 1.0, 0.0])
    split = split_of(3, label=[0.8, 1.0, 1.0], weight=[3.0, 1.0, 1.0])
    tie, sure = reliability(split, rewards_of(margins), np.ones(1)).to_dicts()
    assert (tie["bin"], tie["predicted"], tie["observed"], tie["pairs"]) == (0, 0.5, 0.5, 1)
    assert sure["predicted"] == pytest.approx(expit(1.0))
    assert sure["observed"] == pytest.approx((3 * 0.2 + 1) / 4, abs=1e-7)
    assert sure["low"] is None


def test_intervals_are_over_prompts() -> None:
    """Four equal pairs per prompt, or four equal seeds, give the intervals of one."""
    margins = np.random.default_rng(1).normal(0.3, 1.0, 600)
    once = reliability(split_of(600, 1), rewards_of(margins), np.ones(1))
    pairs = reliability(split_of(2400, 4), rewards_of(np.repeat(margins, 4)), np.ones(1))
    seeds = reliability(split_of(600, 1), np.repeat(rewards_of(margins), 4, 0), np.ones(4))
    columns = ["prompts", "predicted", "observed", "low", "high"]
    for same in (pairs, seeds):
        for column in columns:
            assert same[column].to_list() == pytest.approx(once[column].to_list()), column
    assert pairs["pairs"].to_list() == (4 * once["pairs"]).to_list()
    assert seeds["pairs"].to_list() == once["pairs"].to_list()
    wide = once.drop_nulls("low")
    assert ((wide["low"] < wide["observed"]) & (wide["observed"] < wide["high"])).all()
    deviation = (wide["observed"] * (1 - wide["observed"]) / wide["prompts"]).sqrt()
    ratio = (wide["high"] - wide["low"]) / (2 * 1.96 * deviation)
    large = ratio.filter(wide["prompts"] > 40)
    assert large.len() > 3
    assert large.is_between(0.85, 1.15).all()


def test_few_prompts_or_no_mistake_have_no_interval() -> None:
    sure = np.array([2.0] * 9 + [-2.0])  # one bin
    for pairs, interval in ((FEW, True), (FEW - 1, False)):
        row = reliability(split_of(pairs, 1), rewards_of(sure[-pairs:]), np.ones(1)).row(
            0, named=True
        )
        assert row["prompts"] == pairs
        assert (row["low"] is not None) == interval
    right = reliability(split_of(50, 1), rewards_of(np.full(50, 2.0)), np.ones(1))
    assert right.select("observed", "low", "high").rows() == [(1.0, None, None)]
