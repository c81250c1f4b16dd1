"""The bias that sampled positions give a term that is not linear in S̃: against closed cases."""

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.lm.head import LmHead
from embrm.studies.estimators.bias import (
    Bias,
    EstimatorBias,
    Positions,
    changes_along,
    mean_bias,
    sampled_pairs,
    without_inflation,
)
from embrm.training.row_sampling import PairValues
from embrm.training.token_rows import TokenBatch


def world_of(positions: list[int], held: list[int]) -> Positions:
    """Responses with so many positions and cached rows; only numbers of token rows are needed."""
    n, nothing = sum(held), torch.zeros(0)
    head = LmHead(torch.zeros(1, 1))
    tokens = TokenBatch(
        X=torch.zeros(n, 1),
        response=torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held)),
        share=nothing,
        S=torch.zeros(len(held)),
        vectors=nothing,
        candidates=None,
        target=nothing,
        uncapped=nothing,
        log_p=nothing,
        head=head,
    )
    return Positions.of(tokens, np.array(held), np.array(positions))


def linear(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    return -0.3 * (change[chosen] - change[rejected])


def square(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    return (change[chosen] - change[rejected]).square() / 2


def dpo(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    return -logsigmoid(0.1 * (change[chosen] - change[rejected]))


def measured(
    world: Positions,
    x: Tensor,
    values: PairValues,
    rows: int,
    *,
    estimator: str = "plug-in",
    draws: int = 32,
) -> Bias:
    """The bias where x_t grows in proportion to the scale, of pairs (0, m/2), (1, m/2 + 1), ..."""
    samples = [world.first(world.shuffled(draw), rows) for draw in range(draws)]
    ends = torch.arange(len(world.N)).chunk(2)
    pairs = ends[0], ends[1]
    if estimator == "plug-in":
        return mean_bias(world, samples, (x, x), values, pairs, "plug-in")
    return mean_bias(world, samples, (x, x), values, pairs, "empirical-bayes")


POSITIONS, HELD = [7, 5, 6, 9], [7, 3, 2, 4]


def random_x(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_linear_term_has_no_bias(rows: int) -> None:
    world = world_of(POSITIONS, HELD)
    found = measured(world, random_x(sum(HELD)), linear, rows)
    assert found.loss == pytest.approx(0, abs=1e-12)
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert found.slope_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("estimator", ["plug-in", "empirical-bayes"])
def test_all_positions_are_exact(estimator: str) -> None:
    world = world_of(POSITIONS, POSITIONS)
    found = measured(world, random_x(sum(POSITIONS)), dpo, 9, estimator=estimator)
    assert (found.loss, found.slope) == pytest.approx((0, 0), abs=1e-12)


def test_all_cached_rows_are_not_exact_where_they_are_not_all_positions() -> None:
    world = world_of([40] * 4, [4] * 4)
    found = measured(world, random_x(16), dpo, 4)
    assert found.loss > 0.05
    assert found.slope > 0.05


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_bias_of_a_square_is_half_its_curvature_times_the_variance(rows: int) -> None:
    """The mean over every way to draw the rows, enumerated."""
    world = world_of([5, 4], [5, 2])
    x = random_x(7)
    own = [x[:5].tolist(), x[5:].tolist() * 2]
    sums = [
        [len(of) / min(rows, len(of)) * sum(some) for some in combinations(of, min(rows, len(of)))]
        for of in own
    ]
    exact = (sum(own[0]) - sum(own[1])) ** 2 / 2
    bias = float(np.mean([(one - two) ** 2 / 2 for one, two in product(*sums)])) - exact
    found = measured(world, x, square, rows)
    assert found.exact_slope == pytest.approx(2 * exact)
    assert found.loss == pytest.approx(bias)
    assert found.slope == pytest.approx(2 * bias)


def test_dpo_agrees_with_every_possible_sample() -> None:
    world = world_of([5, 4], [5, 4])
    x = 3 * random_x(9)
    own = [x[:5].tolist(), x[5:].tolist()]
    point = torch.ones((), dtype=torch.float64, requires_grad=True)
    sums = [[len(of) / 2 * sum(some) for some in combinations(of, 2)] for of in own]
    each = torch.tensor([one - two for one, two in product(*sums)], dtype=torch.float64)
    exact = -logsigmoid(0.1 * point * (sum(own[0]) - sum(own[1])))
    difference = -logsigmoid(0.1 * point * each).mean() - exact
    (slope,) = torch.autograd.grad(difference, point)
    found = measured(world, x, dpo, 2, draws=400)
    assert found.slope == pytest.approx(slope.item(), abs=4 * found.slope_error + 1e-9)
    assert found.slope_error < 0.05 * slope.item()
    assert found.loss == pytest.approx(difference.item(), rel=0.1)


@pytest.mark.parametrize("drift", [0.3, 1.0])
def test_the_plug_in_is_flagged_where_empirical_bayes_is_not(drift: float) -> None:
    """Responses as in the simulation of the estimators: normal means, and positions around them."""
    pairs, positions = 256, 100
    random = torch.Generator().manual_seed(0)
    centre = 0.02 * torch.randn(2 * pairs, 1, generator=random, dtype=torch.float64)
    centre[:pairs] += 0.02
    centre[pairs:] -= 0.02
    within = torch.randn(2 * pairs, positions, generator=random, dtype=torch.float64)
    x = drift * (centre + 0.3 * within).flatten()
    world = world_of([positions] * 2 * pairs, [positions] * 2 * pairs)
    plug_in, bayes = (
        measured(world, x, dpo, 8, estimator=estimator, draws=16)
        for estimator in ("plug-in", "empirical-bayes")
    )
    assert abs(bayes.slope) < 0.1 * plug_in.slope
    assert plug_in.slope > 0.2 * abs(plug_in.exact_slope)
    assert abs(bayes.slope) < 0.2 * abs(bayes.exact_slope)


def test_the_derivative_is_that_of_scaling_the_shift() -> None:
    random = torch.Generator().manual_seed(2)
    weight, X = torch.randn(6, 3, generator=random), torch.randn(4, 3, generator=random)
    shift, target = torch.randn(4, 3, generator=random) / 3, torch.tensor([0, 5, 2, 2])
    head = LmHead(weight)
    logits = head.logits(X)
    tokens = replace(
        world_of([4], [4]).tokens,
        X=X,
        vectors=weight,
        target=target,
        uncapped=head.uncapped(logits),
        log_p=logits.log_softmax(1),
        head=head,
    )
    x, slope = changes_along(tokens, shift)

    def oracle(scale: Tensor) -> Tensor:
        moved = ((X.double() + scale * shift.double()) @ weight.double().T).log_softmax(1)
        return (moved - logits.double().log_softmax(1))[torch.arange(4), target]

    torch.testing.assert_close(x, oracle(torch.tensor(1.0)), rtol=1e-4, atol=1e-5)
    expected = (oracle(torch.tensor(1.001)) - oracle(torch.tensor(0.999))) / 0.002
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-4)


def table(rows: list[tuple[int, int, str]]) -> pl.DataFrame:
    return pl.DataFrame(
        rows, schema={"chosen": pl.Int32, "rejected": pl.Int32, "split": pl.String}, orient="row"
    )


def test_training_pairs_of_the_sample_are_taken() -> None:
    chosen, held = np.arange(0, 80, 2), np.full(40, 8)
    held[3] = 0  # response 6 has no token rows
    rows = [(4 * i, 4 * i + 2, "train") for i in range(20)]
    found = sampled_pairs(table([*rows, (1, 4, "train"), (8, 16, "test")]), chosen, held)
    assert not found.random
    kept = [row for row in rows if 6 not in row]
    assert chosen[found.chosen].tolist() == [row[0] for row in kept]
    assert chosen[found.rejected].tolist() == [row[1] for row in kept]


def test_few_training_pairs_are_replaced_by_random_ones() -> None:
    chosen, held = np.arange(0, 80, 2), np.full(40, 8)
    held[:5] = 0
    found = sampled_pairs(table([(0, 2, "train")]), chosen, held)
    assert found.random
    assert len(found) == 17
    used = [*found.chosen.tolist(), *found.rejected.tolist()]
    assert len(set(used)) == 34
    assert set(used) <= set(range(5, 40))
    assert len(sampled_pairs(table([]), chosen[:1], held[-1:])) == 0


@pytest.mark.parametrize(
    ("estimator", "gradient", "sign", "trusted"),
    [
        ("empirical-bayes", 0.04, True, True),
        ("empirical-bayes", 0.06, True, False),
        ("empirical-bayes", 0.04, False, False),
        ("empirical-bayes", None, True, False),
        ("plug-in", 0.04, True, False),
    ],
)
def test_a_small_bias_of_the_right_sign_is_trusted(
    estimator: str, gradient: float | None, sign: bool, trusted: bool
) -> None:
    name = "plug-in" if estimator == "plug-in" else "empirical-bayes"
    entry = EstimatorBias(0.1, 8, name, 0.0, gradient, 0.0, sign)  # type: ignore[arg-type]
    assert entry.trusted(0.05) == trusted


def test_what_sampling_the_cached_rows_adds_is_not_taken_for_a_difference_of_responses() -> None:
    """An exact derivative of -1, to which the cached rows add 3, so that it looks like 2."""
    of_plug_in, of_bayes = Bias(0.5, 3.0, 0.1, 2.0), Bias(0.1, 0.2, 0.1, 2.0)
    found = without_inflation(
        0.1, {(8, "plug-in"): [of_plug_in], (8, "empirical-bayes"): [of_bayes]}
    )
    assert [entry.gradient for entry in found] == pytest.approx([3.0, 0.2])
    assert [entry.sign_agrees for entry in found] == [False, True]
