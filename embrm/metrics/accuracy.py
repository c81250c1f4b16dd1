"""Metrics of one run on an evaluation split (accuracy, NLL, Brier score, ECE, Kendall's τ-b), and
the sums per prompt that the bootstrap of `embrm.metrics.intervals` resamples."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.metrics.calibration import expected_calibration_error
from embrm.metrics.groups import Rankings

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

PROMPTS: dict[str, pl.DataType] = {
    "subset": pl.String(),
    "prompt_id": pl.String(),
    "pairs": pl.Float64(),
    "length_wins": pl.Float64(),
    "length_ties": pl.Float64(),
}
"""Columns of the prompt table, one row per (subset, prompt). The sums over its pairs depend on the
data alone, not on a run."""

OUTCOMES = ("wins", "ties", "nll", "brier", "tau")
"""What is stored of a run for each (subset, prompt): the sums over its pairs of the terms in
`EvaluationSplit.evaluate`, and Kendall's τ-b of its group."""

_KEYS = ["subset", "prompt_id"]


@dataclass(frozen=True, eq=False)
class EvaluationSplit:
    """The pairs and groups of an evaluation split, prepared once and used for many runs.

    rows: int64 [n], the distinct responses that need a reward, ascending.
    prompts: one row per (subset, prompt_id), sorted by them with nulls last, with the columns
        `PROMPTS`: pairs is the total weight of the pairs (their number where weights are 1),
        length_wins and length_ties are the wins and ties of token counts used as rewards.
    chosen, rejected: int64 [pairs], positions in `rows`.
    prompt_of: int64 [pairs], rows of `prompts`.
    weight: float64 [pairs].
    """

    rows: Indices
    prompts: pl.DataFrame
    chosen: Indices
    rejected: Indices
    prompt_of: Indices
    weight: Floats
    agreeing: Floats
    """weight·q, float64 [pairs], q being the label: the probability that chosen is better."""
    opposing: Floats
    """weight·(1-q), float64 [pairs]."""
    rankings: Rankings
    fixed: dict[str, float]
    """Metrics that are the same for all runs: pairs, prompts and length_accuracy."""

    @classmethod
    def of(cls, pairs: pl.DataFrame, members: pl.DataFrame, n_response: NDArray[np.int32]) -> Self:
        """Prepare a split.

        pairs: columns chosen, rejected (numbers of responses), prompt_id, subset, label, weight.
        members: the members of groups, with columns response, prompt_id, subset, gold.
        n_response: int32 [responses], the number of tokens of every response.
        """
        sides = [
            table[column].to_numpy().astype(np.int64)
            for table, column in ((pairs, "chosen"), (pairs, "rejected"), (members, "response"))
        ]
        rows, places = np.unique(np.concatenate(sides), return_inverse=True)
        chosen, rejected, listed = np.split(places, np.cumsum([len(side) for side in sides[:2]]))
        label = pairs["label"].to_numpy().astype(np.float64)
        weight = pairs["weight"].to_numpy().astype(np.float64)
        tokens = n_response[rows].astype(np.int64)
        longer = np.sign(tokens[chosen] - tokens[rejected])
        sums = {
            "pairs": weight,
            "length_wins": weight * np.where(longer > 0, label, np.where(longer, 1 - label, 0.0)),
            "length_ties": weight * (longer == 0),
        }
        keys, prompt_of, group_of = _numbered(pairs, members)
        prompts = keys.with_columns(
            pl.Series(name, np.bincount(prompt_of, term, keys.height), dtype=pl.Float64)
            for name, term in sums.items()
        )
        total = {name: float(prompts[name].to_numpy().sum()) for name in sums}
        return cls(
            rows=rows,
            prompts=prompts,
            chosen=chosen,
            rejected=rejected,
            prompt_of=prompt_of,
            weight=weight,
            agreeing=weight * label,
            opposing=weight * (1 - label),
            rankings=Rankings.of(
                listed, members["gold"].to_numpy().astype(np.float64), group_of, keys.height
            ),
            fixed={
                "pairs": total["pairs"],
                "prompts": float(keys["prompt_id"].n_unique()),
                "length_accuracy": _ratio(
                    total["length_wins"], total["pairs"] - total["length_ties"]
                ),
            },
        )

    def evaluate(
        self, rewards: NDArray[np.float32], temperature: float
    ) -> tuple[dict[str, float], dict[str, NDArray[np.float32]]]:
        """Compute the metrics of one run.

        rewards: float32 [n], of the responses `rows`. temperature: T of `fit_temperature`, fitted
        on other pairs; NaN where it could not be fitted.

        With Δ = r_chosen - r_rejected and the label q, the probability that chosen is better, each
        pair contributes, times its weight:
            wins     q·[Δ > 0] + (1-q)·[Δ < 0], the expected agreement with a label drawn from q
            ties     [Δ = 0]
            nll      -q·logsigmoid(Δ) - (1-q)·logsigmoid(-Δ), the Bradley-Terry loss
            brier    q·(1-sigmoid(Δ))² + (1-q)·sigmoid(Δ)², the expected squared error (Brier 1950)
            margin   (2q-1)·Δ

        Returns the metrics, and for each name in `OUTCOMES` float32 [prompts], in the order of
        `prompts`: the sums of these terms (margin excepted), and tau. Metrics are float64, NaN
        where undefined:
            accuracy         Σ wins / Σ (weight - ties), so ties count as neither right nor wrong
            ties, nll, brier, margin    weighted means over pairs
            nll_calibrated, brier_calibrated, ece_calibrated    with Δ/T in place of Δ
            ece              `expected_calibration_error` with `BINS` bins
            tau              mean over the prompts where `Rankings.taus` is defined
            length_accuracy  accuracy with token counts in place of rewards
            reward_mean, reward_sd      over `rows`; population standard deviation
        Sums are taken in a fixed order, so the same input always gives the same bits.

        Raises: UserError when a reward is not finite.
        """
        rewards64 = rewards.astype(np.float64)
        bad = rewards64.size - np.count_nonzero(np.isfinite(rewards64))
        if bad:
            raise UserError(
                f"{bad} of {rewards64.size} rewards are not finite, the run diverged: "
                "lower its learning rate"
            )
        margins = rewards64[self.chosen] - rewards64[self.rejected]
        positive = margins > 0
        won = np.where(positive, self.agreeing, self.opposing)
        lost = np.where(positive, self.opposing, self.agreeing)
        tied = np.flatnonzero(margins == 0)
        distance = np.abs(margins)
        confidence, nll, brier = self._errors(distance, won, lost)

        ties = np.zeros_like(margins)
        ties[tied] = self.weight[tied]
        wins, correct = won.copy(), won.copy()
        wins[tied] = 0.0
        correct[tied] = ties[tied] / 2
        taus = self.rankings.taus(rewards64)
        ranked = taus[~np.isnan(taus)]
        sums = {
            "wins": self._by_prompt(wins),
            "ties": self._by_prompt(ties),
            "nll": self._by_prompt(nll),
            "brier": self._by_prompt(brier),
        }
        pairs = self.fixed["pairs"]
        total = {name: float(values.sum()) for name, values in sums.items()}
        metrics = {
            **self.fixed,
            "accuracy": _ratio(total["wins"], pairs - total["ties"]),
            "ties": _ratio(total["ties"], pairs),
            "nll": _ratio(total["nll"], pairs),
            "brier": _ratio(total["brier"], pairs),
            "ece": expected_calibration_error(confidence, correct, self.weight),
            "margin": _ratio(float(((self.agreeing - self.opposing) * margins).sum()), pairs),
            "tau": _ratio(float(ranked.sum()), ranked.size),
            "reward_mean": _ratio(float(rewards64.sum()), rewards64.size),
            "reward_sd": float(rewards64.std()) if rewards64.size else float("nan"),
            "nll_calibrated": float("nan"),
            "brier_calibrated": float("nan"),
            "ece_calibrated": float("nan"),
        }
        if not np.isnan(temperature):
            confidence, nll, brier = self._errors(distance / temperature, won, lost)
            metrics |= {
                "nll_calibrated": _ratio(float(nll.sum()), pairs),
                "brier_calibrated": _ratio(float(brier.sum()), pairs),
                "ece_calibrated": expected_calibration_error(confidence, correct, self.weight),
            }
        with np.errstate(over="ignore"):  # a loss too large for float32 is stored as inf
            outcomes = {name: values.astype(np.float32) for name, values in sums.items()}
        return metrics, outcomes | {"tau": taus.astype(np.float32)}

    def _errors(self, distance: Floats, won: Floats, lost: Floats) -> tuple[Floats, Floats, Floats]:
        """Confidence sigmoid(|Δ|), and weighted nll and brier, each float64 [pairs].

        distance: |Δ|. won, lost: the weight of the label that the sign of Δ agrees with, and that
        of the other label. All follow from e = exp(-|Δ|), which cannot overflow:
        sigmoid(|Δ|) = 1/(1+e), sigmoid(-|Δ|) = e/(1+e), -logsigmoid(|Δ|) = log1p(e) and
        -logsigmoid(-|Δ|) = log1p(e) + |Δ|.
        """
        e = np.exp(-distance)
        confidence = 1 / (1 + e)
        nll = self.weight * np.log1p(e) + lost * distance
        brier = won * np.square(e * confidence) + lost * np.square(confidence)
        return confidence, nll, brier

    def _by_prompt(self, terms: Floats) -> Floats:
        return np.bincount(self.prompt_of, terms, self.prompts.height).astype(np.float64)


def _numbered(pairs: pl.DataFrame, members: pl.DataFrame) -> tuple[pl.DataFrame, Indices, Indices]:
    """The distinct (subset, prompt_id), sorted, and their row number for each pair and member."""
    keys = (
        pl.concat([pairs.select(_KEYS), members.select(_KEYS)])
        .unique()
        .sort(_KEYS, nulls_last=True)
    )
    numbered = keys.with_row_index("number")

    def number(rows: pl.DataFrame) -> Indices:
        joined = rows.select(_KEYS).join(
            numbered, on=_KEYS, how="left", nulls_equal=True, maintain_order="left"
        )
        return joined["number"].cast(pl.Int64).to_numpy()

    return keys, number(pairs), number(members)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
