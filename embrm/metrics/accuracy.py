"""Metrics of a run on a split, and the per-prompt sums that intervals are made of."""

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
"""What no run changes: sums over the pairs of a (subset, prompt)."""

OUTCOMES = ("wins", "ties", "nll", "brier", "tau")
"""What a run did on each (subset, prompt): sums over its pairs, and Kendall's τ-b of its group."""

_KEYS = ["subset", "prompt_id"]


@dataclass(frozen=True, eq=False)
class EvaluationSplit:
    """A split's pairs and groups, made ready once for the rewards of many runs.

    rows: int64 [n], the distinct responses that are rewarded, ascending.
    prompts: one row a (subset, prompt_id), sorted by them, nulls last; columns `PROMPTS`, where
        pairs is the total weight, hence the number of pairs when no weights are given, and
        length_wins and length_ties are of "the longer response in tokens is better".

    The other fields number pairs, responses (places in `rows`) and prompts (rows of `prompts`).
    """

    rows: Indices
    prompts: pl.DataFrame
    chosen: Indices
    rejected: Indices
    prompt_of: Indices
    weight: Floats
    agreeing: Floats
    """Weight times label: of the two labels that a pair can have, the share of "chosen"."""
    opposing: Floats
    rankings: Rankings
    fixed: dict[str, float]
    """Metrics that no run changes."""

    @classmethod
    def of(cls, pairs: pl.DataFrame, members: pl.DataFrame, n_response: NDArray[np.int32]) -> Self:
        """Of the pairs and group members of one split.

        pairs: chosen, rejected (responses), prompt_id, subset, label, weight.
        members: response, prompt_id, subset, gold.
        n_response: tokens of every response, int32 [responses].
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
        """Score one run's `rewards` float32 [n], those of `rows`.

        temperature: fitted on other pairs, NaN where none fits.

        With Δ = r_chosen - r_rejected and q = label, the probability that chosen is better, a
        pair adds, times its weight:
            wins     q·[Δ > 0] + (1-q)·[Δ < 0], the expected agreement with a label drawn from q
            ties     [Δ = 0]
            nll      -q·logsigmoid(Δ) - (1-q)·logsigmoid(-Δ)
            brier    q·(1-sigmoid(Δ))² + (1-q)·sigmoid(Δ)², the expected squared error
            margin   (2q-1)·Δ

        Returns the metrics, and `OUTCOMES` float32 [prompts] in the order of `prompts`: these
        sums without the margin, and tau, NaN where it is undefined. Metrics are computed in
        float64:
            accuracy = wins / (pairs - ties), so a tie is neither right nor wrong; ties = share of
            pairs; nll, brier, margin = means; *_calibrated at Δ/temperature; ece of 15 bins;
            length_accuracy of "longer is better", its ties apart too; tau = mean over the prompts
            where it is defined; reward_mean and reward_sd (population) over `rows`.
            NaN where nothing is defined.
        Sums run in a fixed order, so the same input gives the same bits.

        Raises: UserError when a reward is not finite.
        """
        rewards64 = rewards.astype(np.float64)
        bad = rewards64.size - np.count_nonzero(np.isfinite(rewards64))
        if bad:
            raise UserError(
                f"{bad} of {rewards64.size} rewards are not finite: the run diverged; "
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
        with np.errstate(over="ignore"):  # a loss beyond float32 is stored as infinite
            outcomes = {name: values.astype(np.float32) for name, values in sums.items()}
        return metrics, outcomes | {"tau": taus.astype(np.float32)}

    def _errors(self, distance: Floats, won: Floats, lost: Floats) -> tuple[Floats, Floats, Floats]:
        """Confidence sigmoid(|Δ|), and weighted nll and brier, each [pairs].

        won, lost: weight of the label that the sign of Δ agrees with, and of the other one. From
        e = exp(-|Δ|), which cannot overflow: sigmoid(|Δ|) = 1/(1+e), sigmoid(-|Δ|) = e/(1+e) and
        -logsigmoid(|Δ|) = log1p(e), -logsigmoid(-|Δ|) = log1p(e) + |Δ|.
        """
        e = np.exp(-distance)
        confidence = 1 / (1 + e)
        nll = self.weight * np.log1p(e) + lost * distance
        brier = won * np.square(e * confidence) + lost * np.square(confidence)
        return confidence, nll, brier

    def _by_prompt(self, terms: Floats) -> Floats:
        return np.bincount(self.prompt_of, terms, self.prompts.height).astype(np.float64)


def _numbered(pairs: pl.DataFrame, members: pl.DataFrame) -> tuple[pl.DataFrame, Indices, Indices]:
    """Distinct (subset, prompt_id), sorted; and the number of each pair's and member's."""
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
