"""Reliability diagrams: predicted probability against observed accuracy, in bins (Guo et al. 2017,
arXiv 1706.04599, fig. 1)."""

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit

from embrm.metrics.accuracy import EvaluationSplit
from embrm.metrics.calibration import BINS, bins_of
from embrm.metrics.intervals import resample

FEW = 10
"""Fewest prompts in a bin for an interval: the bootstrap is not reliable with fewer."""


def reliability(
    split: EvaluationSplit, rewards: NDArray[np.float32], temperatures: NDArray[np.float64]
) -> pl.DataFrame:
    """Compute the reliability diagram of one configuration, in the bins of
    `calibration.expected_calibration_error`.

    A pair counts in the direction of the head's preference, with the predicted probability
    sigmoid(|Δ|/T) ≥ ½.

    rewards: float32 [seeds, n], of `split.rows`. temperatures: float64 [seeds], T; 1 for none.

    Returns one row per bin that is not empty, with the columns bin (from 0), lowest and highest
    (its edges), pairs (mean over seeds), prompts, predicted (mean probability), observed (share of
    labels that agree with the preference; a tie counts half), low and high (95 % bootstrap interval
    of observed over prompts, with the pairs of all seeds added up; null with fewer than `FEW`
    prompts, or where all pairs are right or all wrong). With one seed,
    Σ pairs·|observed - predicted| / Σ pairs is the expected calibration error.
    """
    prompts = split.prompts.height
    sums = np.zeros((3, prompts * BINS))  # of weight, weight·predicted, and the weight that agrees
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
    varies = pl.col("low") < pl.col("high")  # without variance the bootstrap has no interval
    return table.with_columns(pl.when(varies).then(pl.col("low", "high").fill_nan(None)))
