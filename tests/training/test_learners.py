"""Learners against scikit-learn on explicit rows, and against a bt head trained in the bank."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import sklearn.ensemble
import sklearn.linear_model
import torch
from pydantic import TypeAdapter

from embrm.core.errors import UserError
from embrm.training.bank import train
from embrm.training.data import TrainingData
from embrm.training.heads import REWARDS, score_states
from embrm.training.learner_specs import GradientBoosting, Learner, Logistic, Ridge
from embrm.training.learners import Gold, boosting, fit, fit_logistic, ridge, wins_and_losses
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore
from embrm.training.spec import TrainSpec

WIDTH = 6
SMALL: dict[str, Any] = {"kind": "gradient_boosting", "iterations": 8, "leaves": 4}


def _pairs(random: np.random.Generator, n: int, responses: int, soft: bool) -> Pairs:
    sides = [random.permutation(responses)[:n] for _ in range(2)]
    label = random.choice([0.0, 0.3, 0.8, 1.0], n) if soft else np.ones(n)
    weight = random.choice([0.5, 1.0, 3.0], n) if soft else np.ones(n)
    tensors = [torch.from_numpy(values).float() for values in (label, weight)]
    return Pairs(*(torch.from_numpy(side) for side in sides), *tensors, None)


def _data(seed: int = 0, *, n: int = 300, responses: int = 700, soft: bool = False) -> TrainingData:
    random = np.random.default_rng(seed)
    states = random.standard_normal((responses, WIDTH)) * [1, 2, 1, 0.5, 1, 1] + 0.3
    good = states @ [1, 0, -1, 0.5, 0, 0] + random.standard_normal(responses)
    pairs = _pairs(random, n, responses, soft)
    worse = torch.from_numpy(good)[pairs.chosen] < torch.from_numpy(good)[pairs.rejected]
    chosen = torch.where(worse, pairs.rejected, pairs.chosen)
    rejected = torch.where(worse, pairs.chosen, pairs.rejected)
    train_on = Pairs(chosen, rejected, pairs.label, pairs.weight, None)
    return TrainingData(
        RowStore(torch.from_numpy(states).float()), train_on, _pairs(random, 50, responses, False)
    )


def _both_ways(data: TrainingData) -> tuple[Any, Any, Any]:
    """Write every pair as two rows, one in each direction: X, y, weight."""
    pairs, states = data.train, data.states.values.double().numpy()
    X = states[pairs.chosen] - states[pairs.rejected]
    weight, label = pairs.weight.double().numpy(), pairs.label.double().numpy()
    y = np.repeat([1, 0], len(X))
    return np.concatenate([X, X]), y, np.concatenate([weight * label, weight * (1 - label)])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_equals_sklearn_on_every_pair_in_both_directions(soft: bool, C: float) -> None:
    data = _data(soft=soft)
    result = fit(Logistic(kind="logistic", C=C), "none", 0, data, None)
    X, y, weight = _both_ways(data)
    reference = sklearn.linear_model.LogisticRegression(
        C=C, fit_intercept=False, tol=1e-10, max_iter=1000
    ).fit(X, y, sample_weight=weight)
    w = result.parameters["output.weight"][0].numpy()
    np.testing.assert_allclose(w, reference.coef_[0], rtol=1e-5, atol=1e-6)
    [row] = result.curve
    nll = -weight @ np.where(y == 1, *reference.predict_log_proba(X).T[::-1])
    penalty = (reference.coef_**2).sum() / 2
    assert row["train_loss"] == pytest.approx((nll + penalty / C) / weight.sum(), rel=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_logistic_is_the_bt_head_at_its_minimum(soft: bool) -> None:
    data, C = _data(soft=soft), 0.2
    l2 = 1 / (C * float(data.train.weight.sum()))
    spec = TrainSpec(l2=l2, lr=0.05, epochs=600, batch_pairs=10_000, schedule="cosine")
    [head] = train([spec], TrainingData(data.states, data.train, _pairs_none()))
    result = fit(Logistic(kind="logistic", C=C), "none", 0, data, None)
    w, expected = (found.parameters["output.weight"] for found in (result, head))
    assert (w - expected).norm() <= 1e-3 * expected.norm()
    assert result.curve[0]["train_loss"] == pytest.approx(head.curve[-1]["train_loss"], rel=1e-5)


def _pairs_none() -> Pairs:
    empty = torch.empty(0, dtype=torch.int64)
    return Pairs(empty, empty, torch.empty(0), torch.empty(0), None)


def test_logistic_ends_with_zero_gradient_whatever_the_scale() -> None:
    random = np.random.default_rng(3)
    X = random.standard_normal((200, 5)) * [1e-3, 1, 30, 1, 1]
    weight, C = random.random(200), 10.0
    w, _, _ = fit_logistic(C, X.copy(), weight)
    slope = w - C * X.T @ (weight / (1 + np.exp(X @ w)))
    assert np.abs(slope).max() < 1e-4 * C * np.abs(X.T @ weight).max()
    with pytest.raises(UserError, match="one training pair"):
        fit_logistic(1.0, X[:1], weight[:1])


@pytest.mark.parametrize("width", [5, 300])  # fewer components than rows, and more
def test_ridge_equals_sklearn_with_an_intercept(width: int) -> None:
    random = np.random.default_rng(1)
    X = random.standard_normal((100, width)) + 2
    gold = X[:, 0] + random.standard_normal(100) + 7
    w, loss = ridge(3.0, X.copy(), gold)
    reference = sklearn.linear_model.Ridge(3.0).fit(X, gold)
    np.testing.assert_allclose(w, reference.coef_, rtol=1e-6, atol=1e-9)
    error = gold - reference.predict(X)
    assert loss == pytest.approx((error @ error + 3 * w @ w) / 100)


def test_ridge_reads_only_gold_and_its_head_ranks_by_it() -> None:
    data = _data()
    rows = torch.arange(0, 700, 2)
    gold = Gold(rows, data.states.values[rows, 1].double() * 5 - 2)
    [one, two] = [
        fit(Ridge(kind="ridge", alpha=1e-6), "standardize", 0, some, gold)
        for some in (data, TrainingData(data.states, data.train, _pairs_none()))
    ]
    assert torch.equal(one.parameters["output.weight"], two.parameters["output.weight"])
    assert two.curve[0]["validation_nll"] is None
    rewards = score_states(one.parameters, one.preprocess, data.states, torch.arange(700))[0]
    expected = data.states.values[:, 1] * 5
    torch.testing.assert_close(rewards - rewards[0], expected - expected[0], rtol=1e-4, atol=1e-4)


def test_a_response_of_many_pairs_becomes_at_most_one_win_and_one_loss() -> None:
    pairs = Pairs(
        torch.tensor([5, 2, 5]), torch.tensor([2, 5, 9]), torch.tensor([1.0, 0.25, 0.5]),
        torch.tensor([1.0, 4.0, 2.0]), None,
    )  # fmt: skip
    rows, won, lost = wins_and_losses(pairs)
    assert rows.tolist() == [2, 5, 9]
    assert won.tolist() == [1.0, 1 + 3 + 1, 1.0]
    assert lost.tolist() == [1 + 3, 1 + 1, 1.0]


def test_boosting_is_sklearns_on_the_ends_and_rewards_every_response() -> None:
    data = _data(n=300)  # no response twice on a side
    pairs, states = data.train, data.states.values.double().numpy()
    learner = GradientBoosting(**SMALL, l2=2.0)
    result = fit(learner, "none", 0, data, None)
    assert [*result.parameters] == [REWARDS]
    rewards = result.parameters[REWARDS]
    assert rewards.shape == (1, 700)
    both = torch.cat([pairs.chosen, pairs.rejected])
    reference = sklearn.ensemble.HistGradientBoostingClassifier(
        max_iter=8, max_leaf_nodes=4, l2_regularization=2.0, early_stopping=False
    ).fit(states[both], np.repeat([1, 0], 300))
    same = np.isclose(rewards[0], reference.decision_function(states), atol=1e-5)
    assert same[both].all()
    assert same.mean() > 0.98  # others may lie where a split could be anywhere between two rows
    chance = reference.predict_proba(states)
    nll = -np.log(np.concatenate([chance[pairs.chosen, 1], chance[pairs.rejected, 0]])).mean()
    assert result.curve[0]["train_loss"] == pytest.approx(nll, rel=1e-5)
    some = torch.tensor([3, 600, 3])
    assert torch.equal(score_states(result.parameters, result.preprocess, data.states, some)[0],
                       rewards[0, some])  # fmt: skip


def test_seeds_draw_features_and_nothing_else() -> None:
    data = _data()

    def rewards(**settings: Any) -> list[bytes]:
        learner = GradientBoosting(**SMALL, **settings)
        assert learner.seeded == bool(settings)
        found = [fit(learner, "none", seed, data, None) for seed in (0, 0, 1)]
        return [one.parameters[REWARDS].numpy().tobytes() for one in found]

    assert len(set(rewards())) == 1
    first, again, other = rewards(features=0.3)
    assert first == again != other


def test_a_fit_takes_no_more_room_than_it_says() -> None:
    random = np.random.default_rng(0)
    rows, width = 20_000, 40
    X, gold = random.standard_normal((rows, width)), random.standard_normal(rows)
    ones = np.ones(rows)

    def taken(learner: Learner) -> int:
        tracemalloc.start()
        try:
            own = X.copy()
            if isinstance(learner, Logistic):
                fit_logistic(learner.C, own, ones)
            elif isinstance(learner, Ridge):
                ridge(learner.alpha, own, gold)
            else:
                boosting(learner, 0, own, gold > 0, ones)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    vectors = 16 * 8 * rows  # of labels, weights, gradients and the like
    fit_logistic(1.0, X[:9].copy(), ones[:9])  # libraries set themselves up on first use
    boosting(GradientBoosting(**SMALL), 0, X[:99], gold[:99] > 0, ones[:99])
    for learner in (Logistic(kind="logistic"), Ridge(kind="ridge"), GradientBoosting(**SMALL)):
        assert taken(learner) < learner.room(rows, width) + vectors, learner


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "logistic", "C": 0.0},
        {"kind": "ridge", "alpha": -1.0},
        {"kind": "ridge", "C": 1.0},
        {**SMALL, "leaves": 1},
        {**SMALL, "features": 0.0},
        {"kind": "svm"},
        {"C": 1.0},
    ],
)
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        TypeAdapter(Learner).validate_python(values)
