"""Fit logistic regression, ridge or trees by scikit-learn, in place of training a head.

Logistic regression and ridge become linear heads. Fitted trees could only be stored as pickles, so
the rewards that they give to every response of the cache are stored instead.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embrm.core.errors import UserError
from embrm.core.streams import stream
from embrm.training.curve import TrainedRun, ValidationMonitor
from embrm.training.data import TrainingData
from embrm.training.heads import REWARDS, Preprocess, PreprocessKind
from embrm.training.learner_specs import BINS, GradientBoosting, Learner, Ridge
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore

Floats = NDArray[np.float64]

_ROWS = 512
"""Number of states that are converted to float64 at a time."""

_TOLERANCE = 1e-8
"""Logistic regression stops when no component of the gradient exceeds this, which is far below the
precision of its float32 weights."""

_ITERATIONS = 10_000


@dataclass(frozen=True)
class Gold:
    """Gold scores, float64 [n], that ridge is fitted to. rows: int64 [n], of the states."""

    rows: Tensor
    score: Tensor


def fit(
    learner: Learner, preprocess: PreprocessKind, seed: int, data: TrainingData, gold: Gold | None
) -> TrainedRun:
    """Fit `learner` to the training pairs of `data`, or ridge to `gold`.

    Returns a run of one epoch. The steps in its curve are the solver's iterations. Its training
    loss is a mean over pairs (logistic), responses (ridge) or the responses of pairs (boosting),
    and includes the penalty of the two linear learners.

    Raises: UserError when there are too few rows, or no minimum is found.
    """
    fitted = data.preprocess(preprocess)
    if isinstance(learner, GradientBoosting):
        rewards, loss = _boosted(learner, seed, data)
        parameters, steps = {REWARDS: rewards[None]}, learner.iterations
    else:
        if isinstance(learner, Ridge):
            assert gold is not None  # The sweep has checked this.
            X = _taken(data.states, fitted, gold.rows)
            w, loss = ridge(learner.alpha, X, gold.score.numpy())
            steps = 1
        else:
            w, loss, steps = fit_logistic(learner.C, *_better_minus_worse(data, fitted))
        parameters = {"output.weight": torch.from_numpy(w).float()[None]}
    if not all(bool(tensor.isfinite().all()) for tensor in parameters.values()):
        raise UserError(f"learner {learner.kind!r}: its rewards are not finite: regularize it more")
    measured = ValidationMonitor(data, fitted).measure(parameters)
    row: dict[str, Any] = {"epoch": 1, "step": steps, "train_loss": loss, "regularizer": None}
    row |= {name: values[0] for name, values in measured.items()}
    if REWARDS in parameters:
        row["weight_norm"] = None
    return TrainedRun(parameters, fitted, [row], 1, None)


def fit_logistic(C: float, X: Floats, weight: Floats) -> tuple[Floats, float, int]:
    """Find the w [d] that minimises L = ½‖w‖² - C·Σ weight·logsigmoid(X·w).

    X: [n, d], the better response's state minus the worse one's; it is overwritten. weight: [n].
    Returns w, L / (C·Σ weight) and the number of iterations.

    Raises: UserError for fewer than two rows, or when no minimum is found.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if len(X) < 2:
        raise UserError("learner 'logistic' with one training pair: it needs at least two")
    X[1::2] *= -1  # scikit-learn wants both classes; this leaves the loss as it is.
    better = np.arange(len(X)) % 2 == 0
    regression = LogisticRegression(C=C, fit_intercept=False, tol=_TOLERANCE, max_iter=_ITERATIONS)
    with warnings.catch_warnings():
        # Also emitted where rounding prevents further progress, which is as good as convergence.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(X, better, sample_weight=weight)
    steps = int(regression.n_iter_[0])
    if steps >= _ITERATIONS:
        raise UserError(
            f"learner 'logistic': no minimum after {steps:,} iterations: lower C, or take "
            "preprocess = 'standardize'"
        )
    w: Floats = regression.coef_[0]
    losses = np.logaddexp(0, np.where(better, -1, 1) * (X @ w))
    total = weight.sum()
    return w, float(weight @ losses / total + w @ w / (2 * C * total)), steps


def ridge(alpha: float, X: Floats, score: Floats) -> tuple[Floats, float]:
    """Find the w [d] that, with some b, minimises L = ‖score - X·w - b‖² + alpha·‖w‖².

    X: [n, d], states; it is overwritten. score: [n]. Returns w and L / n.
    """
    import sklearn.linear_model

    X -= X.mean(0)
    centred = score - score.mean()
    regression = sklearn.linear_model.Ridge(alpha, fit_intercept=False, copy_X=False)
    w: Floats = regression.fit(X, centred).coef_
    error = centred - X @ w
    return w, float((error @ error + alpha * (w @ w)) / len(X))


