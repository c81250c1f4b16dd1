"""Measure best-of-n selection by every run of a sweep, on evaluation splits with gold scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError, nearest
from embrm.metrics.best_of_n import Ranking, kl_estimate
from embrm.results.ledger import Results, cache_of
from embrm.results.rewards import rewards_of_responses
from embrm.results.weights import load_run
from embrm.sweeps.tables import read_tables

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_SMALLER = 0.1
"""Share of a split's groups that may be smaller than the largest n, if no values of n are given."""


@dataclass(frozen=True, eq=False)
class SplitChoices:
    """What runs choose among n responses, in expectation, on one split.

    The pool of a prompt is all its responses. Gold and rewards are in units of their standard
    deviation within a prompt: the square root of the variance averaged over prompts. Gold is
    relative to its mean over all pools. Rewards compare only responses to one prompt, so they are
    relative to their mean over that prompt: they are 0 at n = 1, and NaN for a run that gives all
    responses to every prompt the same reward.
    """

    split: str
    ns: tuple[int, ...]
    prompt_ids: pl.Series
    gold: Floats
    """Expected gold of the response with the highest reward among n, [prompts, runs, n]."""
    proxy: Floats
    """Expected reward of that response, [prompts, runs, n]."""
    kl: Floats
    """Mean over prompts of its expected `kl_estimate` in nats, [runs, n]; NaN where a response has
    no log-probability."""
    gold_mean: float
    """Mean gold score of all pools, in the data's units."""
    gold_sd: float
    """Standard deviation of gold within a prompt, in the data's units."""
    sizes: tuple[int, int]
    """Sizes of the smallest and the largest group."""
    tied: Indices
    """Number of prompts whose responses all have the same reward, [runs]."""
    constant: int
    """Number of prompts whose responses all have the same gold score."""
    leaked: int
    """Number of prompts that also occur in training."""
    excluded: dict[str, int]
    """Number of groups left out, by reason."""


@dataclass(frozen=True)
class _Pool:
    """The groups of one size. places: their indices into the split's prompts, [groups]; responses:
    rows of the cache; gold: gold scores; S: log-probabilities in nats; all [groups, size]."""

    places: Indices
    responses: Indices
    gold: Floats
    S: Floats


@dataclass(frozen=True)
class _Split:
    """The groups of a split that are large enough for all `ns`, in the order of `prompt_ids`."""

    name: str
    ns: tuple[int, ...]
    prompt_ids: pl.Series
    pools: tuple[_Pool, ...]
    excluded: dict[str, int]


def measure_best_of_n(
    results: Results,
    runs: pl.DataFrame,
    *,
    split: str | None = None,
    ns: Sequence[int] | None = None,
    cache: Path | None = None,
) -> tuple[list[SplitChoices], list[str]]:
    """Choose the best of n responses to every prompt by the rewards of each run.

    runs: has the column run_id, of runs with weights. split: an evaluation split; by default all
    that have groups with gold scores. ns: values of n, to which 1 is added; by default the powers
    of two for which at least 90 % of the groups are large enough. A group smaller than the largest
    n is left out at every n, so that all points of a curve share the same prompts. cache: the
    cache's current path, if it has moved.

    Returns the choices on every split, and one sentence for every other split with groups that says
    why it was left out.
    Raises: UserError when no split has such groups, or the one asked for cannot be used.
    """
    source = cache_of(results, cache)
    members = read_tables(source, results.spec.scenarios, results.spec.data_seeds[0]).members
    names = _with_groups(results, members, split)
    S = source.responses["S"].to_numpy()
    splits: list[_Split] = []
    skipped: list[str] = []
    for name in names:
        try:
            splits.append(_prepared(name, members.filter(split=name), S, ns))
        except UserError as error:
            skipped.append(str(error))
            if len(skipped) == len(names):
                raise
    rows = np.unique(np.concatenate([p.responses.ravel() for one in splits for p in one.pools]))
    saved = [load_run(results.folder, run_id) for run_id in runs["run_id"]]
    rewards = rewards_of_responses(source, saved, rows)
    return [_chosen(one, rows, rewards, results.leaked) for one in splits], skipped


def _with_groups(results: Results, members: pl.DataFrame, split: str | None) -> list[str]:
    names = [name for name in results.evaluated if name in set(members["split"])]
    divided = [name for name in names if name in results.redivided]
    if divided and (split in divided or len(divided) == len(names)):
        raise UserError(
            f"data_seeds of {results.folder} divide the groups of {', '.join(divided)} again, so "
            "its runs choose among different responses: sweep with one data seed"
        )
    names = [name for name in names if name not in divided]
    if not names:
        raise UserError(
            f"{results.folder} evaluates no split with groups: best of n needs several responses "
            "of a prompt, each with its gold score; extract some as a split that is not trained on"
        )
    if split is None:
        return names
    if split not in names:
        raise UserError(
            f"split {split!r} is not an evaluation split with groups: {nearest(split, names)}"
        )
    return [split]


