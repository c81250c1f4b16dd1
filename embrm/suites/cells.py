"""Cells: the means that a benchmark's scores are made of, resampled over prompts.

A cell is a mean over pairs or items, such as the accuracy of a subset or one place of a matrix, and
a score is a fixed weighted mean of cells. So prompts are resampled once for all cells, and every
score of a replicate is the same weighted mean.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from embrm.metrics.intervals import Replicates, resample

Formula = dict[str, float]
"""Cell → its share; the shares add up to 1. Empty: undefined, for want of cells."""


@dataclass(frozen=True)
class Cells:
    """Terms of a suite's cells, and the scores made of them.

    terms: cell, prompt_id, value, weight: a cell is Σ weight·value / Σ weight.
    scores: name of a score → its formula, in the order they are shown.
    bounds: lowest and highest value of the scores that do not lie in 0 … 1.
    """

    terms: pl.DataFrame
    scores: dict[str, Formula]
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def terms(
    rows: pl.DataFrame, *, cell: pl.Expr, value: pl.Expr, weight: pl.Expr | None = None
) -> pl.DataFrame:
    """Terms of `rows`, which count by their own weight where they have one and none is given."""
    given = pl.col("weight") if "weight" in rows.columns else pl.lit(1.0)
    return rows.select(
        cell=cell,
        prompt_id="prompt_id",
        value=value.cast(pl.Float64),
        weight=(given if weight is None else weight).cast(pl.Float64),
    )


def weighted(weights: Mapping[str, float]) -> Formula:
    """Cells in these proportions."""
    total = sum(weights.values())
    return {cell: weight / total for cell, weight in weights.items()}


def mean_of(parts: Sequence[Formula], weights: Sequence[float] | None = None) -> Formula:
    """The weighted mean of scores; undefined where one of them is."""
    if not all(parts):
        return {}
    shares = weights or [1] * len(parts)
    together: Formula = {}
    for part, share in zip(parts, shares, strict=True):
        for cell, weight in part.items():
            together[cell] = together.get(cell, 0.0) + weight * share / sum(shares)
    return together


def replicated(
    cells: Cells, replicates: int, only: Collection[str] | None = None
) -> dict[str, Replicates]:
    """Each score, or those named in `only`, as replicates of one run. prompts: those of its own
    cells; NaN where a cell is missing."""
    scores = {
        name: formula for name, formula in cells.scores.items() if only is None or name in only
    }
    used = {cell for formula in scores.values() for cell in formula}
    rows = cells.terms.filter(pl.col("cell").is_in(used))
    names = rows["cell"].unique(maintain_order=True)
    prompts = rows["prompt_id"].unique(maintain_order=True)
    above, below = np.zeros((2, len(prompts), len(names)))
    at = tuple(
        rows[column].replace_strict(values, range(len(values)), return_dtype=pl.Int64)
        for column, values in (("prompt_id", prompts), ("cell", names))
    )
    value, weight = (rows[column].to_numpy() for column in ("value", "weight"))
    np.add.at(above, at, value * weight)
    np.add.at(below, at, weight)
    found = resample(prompts, above, below, replicates=replicates) if len(names) else None
    number = {name: index for index, name in enumerate(names)}
    scored = {}
    for name, formula in scores.items():
        if found is None or not formula or not set(formula) <= set(number):
            scored[name] = undefined(replicates)
            continue
        own, shares = [number[cell] for cell in formula], np.array(list(formula.values()))
        scored[name] = Replicates(
            estimates=(found.estimates[None, own] * shares).sum(axis=1),
            draws=(found.draws[:, own] * shares).sum(axis=1, keepdims=True),
            prompts=int(below[:, own].any(axis=1).sum()),
            bounds=cells.bounds.get(name, (0.0, 1.0)),
        )
    return scored


def undefined(replicates: int) -> Replicates:
    """A score that cannot be computed, of one run."""
    return Replicates(np.full(1, np.nan), np.full((replicates, 1), np.nan), 0)
