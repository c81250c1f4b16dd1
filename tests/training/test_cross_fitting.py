"""Functions of estimated log-probabilities: what sampling rows does to their values and gradients.

Means over samples are exact: every way to draw K of N positions is enumerated.
"""

from collections.abc import Callable
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from embrm.training.cross_fitting import PairValues, cross_fitted, plug_in

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


@pytest.mark.parametrize("rows", [(2, 2, 2), (3, 2, 4), (5, 4, 2)])
def test_a_square_has_its_mean_and_gradient_exactly(rows: tuple[int, ...]) -> None:
    """f''' = 0: what remains of the bias elsewhere is not there."""
    exact = _exact(_square, 0.7)
    assert _mean(cross_fitted, _square, 0.7, rows) == pytest.approx(exact, rel=1e-12)
    value, slope = _mean(plug_in, _square, 0.7, rows)
    assert value > exact[0] + 0.1
    assert slope > exact[1] + 0.1  # the ridge: it always pulls theta back


def test_all_positions_are_exact() -> None:
    exact = _exact(_dpo, 0.7)
    assert _mean(cross_fitted, _dpo, 0.7, POSITIONS) == pytest.approx(exact, rel=1e-12)
    assert _mean(plug_in, _dpo, 0.7, POSITIONS) == pytest.approx(exact, rel=1e-12)


def test_a_linear_function_is_estimated_without_bias_by_both() -> None:
    exact = _exact(lambda difference: -difference, 0.7)
    for estimate in (cross_fitted, plug_in):
        found = _mean(estimate, lambda difference: -difference, 0.7, (2, 3, 2))
        assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("theta", [0.1, 0.4])
def test_the_bias_of_a_sigmoid_is_a_fraction_of_the_plug_ins(theta: float) -> None:
    rows = (2, 2, 2)
    exact = _exact(_dpo, theta)
    fitted, plugged = (_mean(estimate, _dpo, theta, rows) for estimate in (cross_fitted, plug_in))
    for own, other, known in zip(fitted, plugged, exact, strict=True):
        assert abs(own - known) < 0.25 * abs(other - known)


def test_the_bias_vanishes_at_a_higher_order_of_the_shift() -> None:
    """The plug-in's is of second order in the shift, so its gradient's is of first order."""

    def bias(estimate: Callable[..., Tensor], theta: float) -> float:
        return _mean(estimate, _dpo, theta, (2, 2, 2))[1] - _exact(_dpo, theta)[1]

    assert bias(plug_in, 0.02) / bias(plug_in, 0.01) == pytest.approx(2, rel=0.1)
    assert abs(bias(cross_fitted, 0.02) / bias(cross_fitted, 0.01)) > 6  # of third order


def test_the_value_where_nothing_has_moved_is_exact_to_the_bit() -> None:
    response = torch.tensor([0, 0, 1, 1, 2, 2])
    tokens: Any = SimpleNamespace(S=S.float(), response=response, share=torch.full((6,), 7.0))
    each = torch.zeros(6, requires_grad=True)

    def values(_: Tensor, change: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -logsigmoid(change[chosen] - change[rejected])

    value = cross_fitted(values, tokens, each, (CHOSEN, REJECTED))
    assert value.item() == torch.tensor(2.0).log().item()
