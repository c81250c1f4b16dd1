"""Reliability: how often heads that are so sure are right (arXiv 1706.04599, fig. 1)."""

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit

from embrm.metrics.accuracy import EvaluationSplit
from embrm.metrics.calibration import BINS, bins_of
from embrm.metrics.intervals import resample

FEW = 10
"""Prompts a bin needs for an interval: the bootstrap of fewer is no guide."""


def reliability(
    split: EvaluationSplit, rewards: NDArray[np.float32], temperatures: NDArray[np.float64]
) -> pl.DataFrame:
    """The bins of the calibration error: a pair counts in the direction that the head prefers, so
    its predicted probability sigmoid(|Δ|/T) is at least one half.

    rewards: float32 [seeds, rows of the split]; temperatures: float64 [seeds], 1 for none.

    Columns: bin (from 0), lowest and highest (its edges), pairs (mean over seeds), prompts,
    predicted (mean probability), observed (share of the labels that agree, a tie being half a
    pair), low and high (95 %, over prompts, seeds added up; null of fewer than `FEW` prompts, or
    where all are right or all wrong).
    Empty bins are left out. With one seed Σ pairs·|observed - predicted| / Σ pairs is its ece.
    """
    prompts = split.prompts.height
    sums = np.zeros((3, prompts * BINS))  # of weight, predicted, and what is right
    for own, temperature in zip(rewards.astype(np.float64), temperatures, strict=True):
        margins = own[split.chosen] - own[split.rejected]
        predicted = expit(np.abs(margins) / temperature)
        right = np.where(margins > 0, split.agreeing, split.opposing)
        right[margins == 0] = split.weight[margins == 0] / 2
        cell = split.prompt_of * BINS + bins_of(predicted)
        for total, terms in zip(sums, (split.weight, split.weight * predicted, right), strict=True):
            total += np.bincount(cell, terms, total.size)
    weight, predicted, right = sums.reshape(3, prompts, BINS)
    prompt_ids = split.prompts["prompt_id"]
    found = resample(prompt_ids, right, weight)
    low, high = (np.full(BINS, np.nan) for _ in range(2))
    filled = weight.any(axis=0)
    counts = np.array(
        [prompt_ids.filter(pl.Series(weight[:, number] > 0)).n_unique() for number in range(BINS)]
    )
    for number in np.flatnonzero(counts >= FEW):
        draws = found.draws[:, number]
        low[number], high[number] = np.quantile(draws[~np.isnan(draws)], [0.025, 0.975])
    with np.errstate(invalid="ignore"):
        mean = predicted.sum(axis=0) / weight.sum(axis=0)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    columns = {
        "bin": np.arange(BINS),
        "lowest": edges[:-1],
        "highest": edges[1:],
        "pairs": weight.sum(axis=0) / len(rewards),
        "prompts": counts,
        "predicted": mean,
        "observed": found.estimates,
        "low": low,
        "high": high,
    }
    table = pl.DataFrame(columns).filter(pl.Series(filled))
    told = pl.col("low") < pl.col("high")  # where all are alike the bootstrap says nothing
    return table.with_columns(pl.when(told).then(pl.col("low", "high").fill_nan(None)))
