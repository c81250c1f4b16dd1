"""Benchmark scores as fixed weighted means of cells, with bootstrap replicates over prompts.

A cell is a weighted mean over pairs or items, such as the accuracy of a subset or one entry of
RM-Bench's matrix of styles. Prompts are resampled once for all cells, and every score is then
computed from the cells of each replicate with the same weights.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from embrm.metrics.intervals import Replicates, resample

Formula = dict[str, float]
"""Cell → its weight in a score. An empty formula is an undefined score: a cell it needs is missing.
The weights add up to 1, except those of RewardBench 2's Ties, which add up to 1.01."""


@dataclass(frozen=True)
class Cells:
    """The cells of one run on a suite, and the scores that are computed from them.

    terms: columns cell, prompt_id, value and weight; a cell is Σ weight·value / Σ weight over its
        rows.
    scores: name of a score → its formula, in the order in which scores are shown.
    bounds: lowest and highest possible value of the scores whose range is not 0 … 1.
    """

    terms: pl.DataFrame
    scores: dict[str, Formula]
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def terms(
    rows: pl.DataFrame, *, cell: pl.Expr, value: pl.Expr, weight: pl.Expr | None = None
) -> pl.DataFrame:
    """One term per row, in the columns of `Cells.terms`.

    weight: by default the column weight of `rows`, or 1 where they have none.
    """
    given = pl.col("weight") if "weight" in rows.columns else pl.lit(1.0)
    return rows.select(
        cell=cell,
        prompt_id="prompt_id",
        value=value.cast(pl.Float64),
        weight=(given if weight is None else weight).cast(pl.Float64),
    )


def weighted(weights: Mapping[str, float]) -> Formula:
    """The formula with these weights, divided by their sum."""
    total = sum(weights.values())
    return {cell: weight / total for cell, weight in weights.items()}


def mean_of(parts: Sequence[Formula], weights: Sequence[float] | None = None) -> Formula:
    """The formula of a weighted mean of scores; undefined (empty) where one of them is.

    weights: by default 1 each.
    """
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
    """Compute every score, or those named in `only`, with its bootstrap replicates, for one run.

    A score counts the prompts of the cells it uses. It is NaN where one of its cells is missing.
    """
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
    """NaN for a score of one run that cannot be computed."""
    return Replicates(np.full(1, np.nan), np.full((replicates, 1), np.nan), 0)
