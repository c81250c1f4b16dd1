"""The score of a published benchmark as its own tool computes it, with an interval.

A benchmark's score is a fixed weighted mean of cells (`suites.cells`): accuracies of subsets,
places of RM-Bench's matrix, terms of RewardBench 2's Ties. What PPE computes beyond accuracy is in
its own modules. Each benchmark's module names its source.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import polars as pl

from embrm.core.errors import UserError, nearest
from embrm.metrics.intervals import REPLICATES, Replicates, compare
from embrm.suites.registry import SUITES


def score_suite(suite: str, table: pl.DataFrame, replicates: int = REPLICATES) -> pl.DataFrame:
    """Every score of a suite under one run.

    table: one row per pair: subset, prompt_id, scores_chosen, scores_rejected; label and weight
    where
        votes were counted; source, row and the models where the suite's formula needs them (see
        `SUITES`); tokens_chosen and tokens_rejected for the length baseline. Of a suite of groups,
        one row per member: subset, prompt_id, source, row, gold, score; tokens for the baseline.

    Returns one row per score: score; estimate, low, high (95 %, bootstrap over prompts; null with
    fewer than two); prompts, how many it is of; longer, the estimate of "the longer response is
    better" by the same formula, null without lengths. Estimates are null where a subset that the
    formula needs is not there.

    Raises: UserError for an unknown suite, a missing column, pairs of another suite, rewards that
    are not finite, and correctness that is not 0 … 1.
    """
    found = replicate_suite(suite, table, replicates)
    # As many replicates: some of PPE's scores are statistics of them all.
    longer = by_length(suite, table, replicates)
    rows = [
        compare(one, pl.DataFrame({"name": [name], "seed": [0]}), None)
        .select("name", "estimate", "low", "high")
        .with_columns(prompts=pl.lit(one.prompts))
        for name, one in found.items()
    ]
    return (
        pl.concat(rows)
        .rename({"name": "score"})
        .with_columns(
            longer=pl.Series([longer.get(name) for name in found], dtype=pl.Float64).fill_nan(None)
        )
    )


def replicate_suite(
    suite: str,
    table: pl.DataFrame,
    replicates: int = REPLICATES,
    only: Collection[str] | None = None,
) -> dict[str, Replicates]:
    """As `score_suite`: each score, or those named in `only`, as replicates of one run."""
    if suite not in SUITES:
        raise UserError(f"no suite {suite!r}: {nearest(suite, SUITES)}")
    kind = SUITES[suite]
    for column in ("subset", "prompt_id", *kind.rewards, *kind.needs):
        if column not in table.columns:
            where = (
                "groups are in NAME.members.parquet of embrm score --out NAME.parquet"
                if kind.groups
                else "write them with embrm scores or embrm score --out"
            )
            raise UserError(
                f"{suite} needs a column {column!r}, the scores have {', '.join(table.columns)}: "
                f"{where}"
            )
    rewards = pl.col(kind.rewards).cast(pl.Float64, strict=False)
    table = table.with_columns(rewards, pl.col("subset").cast(pl.String).fill_null(""))
    finite = table.select(rewards.is_finite().fill_null(False).all()).row(0)
    if table.is_empty() or not all(finite):
        raise UserError(f"{suite}: the scores hold no pairs, or rewards that are not finite")
    return kind.scores(table, replicates, only)


def by_length(
    suite: str, table: pl.DataFrame, replicates: int = 2, only: Collection[str] | None = None
) -> dict[str, float]:
    """The scores of "the longer response is better", by the same formulas; none unless all lengths
    are there."""
    kind = SUITES[suite]
    if not set(kind.lengths) <= set(table.columns):
        return {}
    if any(table[name].null_count() for name in kind.lengths):
        return {}
    renamed = zip(kind.rewards, kind.lengths, strict=True)
    table = table.with_columns(pl.col(tokens).alias(reward) for reward, tokens in renamed)
    found = replicate_suite(suite, table, replicates, only)
    return {name: float(one.estimates[0]) for name, one in found.items()}


def read_scores(path: Path, suite: str, split: str | None = None) -> pl.DataFrame:
    """The pairs of one split of a file that `embrm scores` or `embrm score` wrote.

    split: "ood/SUITE" unless given, or the file's only one.
    Raises: UserError for a missing or damaged file, or another split.
    """
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".jsonl": pl.read_ndjson,
        ".csv": pl.read_csv,
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: its name must end in {', '.join(readers)}")
    try:
        pairs = readers[path.suffix](path)
    except FileNotFoundError:
        raise UserError(f"no scores at {path}: check the path") from None
    except pl.exceptions.PolarsError as error:
        line = (str(error).splitlines() or [""])[0][:160]
        raise UserError(f"{path} is not a whole {path.suffix} file: {line}") from None
    if "split" not in pairs.columns:
        return pairs
    splits = sorted(map(str, pairs["split"].unique()))
    wanted = split or f"ood/{suite}"
    if split is None and len(splits) == 1:
        wanted = splits[0]
    if wanted not in splits:
        raise UserError(
            f"{path} has no split {wanted!r}: name one with --split; {nearest(wanted, splits)}"
        )
    return pairs.filter(pl.col("split").cast(pl.String) == wanted)
