"""Intervals against closed forms and against simulated truth."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from embrm.metrics.accuracy import OUTCOMES, PROMPTS
from embrm.metrics.intervals import Replicates, compare, holm, mean, prompt_counts, replicate
from embrm.metrics.outcomes import Outcomes


def outcomes(wins: np.ndarray, pairs: np.ndarray, **others: np.ndarray) -> Outcomes:
    """Outcomes with wins [prompts, runs] of pairs [prompts]; others: [prompts, runs]."""
    known = {"wins": wins, **others}
    empty = {name: np.nan if name == "tau" else 0.0 for name in OUTCOMES}
    prompts = pl.DataFrame(
        {"prompt_id": [f"prompt{prompt}" for prompt in range(len(wins))], "pairs": pairs}
    ).with_columns(subset=pl.lit(None), length_wins=0.0, length_ties=0.0)
    return Outcomes(
        prompts.select(pl.col(name).cast(kind) for name, kind in PROMPTS.items()),
        {
            name: known.get(name, np.full(wins.shape, empty[name])).T.astype(np.float32)
            for name in OUTCOMES
        },
    )


def seeds(names: list[str], numbers: list[int]) -> pl.DataFrame:
    return pl.DataFrame({"name": names, "seed": numbers})


def test_equal_prompts_reproduce_the_closed_form() -> None:
    generator = np.random.default_rng(0)
    wins = generator.binomial(10, 0.7, size=(400, 1))
    result = replicate(outcomes(wins, np.full(400, 10)), "accuracy")
    row = compare(result, seeds(["a"], [0]), None).row(0, named=True)
    shares = wins[:, 0] / 10
    half = 1.96 * shares.std() / np.sqrt(400)
    assert row["estimate"] == pytest.approx(shares.mean(), rel=1e-12)
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.06)
    assert (row["low"] + row["high"]) / 2 == pytest.approx(shares.mean(), abs=0.1 * half)


def test_ratio_variance_matches_the_delta_method() -> None:
    generator = np.random.default_rng(1)
    pairs = generator.integers(1, 60, size=500)
    wins = generator.binomial(pairs, generator.beta(4, 3, size=500))[:, None]
    result = replicate(outcomes(wins, pairs), "accuracy")
    ratio = wins.sum() / pairs.sum()
    residuals = wins[:, 0] - ratio * pairs
    expected = np.sqrt(np.square(residuals).sum()) / pairs.sum()
    assert result.estimates[0] == ratio
    assert result.draws[:, 0].std() == pytest.approx(expected, rel=0.06)


def test_without_variance_over_prompts_the_interval_is_students() -> None:
    """Prompts that never vary leave only the seeds: mean ± t·s/√k, where k is 3 and the baseline,
    which no seed changes, has no variance to pool."""
    estimates = np.concatenate([[0.60, 0.64, 0.71], np.full(3, 0.62)])
    result = Replicates(estimates, np.tile(estimates, (20_000, 1)), prompts=50)
    table = compare(result, seeds(["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2), "b")
    row = table.row(0, named=True)
    deviation = np.sqrt(estimates[:3].var(ddof=1) / 3)
    assert row["estimate"] == pytest.approx(0.65)
    assert row["high"] - 0.65 == pytest.approx(student.ppf(0.975, 2) * deviation, rel=1e-3)
    assert row["p"] == pytest.approx(2 * student.sf(0.03 / deviation, 2), rel=1e-4)
    assert row["difference_low"] == pytest.approx(row["low"] - 0.62)
    assert row["difference_high"] == pytest.approx(row["high"] - 0.62)


def test_p_of_a_normal_and_a_t_agrees_with_their_draws() -> None:
    random = np.random.default_rng(0)
    draws = 0.3 * random.normal(size=4_000_000) + 0.2 * random.standard_t(4, size=4_000_000)
    estimates = np.array([0.8 - 0.4, 0.8 - 0.1, 0.8, 0.8 + 0.3, 0.8 + 0.2])
    scale = 0.2 / np.sqrt(estimates.var(ddof=1) / 5)
    estimates = 0.8 + (estimates - estimates.mean()) * scale
    over_prompts = 0.3 * norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    result = Replicates(estimates, estimates + over_prompts[:, None], prompts=50)
    zero = Replicates(np.zeros(5), np.zeros((100_000, 5)), 50)
    both = Replicates(
        np.concatenate([result.estimates, zero.estimates]),
        np.hstack([result.draws, zero.draws]),
        50,
    )
    names = seeds(["a"] * 5 + ["zero"] * 5, [*range(5)] * 2)
    row = compare(both, names, "zero").row(0, named=True)
    assert row["difference"] == pytest.approx(0.8)
    assert row["p"] == pytest.approx((np.abs(draws) > 0.8).mean(), rel=0.01)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert row["difference_low"] == pytest.approx(0.8 + low, abs=0.01)
    assert row["difference_high"] == pytest.approx(0.8 + high, abs=0.01)


def test_an_interaction_of_seeds_and_prompts_is_counted_once() -> None:
    """Where seeds shift no prompts alike, σ² of the mean over seeds is all there is."""
    random = np.random.default_rng(1)
    wins = (random.random((4000, 5)) < 0.6).astype(float)
    result = replicate(outcomes(wins, np.ones(4000)), "accuracy")
    estimates = 0.6 + (result.estimates - result.estimates.mean()) / 100
    result = replace(result, estimates=estimates)
    row = compare(result, seeds(["a"] * 5, [*range(5)]), None).row(0, named=True)
    half = 1.96 * np.sqrt(0.6 * 0.4 / (4000 * 5))
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.1)


def test_a_learner_that_no_seed_changes_is_neither_widened_nor_pooled() -> None:
    random = np.random.default_rng(2)
    ridge = np.repeat(random.binomial(1, 0.7, size=(200, 1)), 3, axis=1)
    heads = random.binomial(1, np.clip(0.7 + random.normal(0, 0.2, size=6), 0, 1), size=(200, 6))
    names = seeds(["ridge"] * 3 + ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 3)
    result = replicate(outcomes(np.hstack([ridge, heads]), np.ones(200)), "accuracy")
    a, b, fixed = compare(result, names, "ridge").rows(named=True)
    once = replicate(outcomes(ridge[:, :1], np.ones(200)), "accuracy")
    alone = compare(once, seeds(["ridge"], [0]), None).row(0, named=True)
    assert fixed["low"] == pytest.approx(alone["low"])
    assert fixed["high"] == pytest.approx(alone["high"])
    without = compare(replicate(outcomes(heads, np.ones(200)), "accuracy"), names[3:], None).select(
        "low", "high"
    )
    assert without.rows() == [(row["low"], row["high"]) for row in (a, b)]


def test_two_seeds_borrow_from_other_configurations() -> None:
    """Two seeds that agree by chance do not make a narrow interval among many that do not."""
    random = np.random.default_rng(3)
    luck = random.normal(0, 0.2, size=(30, 2))
    luck[1] = luck[1].mean()
    wins = random.random((500, 60)) < np.clip(0.6 + luck.ravel(), 0, 1)
    names = seeds([f"{name:02}" for name in range(30) for _ in range(2)], [0, 1] * 30)
    every = replicate(outcomes(wins.astype(float), np.ones(500)), "accuracy")
    row = compare(every, names, "00").row(1, named=True)
    typical = np.sqrt(2 * luck.var(axis=1, ddof=1).mean() / 2)
    assert row["difference_high"] - row["difference"] > 1.5 * typical
    alone = Replicates(every.estimates[2:4], every.draws[:, 2:4], 500)
    assert compare(alone, names[2:4], None)["high"][0] < row["high"]


@pytest.mark.parametrize("k", [1, 5])
def test_intervals_over_prompts_cover_the_truth_and_intervals_over_pairs_do_not(k: int) -> None:
    """Pairs of a prompt are correlated, so binomial intervals over pairs are too narrow."""
    generator = np.random.default_rng(k)
    prompts, pairs, truth, trials = 60, 20, 0.7, 300
    covered = covered_by_rows = 0
    for _ in range(trials):
        # Prompts differ in difficulty, seeds in skill, mean 0.7 over both. One seed says nothing
        # about others, so its interval is for that seed.
        difficulty = generator.uniform(0.4, 1.0, size=(prompts, 1))
        skill = generator.normal(0.0, 0.02 if k > 1 else 0.0, size=(1, k))
        wins = generator.binomial(pairs, np.clip(difficulty + skill, 0, 1))
        frame = outcomes(wins, np.full(prompts, pairs))
        result = replicate(frame, "accuracy", replicates=500)
        row = compare(result, seeds(["a"] * k, list(range(k))), None).row(0, named=True)
        covered += row["low"] <= truth <= row["high"]
        share = wins.mean() / pairs
        half = 1.96 * np.sqrt(share * (1 - share) / (prompts * pairs * k))
        covered_by_rows += abs(share - truth) <= half
    assert 0.91 <= covered / trials <= 0.985
    assert covered_by_rows / trials < 0.85


def test_paired_differences_cover_and_are_tighter_than_unpaired() -> None:
    generator = np.random.default_rng(5)
    prompts, pairs, gain, trials, k = 80, 20, 0.03, 200, 3
    names, numbers = ["base"] * k + ["better"] * k, list(range(k)) * 2
    covered, widths, unpaired = 0, [], []
    for _ in range(trials):
        difficulty = generator.uniform(0.3, 0.9, size=(prompts, 1))
        seed = generator.normal(0.0, 0.01, size=(1, k))  # shared by the two: paired by seed
        share = np.concatenate([difficulty + seed, difficulty + seed + gain], axis=1)
        frame = outcomes(generator.binomial(pairs, np.clip(share, 0, 1)), np.full(prompts, pairs))
        result = replicate(frame, "accuracy", 400)
        table = compare(result, seeds(names, numbers), "base")
        base, better = table.row(0, named=True), table.row(1, named=True)
        covered += better["difference_low"] <= gain <= better["difference_high"]
        widths.append(better["difference_high"] - better["difference_low"])
        unpaired.append(np.hypot(base["high"] - base["low"], better["high"] - better["low"]))
    assert covered / trials >= 0.92
    assert np.mean(widths) < 0.6 * np.mean(unpaired)


def test_an_accuracy_interval_stays_within_0_and_1() -> None:
    """Two seeds at 1.0 and 0.7 have the half-width 12.7·0.15 unless it is clipped."""
    wins = np.tile([10.0, 7.0, 3.0, 0.0], (9, 1))
    runs = seeds(["good", "good", "bad", "bad"], [0, 1, 0, 1])
    found = replicate(outcomes(wins, np.full(9, 10)), "accuracy")
    for result in (found, mean([found, found])):
        for row in compare(result, runs, "bad").iter_rows(named=True):
            assert (row["low"], row["high"]) == (0, 1)
    good = compare(Replicates(found.estimates, found.draws, 9), runs, None).row(1, named=True)
    assert good["high"] == pytest.approx(0.85 + 0.15 * student.ppf(0.975, 1), rel=0.02)


def test_a_tau_interval_stays_within_1_of_0_and_a_difference_need_not() -> None:
    tau = np.tile([0.9, -0.9, -0.9, 0.9], (9, 1))
    frame = outcomes(np.zeros((9, 4)), np.zeros(9), tau=tau)
    table = compare(replicate(frame, "tau"), seeds(["a"] * 2 + ["b"] * 2, [0, 1] * 2), "b")
    row = table.row(0, named=True)
    assert (row["low"], row["high"]) == (-1, 1)
    assert row["difference_low"] < -2 < 2 < row["difference_high"]


def test_baseline_and_missing_seeds() -> None:
    generator = np.random.default_rng(2)
    result = replicate(
        outcomes(generator.binomial(5, 0.6, size=(30, 4)), np.full(30, 5)), "accuracy"
    )
    table = compare(result, seeds(["base", "base", "half", "none"], [0, 1, 1, 7]), "base")
    base, half, none = table.rows(named=True)
    assert (base["seeds"], base["common_seeds"], base["difference"], base["p"]) == (
        2,
        0,
        None,
        None,
    )
    assert half["common_seeds"] == 1
    assert half["difference"] == result.estimates[2] - result.estimates[1]
    assert none["difference"] is None
    assert none["p_holm"] is None
    assert compare(result, seeds(["a", "b", "c", "d"], [0] * 4), None)["difference"].is_null().all()


def test_rows_that_are_not_asked_for_change_no_other() -> None:
    generator = np.random.default_rng(6)
    wins = generator.binomial(10, 0.6, size=(60, 6))
    runs = seeds(["a", "a", "b", "b", "c", "c"], [0, 1, 0, 1, 0, 1])
    result = replicate(outcomes(wins, np.full(60, 10.0)), "accuracy")
    every, some = compare(result, runs, "b"), compare(result, runs, "b", ["a"])
    assert some["name"].to_list() == ["a"]
    assert some.drop("p_holm").equals(every.filter(name="a").drop("p_holm"))


def test_a_copy_of_the_baseline_differs_by_exactly_0() -> None:
    wins = np.repeat(np.random.default_rng(3).binomial(9, 0.7, size=(25, 1)), 2, axis=1)
    result = replicate(outcomes(wins, np.full(25, 9)), "accuracy")
    copy = compare(result, seeds(["base", "copy"], [0, 0]), "base").row(1, named=True)
    assert (copy["difference"], copy["difference_low"], copy["difference_high"]) == (0, 0, 0)
    assert copy["p"] == copy["p_holm"] == 1


def test_one_prompt_has_an_estimate_and_no_interval() -> None:
    result = replicate(outcomes(np.array([[3, 4]]), np.array([4])), "accuracy")
    table = compare(result, seeds(["a", "b"], [0, 0]), "a")
    assert table["estimate"].to_list() == [0.75, 1.0]
    assert table["low"].to_list() == [None, None]
    assert table.row(1, named=True)["difference"] == 0.25
    assert table.row(1, named=True)["p"] is None


def test_all_ties_give_no_accuracy() -> None:
    pairs = np.full(6, 0.1)  # which float32 rounds
    result = replicate(outcomes(np.zeros((6, 1)), pairs, ties=pairs[:, None]), "accuracy")
    row = compare(result, seeds(["a"], [0]), None).row(0, named=True)
    assert (row["estimate"], row["low"], row["high"]) == (None, None, None)


def test_a_common_shift_of_seeds_cancels_in_the_difference() -> None:
    """Both configurations draw the same seeds, so only their difference is left."""
    generator = np.random.default_rng(4)
    draws = generator.normal(0.7, 0.02, size=(500, 2))
    result = Replicates(
        np.array([0.7, 0.72, 0.71, 0.73]), np.concatenate([draws, draws + 0.01], axis=1), 40
    )
    table = compare(result, seeds(["a", "a", "b", "b"], [0, 1, 0, 1]), "a")
    row = table.row(1, named=True)
    assert row["difference_low"] == pytest.approx(0.01)
    assert row["difference_high"] == pytest.approx(0.01)


def test_tau_is_a_mean_over_the_prompts_where_it_is_defined() -> None:
    tau = np.array([[0.5], [np.nan], [-0.1], [0.2]])
    result = replicate(outcomes(np.zeros((4, 1)), np.zeros(4), tau=tau), "tau")
    assert result.prompts == 3
    assert result.estimates[0] == pytest.approx(0.2)


def test_subsets_of_a_prompt_are_resampled_together() -> None:
    one = outcomes(np.array([[4.0], [3.0]]), np.array([6, 6]))
    prompts = one.prompts.with_columns(pairs=3.0)
    halves = Outcomes(
        pl.concat(prompts.with_columns(subset=pl.lit(half)) for half in ("easy", "hard")),
        {name: np.tile(values / 2, 2) for name, values in one.values.items()},
    )
    whole = replicate(one, "accuracy")
    split = replicate(halves, "accuracy")
    assert split.prompts == 2
    np.testing.assert_array_equal(whole.draws, split.draws)


def test_counts_are_poisson_and_depend_only_on_the_prompt() -> None:
    counts = prompt_counts(["a", "b", "c"])
    np.testing.assert_array_equal(counts[:, [2, 0]], prompt_counts(["c", "a"]))
    np.testing.assert_array_equal(counts[:10], prompt_counts(["a", "b", "c"], 10))
    many = prompt_counts([str(number) for number in range(200)])
    assert many.mean() == pytest.approx(1, abs=0.01)
    assert many.var() == pytest.approx(1, abs=0.02)
    correlation = np.corrcoef(many, rowvar=False) - np.eye(200)
    assert np.abs(correlation).max() < 6 / np.sqrt(2000)


def test_rows_and_runs_in_any_order_give_the_same_bits() -> None:
    generator = np.random.default_rng(6)
    shape = (50, 3)
    ties = generator.binomial(1, 0.3, size=shape) * 0.1
    nll = generator.gamma(3.0, size=shape)
    whole = outcomes(generator.binomial(7, 0.6, size=shape), np.full(50, 7), nll=nll, ties=ties)
    order = generator.permutation(50)
    mixed = whole.by([2, 0, 1])
    mixed = Outcomes(mixed.prompts[order], {k: v[:, order] for k, v in mixed.values.items()})
    for metric in ("accuracy", "nll"):
        straight, shuffled = replicate(whole, metric), replicate(mixed, metric)
        np.testing.assert_array_equal(straight.draws[:, [2, 0, 1]], shuffled.draws)
        np.testing.assert_array_equal(straight.estimates[[2, 0, 1]], shuffled.estimates)
        alone = replicate(whole.by([1]), metric)
        np.testing.assert_array_equal(straight.draws[:, [1]], alone.draws)
        np.testing.assert_array_equal(straight.estimates[[1]], alone.estimates)


def test_mean_over_splits() -> None:
    generator = np.random.default_rng(7)
    parts = [
        Replicates(generator.random(2), generator.random((10, 2)), prompts) for prompts in (9, 4)
    ]
    both = mean(parts)
    np.testing.assert_allclose(both.estimates, (parts[0].estimates + parts[1].estimates) / 2)
    np.testing.assert_allclose(both.draws, (parts[0].draws + parts[1].draws) / 2)
    assert both.prompts == 4
    within = [
        replace(part, bounds=(low, 1.0)) for part, low in zip(parts, (0.0, -1.0), strict=True)
    ]
    assert mean(within).bounds == (-0.5, 1)


def test_averaging_a_split_with_itself_does_not_narrow_its_interval() -> None:
    wins = np.random.default_rng(8).binomial(8, 0.6, size=(40, 1))
    once = replicate(outcomes(wins, np.full(40, 8)), "accuracy")
    np.testing.assert_array_equal(mean([once, once]).draws, once.draws)


def test_no_prompts_give_nan() -> None:
    result = replicate(outcomes(np.zeros((0, 2)), np.zeros(0)), "accuracy")
    assert result.prompts == 0
    assert np.isnan(result.estimates).all()


def test_holm_by_hand() -> None:
    adjusted = holm(pl.Series("p", [0.01, None, 0.04, 0.03, 0.005]))
    assert adjusted.to_list() == pytest.approx([0.03, None, 0.06, 0.06, 0.02])
    assert holm(pl.Series("p", [], dtype=pl.Float64)).to_list() == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_holm_keeps_order_and_lies_between_raw_and_bonferroni(values: list[float]) -> None:
    adjusted = holm(pl.Series("p", values)).to_numpy()
    raw = np.array(values)
    assert (adjusted >= raw).all()
    assert (adjusted <= np.minimum(raw * len(raw), 1)).all()
    order = np.argsort(raw, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()


def data_seeds(values: np.ndarray, name: str = "a") -> tuple[Replicates, pl.DataFrame]:
    """Runs with values [data seeds, seeds] that no prompt changes."""
    flat = values.ravel()
    draws = np.broadcast_to(flat, (2000, len(flat))).copy()
    places = np.indices(values.shape).reshape(2, -1)
    runs = pl.DataFrame({"data_seed": places[0], "seed": places[1]}).with_columns(name=pl.lit(name))
    return Replicates(flat, draws, prompts=100), runs


@pytest.mark.parametrize("overlap", [0.0, 1 / 3])
def test_data_seeds_vary_as_the_means_over_their_seeds(overlap: float) -> None:
    """sd² = s²·(1/D + ρ), with s² the unbiased variance of the D means over seeds."""
    values = np.random.default_rng(3).normal(0.6, 0.02, size=(30, 2))
    found, runs = data_seeds(values)
    row = compare(replace(found, overlap=overlap), runs, None).row(0, named=True)
    sd = np.sqrt(values.mean(1).var(ddof=1) * (1 / 30 + overlap))
    assert row["seeds"] == 30
    assert row["estimate"] == pytest.approx(values.mean())
    assert row["high"] - row["low"] == pytest.approx(2 * student.ppf(0.975, 29) * sd, rel=0.02)


def test_overlap_and_data_seeds_change_nothing_where_there_is_one() -> None:
    values = np.random.default_rng(4).normal(0.6, 0.02, size=(1, 5))
    found, runs = data_seeds(values)
    expected = compare(found, runs.select("name", "seed"), None)
    assert compare(replace(found, overlap=0.5), runs, None).equals(expected)


def test_differences_are_paired_by_data_seed() -> None:
    shared = np.random.default_rng(5).normal(0.6, 0.05, size=(10, 1))
    one, other = data_seeds(shared + 0.01 + np.zeros((10, 2))), data_seeds(shared, "b")
    both = Replicates(
        np.concatenate([one[0].estimates, other[0].estimates]),
        np.concatenate([one[0].draws, other[0].draws], axis=1),
        prompts=100,
    )
    table = compare(both, pl.concat([one[1], other[1]]), "b")
    row = table.filter(name="a").row(0, named=True)
    assert row["common_seeds"] == 10
    assert row["difference_low"] == pytest.approx(0.01)
    assert row["difference_high"] == pytest.approx(0.01)


@pytest.mark.slow
def test_the_variance_over_data_seeds_is_that_of_both_levels() -> None:
    """In a simulated world, data seeds of sd a and seeds within of sd b: a²/D + b²/(D·K)."""
    random, a, b = np.random.default_rng(6), 0.02, 0.03
    variances, hit = [], 0
    for _ in range(600):
        values = 0.6 + a * random.standard_normal((10, 1)) + b * random.standard_normal((10, 3))
        row = compare(*data_seeds(values), None).row(0, named=True)
        variances.append(((row["high"] - row["low"]) / 2 / student.ppf(0.975, 9)) ** 2)
        hit += row["low"] < 0.6 < row["high"]
    assert np.mean(variances) == pytest.approx(a**2 / 10 + b**2 / 30, rel=0.08)
    assert 0.93 < hit / 600 < 0.97
