"""PPE's human preferences (Frick et al. 2024, arXiv 2410.14872): the accuracy over votes, and how
well the rewards rank the models that wrote the responses.

Every two models have a win rate under the votes, and one under the rewards, where the response with
the higher reward wins and a tie is half a win of each. Bradley-Terry ratings θ, with
P(i beats j) = 1/(1 + exp(θ_j - θ_i)) and mean 0, are fitted to the wins under the votes and to
those under the rewards, in every bootstrap replicate anew. Scores, of the two sets of ratings:
    Spearman's ρ and Kendall's τ-b;
    row-wise Pearson: the mean over models of the correlation of their rows of win rates;
    separability: the share of pairs of models whose 95 % intervals under the rewards do not
        overlap;
    confidence agreement: the mean over pairs of models of +1 where votes and rewards both separate
        the two in the same order, -1 where in opposite orders, 0 where either does not separate;
    Brier score: the mean over pairs of (p - o)², p = Φ((θ_i - θ_j)/√(var_i + var_j)) under the
        rewards, o = 1, ½ or 0 as votes rate i above, equal to or below j.
The last three are BenchBuilder's (Li et al. 2024, arXiv 2406.11939). They are computed from all
replicates together, so they have no interval.

Tied votes are left out. A model that a replicate does not draw has no rating in it. PPE's code has
not been compared with this module.
"""

from collections.abc import Collection, Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit, ndtr

from embrm.metrics.intervals import Replicates, resample
from embrm.suites.accuracies import pooled, scorer_of_cells, voted
from embrm.suites.cells import undefined
from embrm.suites.rows import FAILED, pair_row, winner_of
from embrm.suites.suite import Layout, Row, Suite

Floats = NDArray[np.float64]

RANKS = (
    "Spearman of ratings",
    "Kendall of ratings",
    "row-wise Pearson of win rates",
    "separability",
    "confidence agreement",
    "Brier score of ranks",
)

_RIDGE = 1e-6
"""Weight of the ridge penalty ½·θ² on each rating, relative to the mean log-likelihood of a vote:
it keeps the rating of a model that wins all its comparisons finite."""


def _rows(row: Row) -> Iterator[Row]:
    better = winner_of(row)
    if better is not None:
        texts = row["response_1"], row["response_2"]
        models = row.get("model_a"), row.get("model_b")
        yield pair_row(
            row["prompt"],
            (texts[better], texts[1 - better]),
            row.get("language"),
            (models[better], models[1 - better]),
        )


def ranks(
    pairs: pl.DataFrame, replicates: int, only: Collection[str] | None = None
) -> dict[str, Replicates]:
    """Compute `RANKS`, or those of them in `only`; the module's docstring has the formulas.

    pairs: scores_chosen, scores_rejected, label (the share of the votes that prefer chosen), weight
        (their number), prompt_id, chosen_model and rejected_model.

    All are undefined with fewer than three models, or without the models' columns.
    """
    names = [name for name in RANKS if only is None or name in only]
    models = ("chosen_model", "rejected_model")
    if names and set(models) <= set(pairs.columns):
        votes = pairs.with_columns(pl.col(models).cast(pl.String)).drop_nulls(models)
        votes = votes.filter(pl.col(models[0]) != pl.col(models[1]), pl.col("weight") > 0)
        known = pl.concat([votes[side] for side in models]).unique().sort()
        if len(known) > 2:
            found = _ranked(votes, known, replicates)
            return {name: found[name] for name in names}
    return dict.fromkeys(names, undefined(replicates))


