"""Objectives: gradients against float64 autograd of the textbook formulas, and identities."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embrm.core.errors import UserError
from embrm.training.heads import HeadSpec, initialise, pair_rewards, stack
from embrm.training.objectives import Objective, ObjectiveBank, bsr, centering, logitnorm
from embrm.training.pairs import PairRewards

LOSSES = ("bt", "hinge", "logitnorm", "bt_dr", "classifier")


def _log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x.abs())) + torch.minimum(x, torch.zeros_like(x))


# As a textbook writes them, in float64 and for one slot: c, r, m → [B].
TEXTBOOK: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bt": lambda c, r, m: -_log_sigmoid(c - r - m),
    "hinge": lambda c, r, m: torch.clamp(m - (c - r), min=0),
    "logitnorm": lambda c, r, _: -_log_sigmoid((c - r) / torch.sqrt(c**2 + r**2)),
    "bt_dr": lambda c, r, _: -_log_sigmoid(c - r) - _log_sigmoid(c) - _log_sigmoid(-r),
    "classifier": lambda c, r, _: -0.5 * _log_sigmoid(c) - 0.5 * _log_sigmoid(-r),
}


def _textbook(
    o: Objective, c: Tensor, r: Tensor, label: Tensor, weight: Tensor, margin: Tensor
) -> Tensor:
    f = TEXTBOOK[o.loss]
    m = torch.full_like(c, 1.0 if o.loss == "hinge" else 0.0)
    if o.margin is not None:
        m = torch.full_like(c, o.margin)
    if o.margin_scale is not None:
        m = o.margin_scale * margin
    q = label * (1 - o.label_smoothing) + (1 - label) * o.label_smoothing
    pair = q * f(c, r, m) + (1 - q) * f(r, c, m)
    both = torch.cat([c, r])
    return (
        (weight * pair).sum() / len(c)
        + o.bsr * (o.bsr_batch or len(c)) * both.mean() ** 2
        + o.centering * ((c + r) ** 2).mean()
    )


OBJECTIVES = [
    *(Objective(loss=loss) for loss in LOSSES),
    Objective(margin=0.7),
    Objective(margin_scale=0.5),
    Objective(loss="hinge", margin=0.3),
    Objective(loss="hinge", margin_scale=2.0),
    *(Objective(loss=loss, label_smoothing=0.1) for loss in LOSSES if loss != "hinge"),
    Objective(bsr=0.01),
    Objective(bsr=0.01, bsr_batch=512),
    Objective(centering=0.05),
    Objective(loss="logitnorm", bsr=0.1, centering=0.01, label_smoothing=0.2),
]


def _of(bank: ObjectiveBank, chosen: Tensor, rejected: Tensor) -> PairRewards:
    total = chosen + rejected
    return PairRewards(chosen - rejected, total[bank.totals], total[bank.means].mean(1) / 2)


def _r_bar_squared(chosen: Tensor, rejected: Tensor) -> Tensor:
    return bsr((chosen + rejected).mean(1) / 2)


def _bank_gradient(
    objectives: list[Objective],
    c: Tensor,
    r: Tensor,
    label: Tensor,
    weight: Tensor,
    margin: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss [P], and its gradient with respect to the 2B rewards, [P, 2B]."""
    both = torch.cat([c, r]).float().repeat(len(objectives), 1).requires_grad_()
    bank = ObjectiveBank(objectives, len(c), soft_labels=bool((label != 1).any()))
    rewards = _of(bank, both[:, : len(c)], both[:, len(c) :])
    loss = bank.data_loss(rewards, label.float(), weight.float(), margin.float())
    (gradient,) = torch.autograd.grad(loss.sum(), both)
    return loss.detach(), gradient


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_equal_autograd_of_the_textbook_formulas(soft: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    c, r = (2 * torch.randn(2, 33, generator=generator)).float().double()
    label = (torch.rand(33, generator=generator) if soft else torch.ones(33)).double()
    weight = (torch.rand(33, generator=generator) * 2).double()
    margin = torch.rand(33, generator=generator).double()
    loss, gradient = _bank_gradient(OBJECTIVES, c, r, label, weight, margin)
    for slot, objective in enumerate(OBJECTIVES):
        both = torch.cat([c, r]).requires_grad_()
        expected = _textbook(objective, both[:33], both[33:], label, weight, margin)
        (expected_gradient,) = torch.autograd.grad(expected, both)
        torch.testing.assert_close(loss[slot].double(), expected.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(
            gradient[slot].double(), expected_gradient, rtol=2e-5, atol=2e-7, msg=str(objective)
        )


HEADS = (HeadSpec(), HeadSpec(kind="mlp", widths=(7, 5)))


def _reward(parameters: dict[str, Tensor], slot: int, h: Tensor) -> Tensor:
    """Rewards of one slot by the textbook formula, for h [n, d]."""
    for layer in range(len(parameters) // 2):
        weight, bias = (parameters[f"hidden.{layer}.{name}"][slot] for name in ("weight", "bias"))
        h = torch.clamp(h @ weight.T + bias, min=0)
    return h @ parameters["output.weight"][slot]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_parameter_gradients_in_a_bank_equal_autograd_of_the_textbook_formulas(
    head: HeadSpec, soft: bool
) -> None:
    """All objectives in one bank, with pairs that share responses, against float64 autograd."""
    generator = torch.Generator().manual_seed(2)
    X = torch.randn(20, 6, generator=generator)
    chosen, rejected = torch.randint(20, (2, 33), generator=generator)
    label = torch.rand(33, generator=generator) if soft else torch.ones(33)
    weight, margin = torch.rand(2, 33, generator=generator)
    objectives = [o.model_copy(update={"l2": 0.1 * (i % 2)}) for i, o in enumerate(OBJECTIVES)]
    bank = stack([initialise(head, 6, seed) for seed in range(len(objectives))])
    leaves = [tensor.requires_grad_() for tensor in bank.values()]
    loss = ObjectiveBank(objectives, 33, soft_labels=soft)
    r = pair_rewards(bank, X, chosen, rejected, loss.totals, loss.means)
    total = loss.data_loss(r, label, weight, margin) + loss.weight_loss(leaves)
    gradients = torch.autograd.grad(total.sum(), leaves)

    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in bank.items()}
    expected = torch.zeros((), dtype=torch.float64)
    for slot, objective in enumerate(objectives):
        c, r = (_reward(wide, slot, X[side].double()) for side in (chosen, rejected))
        own = _textbook(objective, c, r, label.double(), weight.double(), margin.double())
        squares = sum((tensor[slot] ** 2).sum() for tensor in wide.values())
        expected = expected + own + objective.l2 / 2 * squares
    reference = torch.autograd.grad(expected, [*wide.values()])
    for found, known in zip(gradients, reference, strict=True):
        torch.testing.assert_close(found.double(), known, rtol=2e-4, atol=2e-6)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 2)
        | st.sampled_from([(0.0, 0.0), (1e4, -1e4)]),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 1),
)
def test_any_reward_gives_a_finite_loss_and_gradient(
    rewards: list[tuple[float, float]], label: float
) -> None:
    c, r = (torch.tensor(side) for side in zip(*rewards, strict=True))
    size = len(rewards)
    loss, gradient = _bank_gradient(
        OBJECTIVES, c, r, torch.full((size,), label), torch.ones(size), torch.ones(size)
    )
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


