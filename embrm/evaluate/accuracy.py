"""Metrics of one run on one split, and the per-prompt sums that intervals are made of."""

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit

from embrm.errors import UserError
from embrm.evaluate.calibration import expected_calibration_error
from embrm.evaluate.groups import kendall_taus

Floats = NDArray[np.float64]

PROMPT_SCHEMA: dict[str, pl.DataType] = {
    "subset": pl.String(),
    "prompt_id": pl.String(),
    "pairs": pl.Float64(),
    "wins": pl.Float64(),
    "ties": pl.Float64(),
    "nll": pl.Float64(),
    "brier": pl.Float64(),
    "margin": pl.Float64(),
    "length_wins": pl.Float64(),
    "length_ties": pl.Float64(),
    "tau": pl.Float64(),
}
"""Columns of the per-prompt table. All but tau are sums over the pairs of (subset, prompt)."""

_KEYS = ["subset", "prompt_id"]


def evaluate_split(
    pairs: pl.DataFrame,
    members: pl.DataFrame,
    n_response: NDArray[np.int32],
    rewards: NDArray[np.float32],
    temperature: float,
) -> tuple[dict[str, float], pl.DataFrame]:
    """Score `rewards` float32 [responses] on the pairs and group members of one split.

    pairs: chosen, rejected (rows of `rewards`), prompt_id, subset, label, weight.
    members: response (row of `rewards`), prompt_id, subset, gold.
    n_response: response tokens, int32 [responses]; temperature: fitted on other pairs, NaN where
    none fits.

    With Δ = r_chosen - r_rejected and q = label, the probability that chosen is better, a pair
    adds, times its weight:
        wins     q·[Δ > 0] + (1-q)·[Δ < 0], the expected agreement with a label drawn from q
        ties     [Δ = 0]
        nll      -q·logsigmoid(Δ) - (1-q)·logsigmoid(-Δ)
        brier    q·(1-sigmoid(Δ))² + (1-q)·sigmoid(Δ)², the expected squared error
        margin   (2q-1)·Δ
    and `pairs` is the total weight, hence the number of pairs when no weights are given.

    Returns the metrics and the per-prompt table (`PROMPT_SCHEMA`, sorted by subset, prompt_id):
        accuracy = wins / (pairs - ties), so a tie is neither right nor wrong; ties = share of
        pairs; nll, brier, margin = means; *_calibrated at Δ/temperature; ece of 15 bins;
        length_accuracy of "the longer response in tokens is better", its ties apart too;
        tau = mean Kendall τ-b over the prompts where it is defined; reward_mean and reward_sd
        (population) over the distinct responses of the split. NaN where nothing is defined.
    Sums run in row order, so the same input gives the same bits.

    Raises: UserError when a reward of the split is not finite.
    """
    chosen = pairs["chosen"].to_numpy()
    rejected = pairs["rejected"].to_numpy()
    listed = members["response"].to_numpy()
    used = np.zeros(len(rewards), dtype=bool)
    for rows in (chosen, rejected, listed):
        used[rows] = True
    rewards = np.asarray(rewards, dtype=np.float64)
    in_split = rewards[used]
    if not np.isfinite(in_split).all():
        count = int((~np.isfinite(in_split)).sum())
        raise UserError(
            f"{count} of {in_split.size} rewards are not finite: the run diverged; "
            "lower its learning rate"
        )

    margins = rewards[chosen] - rewards[rejected]
    label = pairs["label"].to_numpy().astype(np.float64)
    weight = pairs["weight"].to_numpy().astype(np.float64)
    lengths = np.sign(n_response[chosen].astype(np.int64) - n_response[rejected])
    terms = {
        "pairs": weight,
        "wins": weight * _agreement(margins, label),
        "ties": weight * (margins == 0),
        "nll": weight * _nll(margins, label),
        "brier": weight * _brier(margins, label),
        "margin": weight * (2 * label - 1) * margins,
        "length_wins": weight * _agreement(lengths, label),
        "length_ties": weight * (lengths == 0),
    }

    keys, pair_group, member_group = _groups(pairs, members)
    taus = kendall_taus(
        rewards[listed], members["gold"].to_numpy().astype(np.float64), member_group, keys.height
    )
    prompts = keys.with_columns(
        *(
            pl.Series(name, np.bincount(pair_group, term, minlength=keys.height), dtype=pl.Float64)
            for name, term in terms.items()
        ),
        pl.Series("tau", taus, dtype=pl.Float64).fill_nan(None),
    ).select(list(PROMPT_SCHEMA))

    total = {name: float(term.sum()) for name, term in terms.items()}
    calibrated = margins / temperature
    outcomes, outcome_weights = _outcomes(margins, label, weight)
    metrics = {
        "pairs": total["pairs"],
        "prompts": float(keys["prompt_id"].n_unique()),
        "accuracy": _ratio(total["wins"], total["pairs"] - total["ties"]),
        "ties": _ratio(total["ties"], total["pairs"]),
        "nll": _ratio(total["nll"], total["pairs"]),
        "brier": _ratio(total["brier"], total["pairs"]),
        "ece": expected_calibration_error(outcomes, 1.0, weights=outcome_weights),
        "nll_calibrated": _ratio(float(weight @ _nll(calibrated, label)), total["pairs"]),
        "brier_calibrated": _ratio(float(weight @ _brier(calibrated, label)), total["pairs"]),
        "ece_calibrated": expected_calibration_error(
            outcomes, temperature, weights=outcome_weights
        ),
        "margin": _ratio(total["margin"], total["pairs"]),
        "length_accuracy": _ratio(total["length_wins"], total["pairs"] - total["length_ties"]),
        "tau": _ratio(float(np.nansum(taus)), float(np.isfinite(taus).sum())),
        "reward_mean": float(in_split.mean()) if in_split.size else float("nan"),
        "reward_sd": float(in_split.std()) if in_split.size else float("nan"),
    }
    return metrics, prompts


def _agreement(margins: Floats, label: Floats) -> Floats:
    return np.where(margins > 0, label, np.where(margins < 0, 1 - label, 0.0))


def _nll(margins: Floats, label: Floats) -> Floats:
    # -logsigmoid(x) = log(1 + e^-x), and logsigmoid(-x) = logsigmoid(x) - x
    with np.errstate(invalid="ignore"):  # margins are NaN where there is no temperature
        return np.logaddexp(0.0, -margins) + (1 - label) * margins


def _brier(margins: Floats, label: Floats) -> Floats:
    return label * expit(-margins) ** 2 + (1 - label) * expit(margins) ** 2


def _outcomes(margins: Floats, label: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """A soft label as two weighted hard ones; hard labels stay as they are."""
    if (label == 1).all():
        return margins, weight
    return (
        np.concatenate([margins, -margins]),
        np.concatenate([weight * label, weight * (1 - label)]),
    )


def _groups(
    pairs: pl.DataFrame, members: pl.DataFrame
) -> tuple[pl.DataFrame, NDArray[np.int64], NDArray[np.int64]]:
    """Distinct (subset, prompt_id), sorted; and the number of each pair's and member's group."""
    keys = (
        pl.concat([pairs.select(_KEYS), members.select(_KEYS)])
        .unique()
        .sort(_KEYS, nulls_last=True)
    )
    numbered = keys.with_row_index("group")

    def number(rows: pl.DataFrame) -> NDArray[np.int64]:
        joined = rows.select(_KEYS).join(
            numbered, on=_KEYS, how="left", nulls_equal=True, maintain_order="left"
        )
        return joined["group"].cast(pl.Int64).to_numpy()

    return keys, number(pairs), number(members)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
