"""Functions of estimated log-probabilities: what sampling rows does to their values and gradients.

`_mean` enumerates every way to draw K of N positions; `_simulated` draws many responses.
"""

import math
from collections.abc import Callable
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.training.row_sampling import PairValues, empirical_bayes, plug_in

CHOSEN, REJECTED = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])
WEIGHT = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64)
POSITIONS = (5, 4, 6)
S = torch.tensor([-30.0, -20.0, -40.0], dtype=torch.float64)


def _values(function: Callable[[Tensor], Tensor]) -> PairValues:
    def values(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        weight = WEIGHT.repeat(len(chosen) // len(WEIGHT))
        return weight * function(change[chosen] - change[rejected])

    return values


def _terms(theta: Tensor) -> list[Tensor]:
    """x_t of every position of three responses, as a function of one parameter."""
    random = torch.Generator().manual_seed(1)
    found = []
    for count in POSITIONS:
        slope, bend = torch.randn(2, count, generator=random, dtype=torch.float64)
        found.append(theta * slope + theta**2 * bend)
    return found


def _exact(function: Callable[[Tensor], Tensor], theta: float) -> tuple[float, float]:
    """The value at all positions, and its derivative in theta."""
    point = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    change = torch.stack([own.sum() for own in _terms(point)])
    value = (WEIGHT * function(change[CHOSEN] - change[REJECTED])).mean()
    (slope,) = torch.autograd.grad(value, point)
    return value.item(), slope.item()


def _mean(
    estimate: Callable[..., Tensor],
    function: Callable[[Tensor], Tensor],
    theta: float,
    rows: tuple[int, ...],
) -> tuple[float, float]:
    """Mean value and derivative over all samples of so many positions of each response."""
    values, slopes = [], []
    for drawn in product(
        *(combinations(range(n), k) for n, k in zip(POSITIONS, rows, strict=True))
    ):
        point = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        terms = _terms(point)
        each = torch.cat([own[list(some)] for own, some in zip(terms, drawn, strict=True)])
        response = torch.repeat_interleave(torch.arange(3), torch.tensor(rows))
        share = (torch.tensor(POSITIONS) / torch.tensor(rows).double())[response]
        tokens: Any = SimpleNamespace(S=S, response=response, share=share)
        value = estimate(_values(function), tokens, each, (CHOSEN, REJECTED))
        (slope,) = torch.autograd.grad(value, point)
        values.append(value.item())
        slopes.append(slope.item())
    return sum(values) / len(values), sum(slopes) / len(slopes)


def _square(difference: Tensor) -> Tensor:
    return difference**2 / 8 - difference / 2


def _dpo(difference: Tensor) -> Tensor:
    return -logsigmoid(0.3 * difference)


def test_the_plug_in_pulls_back_a_convex_function() -> None:
    for rows in [(2, 2, 2), (3, 2, 4), (5, 4, 2)]:
        exact = _exact(_square, 0.7)
        value, slope = _mean(plug_in, _square, 0.7, rows)
        assert value > exact[0] + 0.1
        assert slope > exact[1] + 0.1


def test_all_positions_are_exact() -> None:
    exact = _exact(_dpo, 0.7)
    assert _mean(empirical_bayes, _dpo, 0.7, POSITIONS) == pytest.approx(exact, rel=1e-12)
    assert _mean(plug_in, _dpo, 0.7, POSITIONS) == pytest.approx(exact, rel=1e-12)


def _simulated(
    scale: float, rows: int, *, between: float = 0.02, pairs: int = 4000, positions: int = 100
) -> dict[str, tuple[float, float]]:
    """Value and derivative in θ of mean -logsigmoid(θ·Δ) at θ = 1, of many pairs at once.

    x_t of the chosen responses have means 0.02·scale, of the rejected -0.02·scale, with a standard
    deviation of `between` between responses and 0.3 within, both times scale.
    """
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    centre = torch.tensor([0.02]).repeat(pairs).double()
    centre = torch.cat([centre, -centre]) + between * normal(2 * pairs)
    x = scale * (centre[:, None] + 0.3 * normal(2 * pairs, positions))
    drawn = torch.rand(x.shape, generator=random).argsort(1)[:, :rows]
    numbers = torch.arange(2 * pairs)
    ends = numbers.chunk(2)

    def values(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(0.3 * (change[chosen] - change[rejected]))

    def derivative(value: Tensor, theta: Tensor) -> tuple[float, float]:
        (slope,) = torch.autograd.grad(value, theta)
        return value.item(), slope.item()

    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    change = (theta * x).sum(1)
    found = {"exact": derivative(values(change, change, *ends).mean(), theta)}
    response = numbers.repeat_interleave(rows)
    share = torch.full(response.shape, positions / rows, dtype=torch.float64)
    tokens: Any = SimpleNamespace(S=x.new_zeros(2 * pairs), response=response, share=share)
    for estimate in (plug_in, empirical_bayes):
        each = (theta * x.gather(1, drawn)).flatten()
        found[estimate.__name__] = derivative(estimate(values, tokens, each, ends), theta)
    return found


@pytest.mark.parametrize("rows", [8, 32])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_value_and_gradient_are_near_those_of_all_positions(scale: float, rows: int) -> None:
    """The derivative in the scale of a shift is what a hidden ridge changes most."""
    found = _simulated(scale, rows)
    for own, other, exact in zip(
        found["empirical_bayes"], found["plug_in"], found["exact"], strict=True
    ):
        assert abs(own - exact) < max(0.1 * abs(other - exact), 0.01)


def test_the_sign_of_the_gradient_is_that_of_all_positions_where_the_plug_ins_is_not() -> None:
    found = {name: slope for name, (_, slope) in _simulated(0.3, 8).items()}
    assert found["exact"] < 0 < found["plug_in"]
    assert found["empirical_bayes"] < 0


def test_a_response_with_one_row_is_taken_for_one_like_the_others() -> None:
    found = _simulated(0.3, 1)
    assert all(math.isfinite(number) for number in found["empirical_bayes"])


def test_the_value_where_nothing_has_moved_is_exact_to_the_bit() -> None:
    response = torch.tensor([0, 0, 1, 1, 2, 2])
    tokens: Any = SimpleNamespace(S=S.float(), response=response, share=torch.full((6,), 7.0))
    each = torch.zeros(6, requires_grad=True)

    def values(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(change[chosen] - change[rejected])

    value = empirical_bayes(values, tokens, each, (CHOSEN, REJECTED))
    assert value.item() == torch.tensor(2.0).log().item()
