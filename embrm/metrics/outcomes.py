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
    own: bool [runs, prompts], the prompts that a run was evaluated on; None: all. Elsewhere its
        values are 0, or NaN for τ-b.
    """

    prompts: pl.DataFrame
    values: dict[str, NDArray[np.float32]]
    own: NDArray[np.bool_] | None = None

    @classmethod
    def of(
        cls,
        prompts: pl.DataFrame,
        outcomes: pl.DataFrame,
        run_ids: Sequence[str],
        data_seeds: Sequence[int] = (),
    ) -> Self:
        """Build it from the stored tables, both filtered to one split.

        prompts: the columns `accuracy.PROMPTS`. outcomes: run_id and the lists `accuracy.OUTCOMES`,
        one row per run, with one entry per prompt. The result has the runs `run_ids`, in that
        order. data_seeds: those of the runs, where `prompts` has the column data_seed.

        Raises: UserError when a run has no outcomes, or not one for each prompt.
        """
        order = pl.DataFrame({"run_id": run_ids}, schema={"run_id": pl.String})
        rows = order.join(outcomes, on="run_id", how="left", maintain_order="left")
        shape = (len(run_ids), prompts.height)
        own = None
        if "data_seed" in prompts.columns and prompts["data_seed"].null_count() < prompts.height:
            own = prompts["data_seed"].to_numpy() == np.array(data_seeds)[:, None]
        expected = np.full(len(run_ids), prompts.height) if own is None else own.sum(axis=1)
        if not (rows["wins"].list.len() == pl.Series(expected)).fill_null(False).all():
            raise UserError(
                "outcomes.parquet and prompts.parquet do not belong to the same sweep: "
                "run the sweep again, finished runs are kept"
            )
        found = {name: rows[name].explode().to_numpy() for name in OUTCOMES}
        if own is None:
            return cls(prompts, {name: values.reshape(shape) for name, values in found.items()})
        spread = {}
        for name, values in found.items():
            spread[name] = np.full(shape, np.nan if name == "tau" else 0.0, np.float32)
            spread[name][own] = values
        return cls(prompts, spread, own)

    @classmethod
    def side_by_side(cls, parts: Sequence[Self]) -> Self:
        """Join the runs of several parts, which must have the same prompts."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in OUTCOMES}
        masks = [part.own for part in parts if part.own is not None]
        return cls(parts[0].prompts, values, np.concatenate(masks) if masks else None)

    def on(self, prompts: pl.Series) -> Self:
        """Keep the prompts where the boolean series `prompts` is true."""
        kept = prompts.to_numpy()
        values = {name: value[:, kept] for name, value in self.values.items()}
        own = None if self.own is None else self.own[:, kept]
        return type(self)(self.prompts.filter(prompts), values, own)

    def by(self, runs: Sequence[int]) -> Self:
        """Keep the runs at these positions, in this order."""
        values = {name: value[list(runs)] for name, value in self.values.items()}
        own = None if self.own is None else self.own[list(runs)]
        return type(self)(self.prompts, values, own)

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
        if self.own is not None:
            below = below * self.own.T
        return above.astype(np.float64), below.astype(np.float64)
