"""Outcomes of many runs on one split, prompt by prompt: the terms of the metrics' ratios, which the
bootstrap resamples."""

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
    """Outcomes of runs on the prompts of one split.

    prompts: one row per (subset, prompt_id), as in `accuracy.EvaluationSplit`.
    values: for each name in `accuracy.OUTCOMES` float32 [runs, prompts].
    """

    prompts: pl.DataFrame
    values: dict[str, NDArray[np.float32]]

    @classmethod
    def of(cls, prompts: pl.DataFrame, outcomes: pl.DataFrame, run_ids: Sequence[str]) -> Self:
        """Build it from the stored tables, both filtered to one split.

        prompts: the columns `accuracy.PROMPTS`. outcomes: run_id and the lists `accuracy.OUTCOMES`,
        one row per run, with one entry per prompt. The result has the runs `run_ids`, in that
        order.

        Raises: UserError when a run has no outcomes, or not one for each prompt.
        """
        order = pl.DataFrame({"run_id": run_ids}, schema={"run_id": pl.String})
        rows = order.join(outcomes, on="run_id", how="left", maintain_order="left")
        shape = (len(run_ids), prompts.height)
        if not (rows["wins"].list.len() == prompts.height).fill_null(False).all():
            raise UserError(
                "outcomes.parquet and prompts.parquet do not belong to the same sweep: "
                "run the sweep again, finished runs are kept"
            )
        return cls(
            prompts, {name: rows[name].explode().to_numpy().reshape(shape) for name in OUTCOMES}
        )

    @classmethod
    def side_by_side(cls, parts: Sequence[Self]) -> Self:
        """Join the runs of several parts, which must have the same prompts."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in OUTCOMES}
        return cls(parts[0].prompts, values)

    def on(self, prompts: pl.Series) -> Self:
        """Keep the prompts where the boolean series `prompts` is true."""
        kept = prompts.to_numpy()
        values = {name: value[:, kept] for name, value in self.values.items()}
        return type(self)(self.prompts.filter(prompts), values)

    def by(self, runs: Sequence[int]) -> Self:
        """Keep the runs at these positions, in this order."""
        values = {name: value[list(runs)] for name, value in self.values.items()}
        return type(self)(self.prompts, values)

    def ratio(self, metric: str) -> tuple[Floats, Floats]:
        """Terms of a metric at each prompt: the metric is Σ first / Σ second, over prompts.

        Both float64 [prompts, runs], or [prompts, 1] where they do not depend on the run. metric:
            accuracy           wins / (pairs - ties)
            nll, brier         nll / pairs, brier / pairs
            length_accuracy    length_wins / (pairs - length_ties)
            tau                τ-b / 1, over the prompts where it is defined
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
            # Rounded to float32 as ties are, so that the difference is 0 where all pairs tie.
            below = pairs.astype(np.float32) - ties if ties.any() else pairs
        else:
            above, below = self.values[metric].T, pairs
        return above.astype(np.float64), below.astype(np.float64)