def _ranked(votes: pl.DataFrame, models: pl.Series, replicates: int) -> dict[str, Replicates]:
    count = len(models)
    ends = [
        votes[side].replace_strict(models, range(count), return_dtype=pl.Int64).to_numpy()
        for side in ("chosen_model", "rejected_model")
    ]
    chosen, rejected = (votes[f"scores_{side}"].to_numpy() for side in ("chosen", "rejected"))
    order = (chosen > rejected).astype(np.float64) - (chosen < rejected)
    label, weight = (votes[name].to_numpy() for name in ("label", "weight"))
    # above[vote, kind, side, pair of models]: wins under the votes (kind 0) and under the rewards
    # (kind 1), of the model with the lower number (side 0) and of the other one (side 1).
    first, second = np.minimum(*ends), np.maximum(*ends)
    met, at = np.unique(first * count + second, return_inverse=True)
    chosen_is_first = ends[0] == first
    above = np.zeros((votes.height, 2, 2, len(met)))
    for kind, of_chosen in enumerate((label, order / 2 + 0.5)):
        of_first = np.where(chosen_is_first, of_chosen, 1 - of_chosen)
        above[np.arange(votes.height), kind, 0, at] = weight * of_first
        above[np.arange(votes.height), kind, 1, at] = weight * (1 - of_first)
    resampled = resample(
        votes["prompt_id"],
        above.reshape(votes.height, -1),
        weight[:, None],
        replicates=replicates,
    )
    every = np.concatenate([resampled.estimates[None], resampled.draws])
    # A replicate that draws no prompt has 0/0: count no wins there.
    every = np.nan_to_num(every).reshape(len(every), 2, 2, len(met))
    wins = np.zeros((len(every), 2, count, count))
    wins[..., met // count, met % count] = every[:, :, 0]
    wins[..., met % count, met // count] = every[:, :, 1]
    human, reward = ratings(wins[:, 0]), ratings(wins[:, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = wins / (wins + np.swapaxes(wins, -1, -2))
        statistics = (
            _pearson(_ranks(human), _ranks(reward)),
            _kendall(human, reward),
            _row_wise(rates[:, 0], rates[:, 1]),
        )
    of_replicates = np.full(3, np.nan)
    if resampled.prompts > 1:  # replicates of a single prompt do not vary
        apart = _separated(reward)
        agreed = apart * _separated(human)
        of_replicates[:] = np.abs(apart).mean(), agreed.mean(), _brier(reward, human[0])
    none = np.full(replicates, np.nan)
    values = [*statistics, *(np.append(one, none) for one in of_replicates)]
    return {
        name: Replicates(one[:1], one[1:, None], resampled.prompts, (-1.0, 1.0))
        for name, one in zip(RANKS, values, strict=True)
    }


def ratings(wins: Floats) -> Floats:
    """Bradley-Terry ratings θ: float64 [..., models] with mean 0; NaN for a model without wins or
    losses.

    wins: float64 [..., models, models], of the row's model over the column's, as shares of all
        votes (their sum is about 1).

    Maximizes Σ_ij wins_ij·log sigmoid(θ_i - θ_j) - ½·`_RIDGE`·Σ θ² by Newton's method (Bradley and
    Terry 1952).
    """
    total = wins + np.swapaxes(wins, -1, -2)
    rating = np.zeros(wins.shape[:-1])
    diagonal = np.eye(wins.shape[-1], dtype=np.bool_)
    for _ in range(200):  # Newton steps, clipped to length 1 in each rating
        expected = expit(rating[..., :, None] - rating[..., None, :])
        gradient = (wins - total * expected).sum(axis=-1) - _RIDGE * rating
        curvature = -total * expected * (1 - expected)
        own = _RIDGE - curvature.sum(axis=-1)
        hessian = np.where(diagonal, own[..., None], curvature)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        rating += np.clip(step, -1, 1)
        if np.abs(step).max() < 1e-10:
            break
    # Rounded, so that ratings that are equal up to the solver's precision tie.
    rating = np.round(rating - rating.mean(axis=-1, keepdims=True), 8)
    return np.where(total.any(axis=-1), rating, np.nan)


def _ranks(values: Floats) -> Floats:
    from scipy.stats import rankdata  # slow to load

    ranked: Floats = rankdata(values, axis=-1, nan_policy="omit")
    return ranked


def _pearson(x: Floats, y: Floats) -> Floats:
    """Pearson's r over the last axis, skipping entries where either is NaN; NaN if one is
    constant."""
    known = ~(np.isnan(x) | np.isnan(y))
    count = known.sum(axis=-1, keepdims=True)
    x, y = (np.where(known, side, 0.0) for side in (x, y))
    x, y = (
        np.where(known, side - side.sum(axis=-1, keepdims=True) / count, 0.0) for side in (x, y)
    )
    squares = np.square(x).sum(axis=-1) * np.square(y).sum(axis=-1)
    return (x * y).sum(axis=-1) / np.sqrt(np.where(squares > 1e-24, squares, np.nan))


def _kendall(x: Floats, y: Floats) -> Floats:
    """Kendall's τ-b over the last axis, skipping entries where either is NaN."""
    first, second = np.triu_indices(x.shape[-1], k=1)
    x, y = (np.nan_to_num(np.sign(side[..., first] - side[..., second])) for side in (x, y))
    return (x * y).sum(axis=-1) / np.sqrt(np.abs(x).sum(axis=-1) * np.abs(y).sum(axis=-1))


def _row_wise(x: Floats, y: Floats) -> Floats:
    """Pearson's r between the rows of two matrices, averaged over the rows where it is defined."""
    rows = _pearson(x, y)
    known = ~np.isnan(rows)
    return np.where(known, rows, 0.0).sum(axis=-1) / known.sum(axis=-1)


def _separated(rated: Floats) -> Floats:
    """For every two models: 1 or -1 where the 95 % interval of the first lies above or below that
    of the second, 0 where they overlap.

    rated: float64 [1 + replicates, models], the estimates first. NaN ratings are skipped.
    """
    low, high = np.nanquantile(rated[1:], [0.025, 0.975], axis=0)
    first, second = np.triu_indices(rated.shape[-1], k=1)
    above, below = low[first] > high[second], low[second] > high[first]
    return above.astype(np.float64) - below


def _brier(rated: Floats, human: Floats) -> float:
    """Brier score of P(first model is better) under the rewards; see the module's docstring.

    rated: ratings under the rewards [1 + replicates, models], the estimates first. human: ratings
    under the votes [models].
    """
    first, second = np.triu_indices(rated.shape[-1], k=1)
    variance = np.nanvar(rated[1:], axis=0)
    spread = np.sqrt(variance[first] + variance[second])
    difference = rated[0, first] - rated[0, second]
    z = np.divide(difference, spread, out=np.copysign(np.inf, difference), where=spread > 0)
    p = ndtr(np.where(difference == 0, 0.0, z))
    outcome = np.sign(human[first] - human[second]) / 2 + 0.5
    return float(np.square(p - outcome).mean())


def _scores(
    pairs: pl.DataFrame, replicates: int, only: Collection[str] | None
) -> dict[str, Replicates]:
    return scorer_of_cells(pooled)(pairs, replicates, only) | ranks(voted(pairs), replicates, only)


SUITE = Suite(
    name="ppe-human",
    hub="lmarena-ai/PPE-Human-Preference-V1",
    hub_split="test",
    layouts=(
        Layout(
            ("prompt", "response_1", "response_2", "winner"),
            ("model_a", "model_b", "language"),
            _rows,
        ),
    ),
    scores=_scores,
    main=("accuracy",),
    failed=FAILED,
)
