"""Measure what evaluation costs: best of n over large pools, and the bootstrap of intervals."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.bench.processes import Measured, measure
from embrm.bench.sweeps import cores
from embrm.metrics.accuracy import OUTCOMES, PROMPTS
from embrm.metrics.best_of_n import Ranking
from embrm.metrics.intervals import compare, replicate
from embrm.metrics.outcomes import Outcomes

NS = (1, 2, 4, 8, 16, 64, 256, 500)

_ROUNDS = 3
_SEEDS = 5


def measure_evaluation(
    *,
    prompts: int = 2000,
    responses: int = 500,
    ns: Sequence[int] = NS,
    runs: int = 100,
    splits: int = 8,
    split_prompts: int = 1000,
    replicates: int = 10_000,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure evaluation; yields each part's name and rows as soon as it is measured.

    Each row runs in a fresh process on all cores, and its fastest of three rounds counts. "core
    seconds" are summed over threads; other programs on the machine change them less than wall time.

    Part "best of n": one head over `prompts` pools of `responses` responses, expected gold score
    and reward at all `ns`. Its limit is sorting the responses by reward.
    Part "bootstrap": intervals and differences of `runs` runs with five seeds per configuration,
    on `splits` splits of `split_prompts` prompts. Its limit is the matrix product of resampling
    counts and outcomes.
    """
    shape = prompts, responses
    ways: dict[str, tuple[Callable[..., Callable[[], float]], tuple[Any, ...]]] = {
        "limit: the order": (_order, (shape,)),
        "best of n": (_best_of_n, (shape, ns, None)),
        "best of n, rewards of one decimal": (_best_of_n, (shape, ns, 1)),
    }
    pools = {
        way: measure(prepare, *given, threads=cores(), rounds=_ROUNDS)
        for way, (prepare, given) in ways.items()
    }
    yield "best of n", _rows(pools)
    size = runs, split_prompts, splits, replicates
    resampled = {
        way: measure(prepare, *size, threads=cores(), rounds=_ROUNDS)
        for way, prepare in {"limit: the products": _products, "bootstrap": _bootstrap}.items()
    }
    yield "bootstrap", _rows(resampled)


def _rows(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """Compare every row with the first one, the limit."""
    limit = next(iter(measured.values())).seconds
    return [
        {
            "way": way,
            "seconds": done.seconds,
            "core seconds": done.values[0],
            "times the limit": done.seconds / limit,
            "peak RSS MB": done.memory.rss / 1e6,
        }
        for way, done in measured.items()
    ]


def _spent(work: Callable[[], None]) -> float:
    """Do the work and return its processor time, summed over threads, in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def _rewards(shape: tuple[int, int], digits: int | None) -> NDArray[np.float32]:
    rewards = np.random.default_rng(0).standard_normal(shape, np.float32)
    return rewards if digits is None else rewards.round(digits)


def _order(shape: tuple[int, int]) -> Callable[[], float]:
    rewards = _rewards(shape, None)

    def work() -> None:
        np.argsort(rewards, axis=-1)

    return partial(_spent, work)


def _best_of_n(
    shape: tuple[int, int], ns: Sequence[int], digits: int | None
) -> Callable[[], float]:
    rewards, gold = _rewards(shape, digits), np.random.default_rng(1).standard_normal(shape)

    def work() -> None:
        ranking = Ranking.by(rewards)
        ranking.expected(gold, ns)
        ranking.expected_proxy(ns)

    return partial(_spent, work)


def _products(runs: int, prompts: int, splits: int, replicates: int) -> Callable[[], float]:
    counts = np.random.default_rng(0).poisson(1.0, (replicates, prompts)).astype(np.float64)
    outcomes = np.random.default_rng(1).random((prompts, runs))

    def work() -> None:
        for _ in range(splits):
            counts @ outcomes

    return partial(_spent, work)


def _bootstrap(runs: int, prompts: int, splits: int, replicates: int) -> Callable[[], float]:
    configurations = pl.DataFrame(
        {
            "name": [f"configuration {run // _SEEDS}" for run in range(runs)],
            "seed": [run % _SEEDS for run in range(runs)],
        }
    )
    every = [_outcomes(runs, prompts, split) for split in range(splits)]

    def work() -> None:
        for outcomes in every:
            compare(replicate(outcomes, "accuracy", replicates), configurations, "configuration 0")

    return partial(_spent, work)


def _outcomes(runs: int, prompts: int, split: int) -> Outcomes:
    """Random outcomes with one to eight pairs per prompt, 70 % of them won."""
    random = np.random.default_rng(split)
    pairs = random.integers(1, 9, prompts)
    table = pl.DataFrame(
        {
            "subset": pl.Series([None] * prompts, dtype=pl.String),
            "prompt_id": [f"{split} {prompt}" for prompt in range(prompts)],
            "pairs": pairs.astype(np.float64),
            "length_wins": np.zeros(prompts),
            "length_ties": np.zeros(prompts),
        },
        schema=PROMPTS,
    )
    values = {name: np.zeros((runs, prompts), np.float32) for name in OUTCOMES}
    values["wins"] = random.binomial(pairs, 0.7, (runs, prompts)).astype(np.float32)
    return Outcomes(table, values)
