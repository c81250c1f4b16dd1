"""PPE's best-of-K metrics (Frick et al. 2024, arXiv 2410.14872): how well rewards select among the
K sampled responses of a question, each of which is correct or wrong.

The curve f(k) is the expected correctness of the response with the highest reward among k of the K
samples, averaged over questions (`metrics.best_of_n`), and g(k) is that of a reward that knows what
is correct. The scores of a benchmark are f(K), max_k f(k), the mean over k of (f(k) - g(k))², f(1),
and the ROC AUC of correct against wrong samples; the overall scores are means over benchmarks.

f is the exact expectation over orders of the samples. Where a tool averages over sampled orders
(that PPE's does is not verified), max_k f(k) is at most the mean of the orders' maxima, and the
squared distance lacks the variance between orders. A failed reward, which PPE's code writes as
$ERROR$ and reads as -inf, is below all others; the AUC scales the other rewards of its question.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.core.text import quoted
from embrm.metrics.best_of_n import Ranking
from embrm.metrics.intervals import Replicates, cached_prompt_counts, mean, resample
from embrm.suites.items import Checked, whole_items
from embrm.suites.rows import FAILED, list_of
from embrm.suites.suite import Layout, Row, Suite

Floats = NDArray[np.float64]

METRICS = (
    "best of K",
    "highest best of k",
    "ROC AUC",
    "loss to the true best of k",
    "best of 1",
)
"""Scores of one benchmark: f(K), max f(k), the AUC over the samples of all questions with rewards
scaled to 0 … 1 within each question, the mean of (f(k) - g(k))², and f(1), that of a random
sample."""


def _rows(row: Row) -> Iterator[Row]:
    """The samples of a question as members of a group, with correctness as gold."""
    for place, score in enumerate(list_of(row, "scores"), start=1):
        text = row.get(f"response_{place}")
        if text is None or not 0 <= float(score) <= 1:
            raise ValueError(
                f"sample {place} has no text, or its score {quoted(score)} is not in 0 … 1"
            )
        yield {
            "prompt": row["prompt"],
            "response": text,
            "model": row.get("model_name"),
            "gold": float(score),
            "subset": None,
        }


def _whole(members: pl.DataFrame) -> Checked:
    """Leave out questions that have fewer or more samples than most questions of their benchmark
    (the larger number where two are equally frequent)."""
    question = ["subset", "source", "row"]
    sizes = members.group_by(question).len("size").group_by("subset", "size").len("times")
    usual = sizes.sort("times", "size").group_by("subset", maintain_order=True).last()
    members = members.join(
        usual.select("subset", _usual="size"), on="subset", how="left", maintain_order="left"
    )
    complete = pl.len() == pl.col("_usual").first()
    found = whole_items(members, question, complete, "without all K samples")
    return replace(found, table=found.table.drop("_usual"))


def best_of_k(
    members: pl.DataFrame, replicates: int, only: Collection[str] | None = None
) -> dict[str, Replicates]:
    """Compute `METRICS` as means over subsets (PPE's benchmarks), then for every subset.

    members: one row per sample, with subset, prompt_id, source and row (the same for all samples of
        a question), gold (correctness, 0 … 1; the AUC is undefined unless all are 0 or 1), score.
    only: names of the scores that are returned, by default all.

    Raises: UserError for a gold outside 0 … 1.
    """
    gold = members["gold"].cast(pl.Float64, strict=False)
    others = members["gold"].filter(~gold.is_between(0, 1).fill_null(False))
    if len(others):
        raise UserError(
            f"ppe-best-of-k: gold = {repr(others[0])[:60]} is not in 0 … 1: "
            'read the data with suite = "ppe-best-of-k"'
        )
    # Failed rewards, of -inf, are below all others.
    scores = members["score"].to_numpy()
    below = float(scores[np.isfinite(scores)].min(initial=0.0)) - 1.0
    score = pl.col("score")
    members = members.with_columns(gold, failed=score.is_infinite()).with_columns(
        score=pl.when("failed").then(below).otherwise("score")
    )
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
        .agg(pl.col("prompt_id").first(), "gold", "score", "failed", samples=pl.len())
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
    """f(k), then g(k), for k = 1 … `largest`: float64 [questions, 2·largest].

    pool: questions with equally many samples, N; a curve keeps its last value for k > N.
    """
    gold, score = (np.stack(pool[name].to_list()).astype(np.float64) for name in ("gold", "score"))
    ns = np.minimum(np.arange(1, largest + 1), gold.shape[1]).tolist()
    return np.concatenate([Ranking.by(by).expected(gold, ns) for by in (score, gold)], axis=1)


def _areas(questions: pl.DataFrame, replicates: int) -> Floats:
    """Area under the ROC curve, observed and in every replicate: float64 [1 + replicates].

    It is the share of the pairs of a correct sample of any question and a wrong sample of any
    question in which the correct one has the higher reward; a tie counts half. A replicate weights
    the pairs of the questions p and q by their bootstrap counts: Σ c_p·c_q·right[p, q] /
    (Σ c_p·correct[p] · Σ c_q·wrong[q]).
    """
    scores, gold, owner = [], [], []
    columns = questions.select("score", "gold", "failed")
    for number, (own, correct, failed) in enumerate(columns.iter_rows()):
        values, known = np.asarray(own, dtype=np.float64), ~np.asarray(failed)
        scaled = np.full(len(values), -np.inf)  # failed ones, below those of all questions
        if known.any():
            low, spread = values[known].min(), np.ptp(values[known])
            scaled[known] = (values[known] - low) / spread if spread else 0.5
        scores.append(scaled)
        gold += correct
        owner += [number] * len(values)
    value, correct, owners = np.concatenate(scores), np.asarray(gold), np.asarray(owner)
    if not np.isin(correct, (0, 1)).all():
        return np.full(1 + replicates, np.nan)
    order = np.argsort(value, kind="stable")
    ranked, wrong = value[order], 1.0 - correct[order]
    # Row t counts, for each question, its wrong samples among the t lowest of all samples.
    below = np.zeros((len(value) + 1, questions.height), np.float32)
    below[np.arange(1, len(value) + 1), owners[order]] = wrong
    np.cumsum(below, axis=0, out=below)
    right_of = np.flatnonzero(correct == 1)
    low, high = (np.searchsorted(ranked, value[right_of], side) for side in ("left", "right"))
    # Samples are ordered by question, so the correct samples of a question are adjacent.
    of_question, first = np.unique(owners[right_of], return_index=True)
    right = np.zeros((questions.height, questions.height))
    ordered = (below[low] + below[high]) / 2
    right[of_question] = np.add.reduceat(ordered, first, axis=0, dtype=np.float64)
    prompts = questions["prompt_id"].unique().sort()  # the order of `resample`, to share its counts
    of_prompt = questions["prompt_id"].replace_strict(
        prompts, range(len(prompts)), return_dtype=pl.Int64
    )
    counts = cached_prompt_counts(tuple(prompts), replicates)[:, of_prompt.to_numpy()]
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
    check=_whole,
    failed=FAILED,
)