def _prepared(name: str, members: pl.DataFrame, S: Floats, ns: Sequence[int] | None) -> _Split:
    members = members.sort("subset", "prompt_id", "response", nulls_last=True)
    bad = members.height - members["gold"].is_finite().sum()
    if bad:
        raise UserError(
            f"split {name!r}: gold of {bad} of {members.height} responses is not finite: remove "
            "them from the data and extract again"
        )
    starts = members.select(pl.struct("subset", "prompt_id").rle_id().alias("group"))["group"]
    first = np.flatnonzero(np.diff(starts.to_numpy(), prepend=-1))
    sizes = np.diff(first, append=members.height)
    several = sizes[sizes > 1]
    if not several.size:
        raise UserError(
            f"split {name!r}: all {len(sizes)} groups have one response, but best of n chooses "
            "among several: extract more responses to each prompt"
        )
    asked = tuple(sorted({1, *ns})) if ns else _powers(several)
    least = max(2, asked[-1])
    kept = np.flatnonzero(sizes >= least)
    if not kept.size:
        raise UserError(
            f"split {name!r}: n = {least}, but the largest group has {sizes.max()} responses: "
            "lower n"
        )
    responses, gold = members["response"].to_numpy().astype(np.int64), members["gold"].to_numpy()
    pools = []
    for size in np.unique(sizes[kept]):
        places = np.flatnonzero(sizes[kept] == size)
        rows = first[kept][places][:, None] + np.arange(size)
        pools.append(_Pool(places, responses[rows], gold[rows].astype(float), S[responses[rows]]))
    if all((pool.gold == pool.gold[:, :1]).all() for pool in pools):
        raise UserError(
            f"split {name!r}: gold is constant within each of {len(kept)} prompts, so no response "
            "is better than another: extract groups whose gold scores differ"
        )
    alone, few = np.count_nonzero(sizes == 1), np.count_nonzero((sizes > 1) & (sizes < least))
    reasons = {"one response": alone, f"fewer than {least} responses": few}
    return _Split(
        name,
        asked,
        members["prompt_id"][first[kept].tolist()],
        tuple(pools),
        {reason: int(count) for reason, count in reasons.items() if count},
    )


def _powers(sizes: NDArray[np.int64]) -> tuple[int, ...]:
    largest = int(np.quantile(sizes, _SMALLER, method="lower"))

    return tuple(2**exponent for exponent in range(largest.bit_length()))


def _chosen(
    split: _Split, rows: Indices, rewards: NDArray[np.float32], leaked: dict[str, list[str]]
) -> SplitChoices:
    prompts, runs, ns = len(split.prompt_ids), len(rewards), split.ns
    gold, proxy, kl = (np.empty((prompts, runs, len(ns))) for _ in range(3))
    gold_variance, variance = np.empty(prompts), np.empty((prompts, runs))
    tied = np.empty((prompts, runs), np.bool_)
    mean = float(np.concatenate([pool.gold.ravel() for pool in split.pools]).mean())
    for pool in split.pools:
        places = np.searchsorted(rows, pool.responses)
        gold_variance[pool.places] = pool.gold.var(axis=-1)
        diverged = [kl_estimate(n, pool.S) for n in ns]
        for run, own in enumerate(rewards):
            of_pool = own[places].astype(np.float64)
            ranking = Ranking.by(of_pool)
            at = pool.places, run
            gold[at] = ranking.expected(pool.gold - mean, ns)
            proxy[at] = ranking.expected_proxy(ns) - of_pool.mean(axis=-1, keepdims=True)
            for column, (n, values) in enumerate(zip(ns, diverged, strict=True)):
                kl[(*at, column)] = ranking.expected(values, (n,))[:, 0]
            variance[at] = of_pool.var(axis=-1)
            tied[at] = ranking.tied[:, 1:].all(axis=-1)
    gold_sd, proxy_sd = float(np.sqrt(gold_variance.mean())), np.sqrt(variance.mean(axis=0))
    with np.errstate(invalid="ignore"):
        return SplitChoices(
            split=split.name,
            ns=ns,
            prompt_ids=split.prompt_ids,
            gold=gold / gold_sd,
            proxy=proxy / np.where(tied.all(axis=0), np.nan, proxy_sd)[:, None],
            kl=kl.mean(axis=0),
            gold_mean=mean,
            gold_sd=gold_sd,
            sizes=(split.pools[0].gold.shape[1], split.pools[-1].gold.shape[1]),
            tied=tied.sum(axis=0),
            constant=sum(
                int((pool.gold == pool.gold[:, :1]).all(axis=-1).sum()) for pool in split.pools
            ),
            leaked=int(split.prompt_ids.is_in(leaked.get(split.name, [])).sum()),
            excluded=split.excluded,
        )