def test_a_confidently_wrong_pair_keeps_its_gradient() -> None:
    one = torch.ones(1)
    _, gradient = _bank_gradient(
        [Objective()], torch.tensor([-1e4]), torch.tensor([1e4]), one, one, one
    )
    assert gradient.tolist() == [[-1.0, 1.0]]


def test_losses_at_zero_rewards_in_closed_form() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    loss, _ = _bank_gradient([Objective(loss=name) for name in LOSSES], zero, zero, one, one, one)
    ln2 = math.log(2)
    torch.testing.assert_close(loss, torch.tensor([ln2, 1.0, ln2, 3 * ln2, ln2]))


def test_logitnorm_is_invariant_to_the_scale_of_rewards() -> None:
    c, r = torch.randn(2, 1, 20)
    torch.testing.assert_close(logitnorm(c, r), logitnorm(1000 * c, 1000 * r))
    assert (logitnorm(c, r) >= -math.log(1 / (1 + math.exp(-math.sqrt(2)))) - 1e-6).all()


def test_bt_sees_only_differences_and_bsr_only_midpoints() -> None:
    c, r = torch.randn(2, 1, 16, dtype=torch.float64)
    bank = ObjectiveBank([Objective()], 16, soft_labels=False)
    one = torch.ones(16)
    torch.testing.assert_close(
        bank.data_loss(_of(bank, c + 5, r + 5), one, one, None),
        bank.data_loss(_of(bank, c, r), one, one, None),
    )
    spread = torch.randn(1, 16, dtype=torch.float64)
    torch.testing.assert_close(_r_bar_squared(c + spread, r - spread), _r_bar_squared(c, r))


