"""What many runs did on one split, prompt by prompt: the numbers that intervals are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.metrics.accuracy import OUTCOMES

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """prompts: a row a (subset, prompt_id), as in `accuracy.EvaluationSplit`; values: for each of
    `accuracy.OUTCOMES` float32 [runs, prompts]."""

    prompts: pl.DataFrame
    values: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, prompts: pl.DataFrame, outcomes: pl.DataFrame, run_ids: Sequence[str]) -> Self:
        """From stored tables, reduced to one split: prompts; and outcomes, one row per run with
        lists in their order. Runs follow `run_ids`.

        Raises: UserError when a run has no outcomes, or not one for each prompt.
        """
        order = pl.DataFrame({"run_id": run_ids}, schema={"run_id": pl.String})
        rows = order.join(outcomes, on="run_id", how="left", maintain_order="left")
        shape = (len(run_ids), prompts.height)
        if not (rows["wins"].list.len() == prompts.height).fill_null(False).all():
            raise UserError(
                "outcomes.parquet and prompts.parquet are not of the same sweep: "
                "run the sweep again, finished runs are kept"
            )
        return cls(
            prompts, {name: rows[name].explode().to_numpy().reshape(shape) for name in OUTCOMES}
        )

    @classmethod
    def side_by_side(cls, parts: Sequence[Self]) -> Self:
        """The runs of several, one part after another, which have the same prompts."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in OUTCOMES}
        return cls(parts[0].prompts, values)

    def on(self, prompts: pl.Series) -> Self:
        """On the prompts where the boolean `prompts` holds."""
        kept = prompts.to_numpy()
        values = {name: value[:, kept] for name, value in self.values.items()}
        return type(self)(self.prompts.filter(prompts), values)

    def by(self, runs: Sequence[int]) -> Self:
        """Of the runs in these places."""
        values = {name: value[list(runs)] for name, value in self.values.items()}
        return type(self)(self.prompts, values)

    def ratio(self, metric: str) -> tuple[Floats, Floats]:
        """Numerator and denominator of accuracy, nll, brier, length_accuracy or tau at each prompt.

        float64 [prompts, runs]; [prompts, 1] where all runs are alike. The metric is the sum of
        the one over prompts divided by the sum of the other.
        """
        if metric == "tau":
            tau = self.values["tau"].T
            return np.nan_to_num(tau).astype(np.float64), (~np.isnan(tau)).astype(np.float64)
        pairs = self.prompts["pairs"].to_numpy()[:, None]
        if metric == "length_accuracy":
            wins, ties = (self.prompts[f"length_{name}"].to_numpy() for name in ("wins", "ties"))
            return wins[:, None], pairs - ties[:, None]
        if metric == "accuracy":
            above, ties = self.values["wins"].T, self.values["ties"].T
            # Rounded as the ties are, so that where all pairs tie exactly nothing is left.
            below = pairs.astype(np.float32) - ties if ties.any() else pairs
        else:
            above, below = self.values[metric].T, pairs
        return above.astype(np.float64), below.astype(np.float64)
