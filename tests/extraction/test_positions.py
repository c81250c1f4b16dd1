"""Tests of sampled positions: distinct, sorted, equally likely, and independent of other rows."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrm.extraction import positions
from embrm.extraction.positions import PositionsRule, predicting_positions, token_positions


@given(
    n_prompt=st.integers(0, 50),
    n_response=st.integers(1, 80),
    k=st.integers(0, 20),
    seed=st.integers(0, 9),
    rule=st.sampled_from(get_args(PositionsRule)),
)
@settings(max_examples=200, deadline=None)
def test_drawn_positions_are_distinct_sorted_and_predict_the_response(
    n_prompt: int, n_response: int, k: int, seed: int, rule: PositionsRule
) -> None:
    length = n_prompt + n_response
    drawn = token_positions("id", n_prompt, length, k, seed, rule)
    allowed = predicting_positions(n_prompt, length)
    assert len(drawn) == min(k, len(allowed))
    assert all(position in allowed for position in drawn)
    assert (np.diff(drawn) > 0).all()
    assert (drawn == token_positions("id", n_prompt, length, k, seed, rule)).all()
    if rule == "spaced" and len(drawn) == k > 0:
        n = len(allowed)
        assert set(np.diff(drawn)) <= {n // k, -(-n // k)}
        assert drawn[0] - allowed.start < n / k
        assert allowed.stop - drawn[-1] <= -(-n // k)


def test_drawn_positions_depend_on_seed_and_id_and_are_uniform() -> None:
    draws = np.array([token_positions(str(i), 10, 30, 4, 0) for i in range(4000)])
    counts = np.bincount(draws.ravel(), minlength=30)
    assert counts[:9].sum() == 0
    assert counts[29] == 0
    # 20 positions, 4 of 20 drawn: 800 expected each, standard deviation 25.
    assert np.abs(counts[9:29] - 800).max() < 5 * 25
    assert (draws[0] != token_positions("0", 10, 30, 4, 1)).any()


@pytest.mark.parametrize(("n", "k"), [(20, 4), (23, 5), (7, 6), (100, 8), (9, 1)])
def test_every_position_is_equally_likely_under_the_spaced_rule(
    n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 2^64 raw draws fall into n equal intervals, and k of the n select a given position."""
    counts = np.zeros(n, int)
    for i in range(n):
        samples = []
        for raw in (-(-(i << 64) // n), -(-(i + 1 << 64) // n) - 1):  # an interval's two ends
            stream = SimpleNamespace(random_raw=lambda raw=raw: raw)
            monkeypatch.setattr(positions, "raw_words", lambda _, stream=stream: stream)
            samples.append(token_positions("id", 1, n + 1, k, 0, "spaced").tolist())
        assert samples[0] == samples[1]
        assert len(samples[0]) == k
        counts[samples[0]] += 1
    assert (counts == k).all()


def test_spaced_positions_depend_on_seed_and_id_and_are_uniform() -> None:
    draws = np.array([token_positions(str(i), 10, 30, 3, 0, "spaced") for i in range(4000)])
    counts = np.bincount(draws.ravel(), minlength=30)
    assert counts.sum() == counts[9:29].sum() == 12_000
    # 20 positions, 3 of 20 drawn: 600 expected each, standard deviation 23.
    assert np.abs(counts[9:29] - 600).max() < 5 * 23
    seeds = [token_positions("0", 10, 30, 3, seed, "spaced").tolist() for seed in range(9)]
    assert any(drawn != seeds[0] for drawn in seeds)


@pytest.mark.parametrize(
    ("rule", "drawn"), [("random", [9, 10, 19, 26]), ("spaced", [10, 15, 20, 25])]
)
def test_drawn_positions_equal_golden_values(rule: PositionsRule, drawn: list[int]) -> None:
    """A cache can be resumed by a later version, so the random streams must never change."""
    assert token_positions("0123456789abcdef", 10, 30, 4, 7, rule).tolist() == drawn