@dataclass(frozen=True)
class Trees:
    """A fitted classifier of states whose components are replaced by their bins.

    edges: float64 [254, d], ascending; a component's bin is the number of edges below it.
    """

    edges: Floats
    model: Any

    def rewards(self, X: Floats) -> Floats:
        """Compute the log-odds [n] of the states X [n, d], which are overwritten."""
        _bin(X, self.edges)
        found: Floats = self.model.decision_function(X)
        return found


def boosting(
    learner: GradientBoosting, seed: int, X: Floats, won: NDArray[np.bool_], weight: Floats
) -> Trees:
    """Fit trees that classify the states X [n, d] by `won`; X is overwritten. weight: [n].

    States are binned here, with equally many rows in each bin, because scikit-learn's own binning
    takes the weights into account, which takes longer than growing all trees.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    share = np.linspace(0, 1, BINS)[1:-1]
    edges = np.stack(
        [np.quantile(column, share, method="averaged_inverted_cdf") for column in X.T], axis=1
    )
    _bin(X, edges)
    model = HistGradientBoostingClassifier(
        learning_rate=learner.learning_rate,
        max_iter=learner.iterations,
        max_leaf_nodes=learner.leaves,
        l2_regularization=learner.l2,
        max_features=learner.features,
        early_stopping=False,  # It would hold out responses to prompts that are trained on.
        random_state=int(stream(seed if learner.seeded else 0, "learner").integers(2**31)),
    )
    return Trees(edges, model.fit(X, won, sample_weight=weight))


def _bin(X: Floats, edges: Floats) -> None:
    for column, own in zip(X.T, edges.T, strict=True):
        column[:] = np.searchsorted(own, column)


def _boosted(learner: GradientBoosting, seed: int, data: TrainingData) -> tuple[Tensor, float]:
    """Fit trees; returns the rewards float32 of all states, and the mean training loss."""
    rows, won, lost = wins_and_losses(data.train)
    every = torch.cat([rows[won > 0], rows[lost > 0]])
    target = np.repeat([True, False], [int((won > 0).sum()), int((lost > 0).sum())])
    weight = np.concatenate([won[won > 0], lost[lost > 0]])
    X = _taken(data.states, Preprocess(None, None), every)
    trees = boosting(learner, seed, X, target, weight)
    del X
    rewards = torch.empty(len(data.states.values))
    responses = torch.arange(len(rewards))
    for some in _parts(len(rewards)):
        X = data.states.take(responses[some]).cpu().double().numpy()
        rewards[some] = torch.from_numpy(trees.rewards(X)).float()
    data.states.release_pages()
    losses = np.logaddexp(0, np.where(target, -1, 1) * rewards[every].double().numpy())
    return rewards, float(weight @ losses / weight.sum())


def wins_and_losses(pairs: Pairs) -> tuple[Tensor, Floats, Floats]:
    """Sum the wins and losses of every response over its pairs.

    A pair of label p and weight w counts as a win of its chosen response with weight w·p, and as a
    loss with w·(1 - p); for its rejected response it is the reverse. Summing them makes at most two
    rows of a response that occurs in many pairs, and does not change the loss.

    Returns the responses, int64 ascending, and their weights of wins and of losses.
    """
    rows, places = torch.cat([pairs.chosen, pairs.rejected]).unique(return_inverse=True)
    label, weight = pairs.label.double().numpy(), pairs.weight.double().numpy()
    better, worse = weight * label, weight * (1 - label)

    def total(*sides: Floats) -> Floats:
        return np.bincount(places.numpy(), np.concatenate(sides), len(rows)).astype(np.float64)

    return rows, total(better, worse), total(worse, better)


def _better_minus_worse(data: TrainingData, preprocess: Preprocess) -> tuple[Floats, Floats]:
    """Make X [n, d] and weights [n] for `fit_logistic`.

    A pair of label p counts with weight p in its own direction and 1 - p in the other.
    """
    pairs, states = data.train, data.states
    label, weight = pairs.label.double(), pairs.weight.double()
    own, other = (label > 0).nonzero()[:, 0], (label < 1).nonzero()[:, 0]
    better = torch.cat([pairs.chosen[own], pairs.rejected[other]])
    worse = torch.cat([pairs.rejected[own], pairs.chosen[other]])
    X = np.empty((len(better), states.width))
    for some in _parts(len(X)):
        X[some] = preprocess(states.take(better[some]).cpu()).numpy()
        X[some] -= preprocess(states.take(worse[some]).cpu()).numpy()
    states.release_pages()
    weights = torch.cat([weight[own] * label[own], weight[other] * (1 - label[other])])
    return X, weights.numpy()


def _taken(states: RowStore, preprocess: Preprocess, rows: Tensor) -> Floats:
    """Read and preprocess the states in `rows`, float64 [n, d]."""
    X = np.empty((len(rows), states.width))
    for some in _parts(len(X)):
        X[some] = preprocess(states.take(rows[some]).cpu()).numpy()
    states.release_pages()
    return X


def _parts(count: int) -> list[slice]:
    return [slice(first, first + _ROWS) for first in range(0, count, _ROWS)]
