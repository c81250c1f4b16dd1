"""A world where all configurations are equally good, to count how often intervals and p-values of
`embrm.metrics.intervals.compare` find a difference, and how often intervals cover the truth.

`python tests/helpers/seed_world.py` prints the tables of docs/methods.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.special import ndtr

from embrm.metrics.intervals import Replicates, compare, holm, prompt_counts

SEEDS, CONFIGURATIONS, PROMPTS = (2, 3, 5, 10), (2, 10, 50), (40, 200, 1000)

ALIKE = (0.25, 0.1, 0.0)
"""What a seed does to all prompts alike, in units of the prompts' standard deviation. With it, the
accuracy of a configuration has a standard deviation over seeds of 7.6, 3.0 and 0 points."""

_LEVEL = 0.6
_OF_PROMPT, _OF_CONFIGURATION, _OF_RUN = 1.0, 0.4, 0.4
"""Standard deviations of what a prompt adds for all runs, for a configuration, and for one run."""


@dataclass(frozen=True)
class Rates:
    """What a world's tables showed, as shares.

    false_positives: tables with any difference to the baseline of which Holm's p is below 0.05.
    unpooled: the same if each s² between seeds is taken at face value and p from a normal
        distribution of variance σ² over prompts plus s²/k.
    differences, estimates: intervals that contain the truth.
    width: mean width of the intervals of the differences.
    """

    false_positives: float
    unpooled: float
    differences: float
    estimates: float
    width: float


def simulate(
    seeds: int,
    configurations: int,
    prompts: int,
    *,
    alike: float | Sequence[float],
    trials: int,
    replicates: int = 400,
) -> Rates:
    """Compare `configurations` equally good ones with the first of them, `trials` times.

    A run ranks the pair of a prompt right where 0.6 + prompt + prompt-by-configuration +
    prompt-by-run + luck of the run > 0. All terms are normal; their standard deviations are 1, 0.4,
    0.4 and `alike`, which may differ by configuration. Luck is the same for all prompts.
    """
    random = np.random.default_rng([seeds, configurations, prompts])
    luck = np.broadcast_to(alike, configurations)[:, None]
    variance = _OF_PROMPT**2 + _OF_CONFIGURATION**2 + _OF_RUN**2
    truth = ndtr(_LEVEL / np.sqrt(variance + luck**2))[:, 0]
    names = [f"{name:02}" for name in range(configurations)]
    runs = pl.DataFrame(
        [(name, seed) for name in names for seed in range(seeds)],
        schema=["name", "seed"],
        orient="row",
    )
    counts = prompt_counts([str(prompt) for prompt in range(prompts)], replicates).astype(float)
    counts /= counts.sum(axis=1, keepdims=True)
    found = np.zeros(5)
    for _ in range(trials):
        margins = _LEVEL + _OF_PROMPT * random.normal(size=(prompts, 1, 1))
        margins = margins + _OF_CONFIGURATION * random.normal(size=(prompts, configurations, 1))
        margins = margins + _OF_RUN * random.normal(size=(prompts, configurations, seeds))
        margins = margins + luck * random.normal(size=(configurations, seeds))
        right = (margins > 0).reshape(prompts, -1).astype(float)
        result = Replicates(right.mean(axis=0), counts @ right, prompts)
        table = compare(result, runs, names[0])
        low, high = table.select("low", "high").to_numpy().T
        other_low, other_high = table.select("difference_low", "difference_high")[1:].to_numpy().T
        gain = truth[1:] - truth[0]
        found += (
            bool((table["p_holm"] < 0.05).any()),
            bool((holm(_unpooled(result, seeds)) < 0.05).any()),
            ((other_low <= gain) & (gain <= other_high)).mean(),
            ((low <= truth) & (truth <= high)).mean(),
            (other_high - other_low).mean(),
        )
    return Rates(*(found / trials).tolist())


def _unpooled(result: Replicates, seeds: int) -> pl.Series:
    estimates = result.estimates.reshape(-1, seeds)
    draws = result.draws.reshape(len(result.draws), -1, seeds).mean(axis=2)
    changes = estimates[1:] - estimates[0]
    of_prompts = (draws[:, 1:] - draws[:, :1]).var(axis=0)
    deviation = np.sqrt(of_prompts + changes.var(axis=1, ddof=1) / seeds)
    return pl.Series(2 * ndtr(-np.abs(changes.mean(axis=1)) / deviation))


def _told(rates: Rates) -> str:
    before, after, *coverage = (
        f"{100 * share:.0f}"
        for share in (rates.unpooled, rates.false_positives, rates.differences, rates.estimates)
    )
    return f"{before} → {after}, {', '.join(coverage)}"


def main(trials: int) -> None:
    print("cells: false positives before → after, coverage of differences, of estimates; %")
    for alike in ALIKE:
        print(f"alike: {alike}", flush=True)
        for seeds in SEEDS:
            for configurations in CONFIGURATIONS:
                cells = [
                    _told(simulate(seeds, configurations, prompts, alike=alike, trials=trials))
                    for prompts in PROMPTS
                ]
                print(f"| {seeds} | {configurations} | {' | '.join(cells)} |", flush=True)
    few = [0.25 if configuration % 10 == 9 else 0.0 for configuration in range(50)]
    for seeds in SEEDS:
        print(f"{seeds} seeds, 0.25 for one of ten configurations, 0 for the others")
        print(_told(simulate(seeds, 50, 1000, alike=few, trials=trials)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
