"""Agreement of two rankings: worked cases, comparison with scipy, and simulated coverage."""

import numpy as np
import polars as pl
import pytest
from agreement_world import coverage
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from embrm.metrics.agreement import (
    STATISTICS,
    Stage,
    agreement,
    bias,
    halves,
    intercept,
    kendall,
    ordered,
    regret,
    slope,
    spearman,
)
from embrm.metrics.intervals import Replicates

RANKS = (spearman, kendall, ordered)
INTEGERS = st.integers(-4, 4).map(float)
SIDES = st.integers(2, 7).flatmap(
    lambda n: st.tuples(arrays(float, n, elements=INTEGERS), arrays(float, n, elements=INTEGERS))
)


def stage(
    values: list[float] | np.ndarray,
    names: list[str] | None = None,
    draws: np.ndarray | None = None,
    seeds: np.ndarray | None = None,
) -> Stage:
    """A stage with these values; without `draws` and `seeds` it has no noise."""
    found = np.array(values, dtype=float)
    return Stage(
        names=tuple(names or [f"c{place}" for place in range(len(found))]),
        values=found,
        draws=np.tile(found, (5, 1)) if draws is None else draws,
        seeds=found[None] if seeds is None else seeds,
        prompts=5,
    )


def by_statistic(
    frozen: Stage, full: Stage, baseline: int | None = 0
) -> dict[str, dict[str, object]]:
    table = agreement(frozen, full, baseline)
    assert table["statistic"].to_list() == list(STATISTICS)
    return {row["statistic"]: row for row in table.iter_rows(named=True)}


