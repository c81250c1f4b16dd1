"""PPE's best of K (arXiv 2410.14872): curves over the samples of a question.

Every question has K samples, correct or wrong. The tool samples orders of them and follows the
correctness of the highest reward so far; here a curve is the exact expectation over orders
(`metrics.best_of_n`, where ties share). So "highest", the maximum of the mean curve, is at most the
mean of the orders' maxima, and the loss is without the variance between orders. The tool's code has
not been compared with this.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.core.text import quoted
from embrm.metrics.best_of_n import Ranking
from embrm.metrics.intervals import Replicates, kept_counts, mean, resample
from embrm.suites.rows import (
    list_of,
)
from embrm.suites.suite import Layout, Row, Suite

Floats = NDArray[np.float64]

METRICS = (
    "best of K",
    "highest best of k",
    "ROC AUC",
    "loss to the true best of k",
    "best of 1",
)
"""Of a best-of-K set. AUC is of correct against wrong samples of all questions, rewards scaled to
0 … 1 within each; the loss is the mean over k of the squared distance to the curve of a reward that
knows what is correct; the best of 1 is a sample at random."""


def _rows(row: Row) -> Iterator[Row]:
    """Every sample of a question, with its correctness."""
    for place, score in enumerate(list_of(row, "scores"), start=1):
        text = row.get(f"response_{place}")
        if text is None or not 0 <= float(score) <= 1:
            raise ValueError(
                f"sample {place}, of score {quoted(score)}, is no correct or wrong text"
            )
        yield {
            "prompt": row["prompt"],
            "response": text,
            "model": row.get("model_name"),
            "gold": float(score),
            "subset": None,
        }


def best_of_k(
    members: pl.DataFrame, replicates: int, only: Collection[str] | None = None
) -> dict[str, Replicates]:
    """`METRICS` of the mean of subsets, then of every subset, or those in `only`.

    members: a row a sample: subset, prompt_id, source and row (the same for the samples of one
        question), gold (correctness, 0 … 1; AUC is undefined unless all are 0 or 1), score.

    Raises: UserError for another gold.
    """
    gold = members["gold"].cast(pl.Float64, strict=False)
    others = members["gold"].filter(~gold.is_between(0, 1).fill_null(False))
    if len(others):
        raise UserError(
            f"gold of ppe-best-of-k must be 0 … 1, found {repr(others[0])[:60]}: "
            'read the data with suite = "ppe-best-of-k"'
        )
    members = members.with_columns(gold)
    subsets = members["subset"].unique().sort()
    parts = {name: _of_subset(members.filter(subset=name), replicates) for name in subsets}
    found = {}
    for metric in METRICS:
        together = mean(part[metric] for part in parts.values())
        prompts = sum(part[metric].prompts for part in parts.values())
        found[f"{metric}, mean of subsets"] = replace(together, prompts=prompts)
    found |= {
        f"{name}: {metric}": part[metric]
        for name, part in parts.items()
        for metric in METRICS
        if name
    }
    return {name: one for name, one in found.items() if only is None or name in only}


def _of_subset(members: pl.DataFrame, replicates: int) -> dict[str, Replicates]:
    questions = (
        members.group_by("source", "row", maintain_order=True)
        .agg(pl.col("prompt_id").first(), "gold", "score", samples=pl.len())
        .sort("samples", maintain_order=True)
    )
    largest = int(questions["samples"][-1])
    curves = np.concatenate(
        [_curves(pool, largest) for pool in questions.partition_by("samples", maintain_order=True)]
    )
    prompts = questions["prompt_id"]
    found = resample(prompts, curves, np.ones((len(curves), 1)), replicates=replicates)
    every = np.concatenate([found.estimates[None], found.draws])
    ours, true = every[:, :largest], every[:, largest:]
    values = (
        ours[:, -1],
        ours.max(axis=1),
        _areas(questions, replicates),
        np.square(true - ours).mean(axis=1),
        ours[:, 0],
    )
    return {
        metric: Replicates(one[:1], one[1:, None], found.prompts, (0.0, 1.0))
        for metric, one in zip(METRICS, values, strict=True)
    }


def _curves(pool: pl.DataFrame, largest: int) -> Floats:
    """Expected correctness of the best of 1 … `largest` by reward, then by correctness itself,
    [questions, 2·largest], of questions with equally many samples, beyond which a curve is flat."""
    gold, score = (np.stack(pool[name].to_list()).astype(np.float64) for name in ("gold", "score"))
    ns = np.minimum(np.arange(1, largest + 1), gold.shape[1]).tolist()
    return np.concatenate([Ranking.by(by).expected(gold, ns) for by in (score, gold)], axis=1)


def _areas(questions: pl.DataFrame, replicates: int) -> Floats:
    """Area under the ROC curve, observed and in every replicate: [1 + replicates].

    It is the share of pairs of a correct and a wrong sample, of whatever questions, that rewards
    order right, and half of those they tie: a sum over pairs of questions, which a replicate weighs
    by the counts of both, Σ c_p·c_q·right[p, q].
    """
    scores, gold, owner = [], [], []
    for number, (own, correct) in enumerate(questions.select("score", "gold").iter_rows()):
        values = np.asarray(own, dtype=np.float64)
        spread = np.ptp(values)
        scores.append((values - values.min()) / spread if spread else np.full(len(values), 0.5))
        gold += correct
        owner += [number] * len(values)
    value, correct, owners = np.concatenate(scores), np.asarray(gold), np.asarray(owner)
    if not np.isin(correct, (0, 1)).all():
        return np.full(1 + replicates, np.nan)
    order = np.argsort(value, kind="stable")
    ranked, wrong = value[order], 1.0 - correct[order]
    # Row t: how many of the t lowest samples are wrong, by question.
    below = np.zeros((len(value) + 1, questions.height), np.float32)
    below[np.arange(1, len(value) + 1), owners[order]] = wrong
    np.cumsum(below, axis=0, out=below)
    right_of = np.flatnonzero(correct == 1)
    low, high = (np.searchsorted(ranked, value[right_of], side) for side in ("left", "right"))
    # Samples stand question by question, so those of one that are correct are neighbours.
    of_question, first = np.unique(owners[right_of], return_index=True)
    right = np.zeros((questions.height, questions.height))
    ordered = (below[low] + below[high]) / 2
    right[of_question] = np.add.reduceat(ordered, first, axis=0, dtype=np.float64)
    prompts = questions["prompt_id"].unique().sort()  # as `resample`, which has their counts
    of_prompt = questions["prompt_id"].replace_strict(
        prompts, range(len(prompts)), return_dtype=pl.Int64
    )
    counts = kept_counts(tuple(prompts), replicates)[:, of_prompt.to_numpy()]
    counts = np.concatenate([np.ones((1, questions.height)), counts])
    positives = np.bincount(owners, correct, questions.height)
    negatives = np.bincount(owners, 1.0 - correct, questions.height)
    with np.errstate(invalid="ignore"):
        return (counts @ right * counts).sum(axis=1) / (counts @ positives * (counts @ negatives))


SUITE = Suite(
    name="ppe-best-of-k",
    hub="lmarena-ai/PPE-MMLU-Pro-Best-of-K",
    hub_split="train",
    layouts=(Layout(("prompt", "scores"), ("response_", "model_name"), _rows),),
    scores=best_of_k,
    main=tuple(f"{metric}, mean of subsets" for metric in METRICS[:3]),
    groups=True,
    needs=("source", "row", "gold"),
    rewards=("score",),
    lengths=("tokens",),
)
