"""Simulated annotators: draw noisy preference labels for pairs whose gold scores are known."""

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit

from embrm.data.splits import draws

Floats = NDArray[np.float64]


def win_probability(difference: Floats, gold_sd: float, quality: float) -> Floats:
    """Probability that a Boltzmann annotator prefers the first of two responses.

    sigmoid(quality · difference / gold_sd), as in arXiv 2502.04357. difference: gold score of the
    first response minus that of the second; gold_sd: standard deviation of gold over responses.
    """
    return np.asarray(expit(quality * difference / gold_sd))


def annotate(pairs: pl.DataFrame, gold_sd: float, quality: float, seed: int) -> pl.DataFrame:
    """Label every pair with one simulated annotator's choice: 1.0 for chosen, 0.0 for rejected.

    pairs: columns pair_id and margin (gold score of chosen minus that of rejected). Returns the
    columns pair_id and label. The uniform number compared with `win_probability` depends on pair_id
    and seed only, not on quality: with chosen the better response, every pair that an annotator
    gets wrong is also wrong for any annotator of lower quality under the same seed.
    """
    wins = win_probability(pairs["margin"].to_numpy(), gold_sd, quality)
    uniform = np.array(draws(pairs["pair_id"], seed, "annotator"), dtype=np.float64) / 2**64
    prefers = uniform < wins
    return pairs.select("pair_id", label=pl.Series(prefers.astype(np.float64)))