def test_bsr_of_a_batch_is_mean_squared_plus_variance() -> None:
    """E[λB·m̄²] = λB·μ² + λ·Var(m), over all batches of B midpoints drawn with replacement."""
    midpoints = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.1], dtype=torch.float64)
    B, weight = 3, 0.01
    batches = torch.stack([midpoints[list(rows)] for rows in product(range(5), repeat=B)])
    spread = torch.randn_like(batches)
    mean_penalty = (weight * B * _r_bar_squared(batches + spread, batches - spread)).mean()
    expected = weight * B * midpoints.mean() ** 2 + weight * midpoints.var(correction=0)
    torch.testing.assert_close(mean_penalty, expected)


def test_centering_is_bsr_of_one_pair_at_a_quarter() -> None:
    c, r = torch.randn(2, 10, 1, dtype=torch.float64)
    torch.testing.assert_close(0.25 * centering(c + r), _r_bar_squared(c, r))


def test_bsr_gradient_is_the_same_for_every_item() -> None:
    c, r = torch.randn(2, 8).double()
    one = torch.ones(8)
    _, with_bsr = _bank_gradient([Objective(bsr=0.1)], c, r, one, one, one)
    _, without = _bank_gradient([Objective()], c, r, one, one, one)
    # d(λB r̄²)/dr_i = 2λB·r̄/(2B) = λ·r̄
    expected = 0.1 * torch.cat([c, r]).mean().float()
    torch.testing.assert_close(with_bsr - without, expected.expand(1, 16), rtol=1e-4, atol=1e-6)


def test_the_effective_coefficient_of_bsr() -> None:
    assert Objective(bsr=0.001).bsr_effective(512) == pytest.approx(0.512)
    assert Objective(bsr=0.001, bsr_batch=8).bsr_effective(512) == pytest.approx(0.008)


def test_l2_is_half_the_squared_norm_of_all_parameters() -> None:
    bank = ObjectiveBank([Objective(l2=0.5), Objective()], 4, soft_labels=False)
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 3)]
    expected = 0.25 * sum(float((t[0] ** 2).sum()) for t in tensors)
    assert bank.weight_loss(tensors).tolist() == pytest.approx([expected, 0.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "bradley"}, "loss = 'bradley': unknown loss: valid: bt"),
        ({"loss": "logitnrm"}, "did you mean 'logitnorm'"),
        ({"bsr": -0.1}, r"bsr = -0.1: must be greater than or equal to 0"),
        ({"l2": float("nan")}, "finite"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "logitnorm", "margin": 1.0}, "has no margin"),
        ({"loss": "classifier", "margin_scale": 1.0}, "has no margin"),
        ({"margin": 1.0, "margin_scale": 1.0}, "keep one"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "only rescales"),
        ({"bsr_batch": 8}, "without bsr"),
        ({"marign": 1.0}, "did you mean 'margin'"),
    ],
)
def test_invalid_objectives_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Objective.parse(values, "test")