@settings(deadline=None)
@given(SIDES)
def test_rank_correlations_are_scipys(sides: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = sides
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(spearman(x, y))
        assert np.isnan(kendall(x, y))
        assert np.isnan(ordered(x, y))
        return
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


@settings(deadline=None)
@given(SIDES)
def test_lines_are_scipys(sides: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = sides
    if np.ptp(x) == 0:
        assert np.isnan(slope(x, y))
        return
    line = stats.linregress(x, y)
    assert slope(x, y) == pytest.approx(line.slope, abs=1e-12)
    assert intercept(x, y) == pytest.approx(line.intercept, abs=1e-12)


@settings(deadline=None)
@given(SIDES)
def test_rank_statistics_depend_only_on_ranks(sides: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = sides
    for statistic in RANKS:
        value = statistic(x, y)
        assert np.array_equal(statistic(np.exp(x) - 3, y), value, equal_nan=True)
        assert np.array_equal(statistic(x, y**3 + 2 * y), value, equal_nan=True)
        assert statistic(-x, y) == pytest.approx(
            1 - value if statistic is ordered else -value, nan_ok=True
        )


@settings(deadline=None)
@given(SIDES, st.randoms(use_true_random=False))
def test_the_order_of_configurations_does_not_matter(
    sides: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    x, y = sides
    order = list(range(len(x)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for statistic in (*RANKS, regret, slope, intercept, bias):
        assert statistic(x[order], y[order]) == pytest.approx(statistic(x, y), nan_ok=True)


@settings(deadline=None)
@given(SIDES)
def test_statistics_are_computed_row_by_row(sides: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = sides
    for statistic in (*RANKS, regret, slope, intercept, bias):
        many = statistic(np.stack([y, x]), np.stack([x, y]))
        assert np.array_equal(many[1], statistic(x, y), equal_nan=True)


def test_ordered_leaves_out_pairs_that_tie_in_a_stage() -> None:
    # 0-1 ties in x; 0-2 and 0-3 agree, 1-2 ties in y, 1-3 agrees, 2-3 is the other way round
    assert ordered(np.array([0.0, 0, 2, 3]), np.array([1.0, 4, 4, 3.5])) == 2 / 4


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [([0, 1, 2], 0.0), ([2, 1, 0], 7.0), ([0, 3, 1], 2.0), ([1, 3, 3], 1.0)],
)
def test_regret_is_what_the_frozen_choice_costs(frozen: list[float], expected: float) -> None:
    assert regret(np.array(frozen, float), np.array([1.0, 6, 8])) == expected


@settings(deadline=None)
@given(SIDES)
def test_regret_is_not_negative_and_0_for_equal_ranks(
    sides: tuple[np.ndarray, np.ndarray],
) -> None:
    x, y = sides
    assert regret(x, y) >= 0
    assert regret(x, x) == 0


def test_perfect_agreement() -> None:
    found = by_statistic(stage([0.5, 0.6, 0.7, 0.8]), stage([0.55, 0.65, 0.75, 0.85]))
    for name in ("spearman", "kendall", "ordered", "slope"):
        assert found[name]["value"] == pytest.approx(1)
    for name in ("regret", "intercept", "bias"):
        assert found[name]["value"] == pytest.approx(0)
    assert found["spearman"]["low"] == found["spearman"]["high"] == 1


def test_gains_are_over_the_baseline_which_has_none() -> None:
    frozen, full = stage([0.1, 0.5, 0.2, 0.3]), stage([0.4, 0.4, 0.8, 0.2])
    found = by_statistic(frozen, full, 1)
    x, y = np.array([-0.4, -0.3, -0.2]), np.array([0.0, 0.4, -0.2])
    line = stats.linregress(x, y)
    assert found["slope"]["value"] == pytest.approx(line.slope)
    assert found["intercept"]["value"] == pytest.approx(line.intercept)
    assert found["bias"]["value"] == pytest.approx((x - y).mean())


def test_undefined_statistics_are_null_with_a_reason() -> None:
    few = by_statistic(stage([0.1, 0.2, 0.3, 0.4]), stage([1, 2, 2, 3], ["a", "b", "b", "c"]))
    for name in ("spearman", "kendall", "slope", "intercept", "halves_full", "halves_frozen"):
        assert few[name]["value"] is None
        assert few[name]["reason"] == "3 fine-tuned configurations: it needs 4"
    assert few["ordered"]["value"] == 1
    assert few["bias"]["value"] is not None

    level = by_statistic(stage([0.5] * 4), stage([0.1, 0.2, 0.3, 0.4]))
    assert (
        level["spearman"]["value"] is level["ordered"]["value"] is level["slope"]["value"] is None
    )
    assert level["kendall"]["reason"] == "all configurations have the same value in a stage"
    assert level["regret"]["value"] == pytest.approx(0.4 - 0.25)

    lost = by_statistic(stage([1, 2, 3, 4]), stage([1, 3, 2, 4]), None)
    assert lost["bias"]["reason"] == "the baseline has no fine-tuned run"
    assert lost["kendall"]["value"] == pytest.approx(2 / 3)

    nowhere = by_statistic(stage([1, 2, 3, np.nan]), stage([1, 3, 2, 4]))
    assert {row["reason"] for row in nowhere.values()} == {"a configuration lacks a value here"}


def test_one_prompt_gives_no_interval() -> None:
    alone = stage([1, 2, 3, 4])
    alone = Stage(alone.names, alone.values, alone.draws, alone.seeds, 1)
    row = by_statistic(alone, alone)["spearman"]
    assert row["value"] == pytest.approx(1)
    assert row["low"] is row["high"] is None


def test_undefined_replicates_are_left_out() -> None:
    draws = np.tile([1.0, 2, 3, 4], (5, 1))
    draws[0, 1] = np.nan
    row = by_statistic(stage([1, 2, 3, 4], draws=draws), stage([1, 2, 3, 4]))["spearman"]
    assert row["low"] == row["high"] == 1


def test_intervals_are_widened_by_twice_the_bias_of_the_draws() -> None:
    # The draws' ρ are 0.8 and 1, the observed is 1: b = 0.1, and up is cut at 1.
    draws = np.tile([1.0, 2, 3, 4], (4, 1))
    draws[:2] = [2, 1, 3, 4]
    full = stage([1, 2, 3, 4], draws=np.tile([1.0, 2, 3, 4], (4, 1)))
    row = by_statistic(stage([1, 2, 3, 4], draws=draws), full)["spearman"]
    assert (row["low"], row["high"]) == (pytest.approx(0.8), 1)
    # Here the observed is 0.8 and the draws' mean 0.9: down by 0.2.
    row = by_statistic(stage([2, 1, 3, 4], draws=draws), full)["spearman"]
    assert (row["low"], row["high"]) == (pytest.approx(0.6), pytest.approx(1))


def test_halves_use_common_seeds_and_each_configuration_once() -> None:
    seeds = np.array([[1.0, 2, 3, 4], [2, 1, 3, 4]])
    assert halves(stage(seeds.mean(0), seeds=seeds)) == pytest.approx(0.8)
    four = np.array([[1.0, 2, 3, 4], [1, 2, 3, 4], [2, 1, 3, 4], [2, 1, 3, 4]])
    # One of three halvings puts equal seeds together; in the other two, the first two tie.
    tied = spearman(np.array([1.5, 1.5, 3, 4]), np.array([1.5, 1.5, 3, 4]))
    assert halves(stage(four.mean(0), seeds=four)) == pytest.approx((0.8 + 2 * tied) / 3)
    doubled = np.column_stack([seeds, seeds[:, :1]])
    twice = stage(doubled.mean(0), ["c0", "c1", "c2", "c3", "c0"], seeds=doubled)
    assert halves(twice) == pytest.approx(0.8)
    assert np.isnan(halves(stage(seeds[0], seeds=seeds[:1])))
    assert np.isnan(halves(stage(seeds[0], seeds=np.ones((2, 4)))))


def resampled(values: np.ndarray, prompts: int = 9) -> tuple[Replicates, pl.DataFrame]:
    """Runs with these values [seeds, configurations], the same in every replicate."""
    runs = pl.DataFrame(
        [(f"c{place}", seed) for seed in range(len(values)) for place in range(values.shape[1])],
        schema=["name", "seed"],
        orient="row",
    )
    flat = values.reshape(-1)
    return Replicates(flat, np.tile(flat, (400, 1)), prompts), runs


def test_a_stage_has_means_over_seeds_signed_so_that_larger_is_better() -> None:
    values = np.array([[0.1, 0.5], [0.3, 0.5]])
    found = Stage.of(*resampled(values), ["c1", "c0", "c1"], "accuracy", "full")
    assert found.values == pytest.approx([0.5, 0.2, 0.5])
    assert found.seeds == pytest.approx(values[:, [1, 0, 1]])
    assert np.array_equal(found.draws[:, 0], found.draws[:, 2])
    lower = Stage.of(*resampled(values), ["c1", "c0"], "nll", "full")
    assert lower.values == pytest.approx([-0.5, -0.2])


def test_the_effect_of_a_seed_on_all_configurations_is_subtracted() -> None:
    shared = np.array([[0.1], [0.5], [0.3]]) + np.array([[0.2, 0.1, 0.0]])
    found = Stage.of(*resampled(shared), ["c0", "c1", "c2"], "accuracy", "full")
    assert found.draws == pytest.approx(np.tile(found.values, (400, 1)))


def test_seeds_are_drawn_independently_for_each_configuration_and_stage() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(4, 6))
    names = [f"c{place}" for place in range(6)]
    frozen = Stage.of(*resampled(values), names, "accuracy", "frozen")
    full = Stage.of(*resampled(values), names, "accuracy", "full")
    apart = np.corrcoef(np.hstack([frozen.draws, full.draws]).T) - np.eye(12)
    assert np.abs(apart).max() < 0.25  # 400 draws: standard error 0.05
    # The mean of four seeds has variance s²/4, s² being that after seed means are subtracted.
    residual = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    # Subtracting the mean over six configurations removed a sixth of it.
    expected = (residual**2).sum(0) / 3 / 4 * 6 / 5
    assert (frozen.draws.var(axis=0) / expected).mean() == pytest.approx(1, abs=0.1)
    assert frozen.draws.var(axis=0) == pytest.approx(expected, rel=0.3)


def test_nothing_is_subtracted_for_a_seed_of_one_configuration() -> None:
    values = np.array([[0.1, 0.5], [0.3, 0.5]])
    replicates, runs = resampled(values)
    runs = runs.with_columns(seed=pl.Series([0, 2, 1, 3]))  # no seed is common
    found = Stage.of(replicates, runs, ["c0", "c1"], "accuracy", "full")
    assert found.draws[:, 0].var() == pytest.approx(0.02 / 2, rel=0.2)
    assert found.draws[:, 1].var() == pytest.approx(0)


def test_seeds_that_some_configurations_lack_are_not_used_for_halves() -> None:
    replicates, runs = resampled(np.array([[0.1, 0.5], [0.3, 0.6], [0.4, 0.7]]))
    kept = [0, 1, 3, 4, 5]  # c0 without its seed 1
    some = Replicates(replicates.estimates[kept], replicates.draws[:, kept], 9)
    found = Stage.of(some, runs[kept], ["c0", "c1"], "accuracy", "full")
    assert found.seeds == pytest.approx(np.array([[0.1, 0.5], [0.4, 0.7]]))
    assert found.values == pytest.approx([0.25, 0.6])


@pytest.mark.parametrize(("apart", "agree"), [(3.0, 0.7), (3.0, 0.0), (8.0, 0.7)])
def test_intervals_cover_the_statistics_of_noise_free_means(apart: float, agree: float) -> None:
    shares = coverage(8, (2, 2), 300, apart=apart, agree=agree, trials=60, replicates=200)
    assert shares.keys() == {"spearman", "kendall", "regret", "slope", "bias"}
    assert min(shares.values()) > 0.85, shares


def test_coverage_falls_under_perfect_agreement_most_among_close_configurations() -> None:
    """docs/methods.md warns of this."""
    near, far = (
        coverage(8, (2, 2), 300, apart=apart, agree=1.0, trials=60, replicates=200)
        for apart in (1.0, 8.0)
    )
    assert min(near["regret"], near["bias"], far["regret"], far["bias"]) > 0.85
    assert far["spearman"] > 0.8
    assert near["kendall"] < near["spearman"] < 0.8
