"""Pooled variances between seeds, against sums written out and against simulated tables."""

import itertools
from statistics import mean, variance

import numpy as np
import pytest
from seed_world import simulate

from embrm.metrics.seed_variance import NONE, SeedVariance, of_differences, of_values


def table(random: np.random.Generator, seeds: int, deviations: list[float]) -> np.ndarray:
    """Values [seeds, configurations], with a standard deviation over seeds for each."""
    return 0.6 + random.normal(size=(seeds, len(deviations))) * np.array(deviations)


def over_prompts(
    random: np.random.Generator, values: np.ndarray, deviations: float | list[float] = 0.1
) -> np.ndarray:
    """Replicates over prompts of independent runs, [replicates, seeds, configurations]."""
    noise = random.normal(size=(4000, *values.shape)) * np.array(deviations)
    return values + noise


def fields(found: list[SeedVariance]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([one.variance for one in found]), np.array([one.freedom for one in found])


def test_one_configuration_keeps_its_own_variance() -> None:
    random = np.random.default_rng(0)
    values = table(random, 3, [0.1, 0.1])
    draws = over_prompts(random, values)
    (alone,) = of_values(values[:, :1], draws[..., :1])
    assert alone.variance == pytest.approx(values[:, 0].var(ddof=1))
    assert alone.freedom == 2
    none, difference = of_differences(values, draws, 0)
    assert none is NONE
    assert difference.variance == pytest.approx((values[:, 1] - values[:, 0]).var(ddof=1))
    assert difference.freedom == 2


def test_shrinkage_written_out() -> None:
    random = np.random.default_rng(1)
    values = table(random, 3, [0.02, 0.03, 0.1, 0.2])
    draws = over_prompts(random, values, [0.1, 0.2, 0.1, 0.3])
    changes = [values[:, c] - values[:, 0] for c in (1, 2, 3)]
    squares = [variance(change) for change in changes]
    scales = [mean(np.var(draws[:, j, c] - draws[:, j, 0]) for j in range(3)) for c in (1, 2, 3)]
    pairs = list(itertools.combinations(range(4), 2))
    pooled = mean(variance(values[:, a] - values[:, b]) for a, b in pairs) / mean(
        np.var(draws[:, j, a] - draws[:, j, b]) for a, b in pairs for j in range(3)
    )
    ratios = [square / scale for square, scale in zip(squares, scales, strict=True)]
    spread = sum((ratio - pooled) ** 2 for ratio in ratios) / 2
    weight = min(1, mean(2 * ratio**2 / (2 + 2) for ratio in ratios) / spread)
    assert 0 < weight < 1
    found, freedom = fields(of_differences(values, draws, 0)[1:])
    expected = [
        weight * pooled * scale + (1 - weight) * square
        for square, scale in zip(squares, scales, strict=True)
    ]
    assert found == pytest.approx(expected)
    assert freedom == pytest.approx([min(2 / (1 - weight), 6)] * 3)


def test_like_configurations_are_pooled_and_unlike_ones_are_not() -> None:
    random = np.random.default_rng(2)
    like = table(random, 3, [0.1] * 60)
    found, freedom = fields(of_values(like, over_prompts(random, like)))
    assert found == pytest.approx(0.1**2, rel=0.3)
    assert freedom.min() > 10
    unlike = table(random, 10, [0.01] * 30 + [0.1] * 30)
    found, freedom = fields(of_values(unlike, over_prompts(random, unlike)))
    own = unlike.var(axis=0, ddof=1)
    assert found[30:] == pytest.approx(own[30:], rel=0.4)
    assert np.median(freedom) < 25


def test_what_a_seed_does_to_all_configurations_has_the_freedom_of_the_seeds() -> None:
    random = np.random.default_rng(3)
    values = np.tile(random.normal(size=(3, 1)), 20) + 1e-6 * random.normal(size=(3, 20))
    draws = over_prompts(random, values)
    found, freedom = fields(of_values(values, draws))
    assert freedom == pytest.approx(2)
    assert found == pytest.approx(values[:, 0].var(ddof=1), rel=0.05)
    found, freedom = fields(of_differences(values, draws, 0)[1:])
    assert found.max() < 1e-11


def test_a_near_copy_of_the_baseline_is_not_widened_by_the_others() -> None:
    """It differs from the baseline on few prompts, so that seeds cannot matter much either."""
    random = np.random.default_rng(4)
    values = table(random, 2, [0.1] * 20)
    draws = over_prompts(random, values)
    tiny = 1e-4
    values = np.column_stack([values, values[:, 0] + tiny * random.normal(size=2)])
    near = draws[..., :1] + tiny * random.normal(size=(4000, 2, 1))
    found, _ = fields(of_differences(values, np.concatenate([draws, near], axis=2), 0))
    assert np.sqrt(found[-1]) < 4 * tiny
    assert np.sqrt(found[1:-1]) == pytest.approx(0.1 * np.sqrt(2), rel=0.4)


def test_the_order_of_configurations_and_of_seeds_does_not_matter() -> None:
    random = np.random.default_rng(5)
    values = table(random, 3, [0.05, 0.1, 0.1, 0.2, 0.1])
    draws = over_prompts(random, values)
    straight, _ = fields(of_differences(values, draws, 1))
    order = [3, 1, 0, 4, 2]
    mixed, _ = fields(of_differences(values[::-1][:, order], draws[:, ::-1][..., order], 1))
    assert mixed == pytest.approx(straight[order])


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "unpooled"), [(2, 0.6), (3, 0.4), (10, 0.0)])
def test_family_wise_error_where_seeds_shift_all_prompts_alike(seeds: int, unpooled: float) -> None:
    rates = simulate(seeds, 50, 1000, alike=0.1, trials=200)
    assert rates.false_positives <= 0.1
    assert rates.unpooled >= unpooled
    assert 0.92 <= rates.differences <= 0.97
    assert 0.92 <= rates.estimates <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [40, 200, 1000])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_is_kept_where_they_do_not(seeds: int, prompts: int) -> None:
    rates = simulate(seeds, 10, prompts, alike=0.0, trials=400)
    assert rates.false_positives <= 0.1
    assert 0.92 <= rates.differences <= 0.975
    assert 0.92 <= rates.estimates <= 0.975
