"""Compute a published benchmark's scores from rewards, by the formula of its own code or paper,
with bootstrap intervals over prompts.

The formulas and their sources are in the module of each benchmark.
"""

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import polars as pl

from embrm.core.errors import UserError, nearest
from embrm.metrics.intervals import REPLICATES, Replicates, compare
from embrm.suites.items import Checked, once
from embrm.suites.registry import SUITES


def score_suite(suite: str, table: pl.DataFrame, replicates: int = REPLICATES) -> pl.DataFrame:
    """Compute all scores of a suite from the rewards of one run.

    table: for a suite of pairs, one row per pair, with subset, prompt_id, scores_chosen and
        scores_rejected; label and weight where votes were counted; source, row, chosen_model and
        rejected_model where the suite's formula needs them (`Suite.needs`); tokens_chosen and
        tokens_rejected for the length baseline. For a suite of groups, one row per member, with
        subset, prompt_id, source, row, gold and score; tokens for the length baseline.

    Returns one row per score, with the columns score (its name), estimate, low and high (95 %
    bootstrap interval over prompts; null with fewer than two prompts), prompts (their number),
    longer (the length baseline: the same score with token counts as rewards; null without them),
    incomplete and repeated (numbers of items and of rows that `check_items` leaves out of all
    scores). An estimate is null where the table lacks a subset that the formula needs.

    Raises: UserError for an unknown suite, a missing column, a subset of another benchmark, rewards
    that are not finite, and correctness outside 0 … 1.
    """
    checked = check_items(suite, table)
    found = SUITES[suite].scores(checked.table, replicates, None)
    # With the same number of replicates, because some of PPE's scores are computed from them all.
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
            longer=pl.Series([longer.get(name) for name in found], dtype=pl.Float64).fill_nan(None),
            incomplete=pl.lit(checked.incomplete),
            repeated=pl.lit(checked.repeated),
        )
    )


def replicate_suite(
    suite: str,
    table: pl.DataFrame,
    replicates: int = REPLICATES,
    only: Collection[str] | None = None,
) -> dict[str, Replicates]:
    """Like `score_suite`, but return each score, or those named in `only`, with its replicates."""
    return SUITES[suite].scores(check_items(suite, table).table, replicates, only)


def check_items(suite: str, table: pl.DataFrame) -> Checked:
    """Check the rewards of a table, and leave out incomplete items and repeated rows.

    Rewards become float64; `Suite.failed` becomes -inf. Raises: UserError as `score_suite`.
    """
    if suite not in SUITES:
        raise UserError(f"no suite {suite!r}: {nearest(suite, SUITES)}")
    kind = SUITES[suite]
    for column in ("subset", "prompt_id", *kind.rewards, *kind.needs):
        if column not in table.columns:
            where = (
                "pass NAME.members.parquet, which embrm score --out NAME.parquet writes"
                if kind.groups
                else "write the file with embrm scores or embrm score --out"
            )
            raise UserError(
                f"{suite} needs a column {column!r}, the file has {', '.join(table.columns)}: "
                f"{where}"
            )
    numbers = [pl.col(name).cast(pl.Float64, strict=False) for name in kind.rewards]
    if kind.failed:
        numbers = [
            pl.when(pl.col(name).cast(pl.String) == kind.failed)
            .then(-float("inf"))
            .otherwise(number)
            .alias(name)
            for name, number in zip(kind.rewards, numbers, strict=True)
        ]
    table = table.with_columns(*numbers, pl.col("subset").cast(pl.String).fill_null(""))
    failures = table.select(pl.col(kind.rewards) == -float("inf")).sum().fill_null(0)
    known = table.select(pl.col(kind.rewards).is_finite().sum())
    count = sum(failures.row(0)) if kind.failed else 0
    if table.is_empty() or sum(known.row(0)) + count < table.height * len(kind.rewards):
        raise UserError(
            f"{suite}: there are no pairs, or some rewards are not finite numbers: "
            "score the benchmark's data again"
        )
    found = once(table, kind.rewards)
    notes = found.notes
    if count:
        notes += (f"{count} rewards are {kind.failed} and count as -inf",)
    whole = kind.check(found.table) if kind.check else Checked(found.table)
    if whole.table.is_empty():
        raise UserError(
            f"{suite}: no item can be scored ({'; '.join(whole.notes)}): "
            "score all of the benchmark's data"
        )
    return Checked(whole.table, whole.incomplete, found.repeated, (*notes, *whole.notes))


def by_length(
    suite: str, table: pl.DataFrame, replicates: int = 2, only: Collection[str] | None = None
) -> dict[str, float]:
    """The length baseline: the suite's scores with token counts in place of rewards.

    Empty unless the table has the token count of every response.
    """
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
    """Read one split of a file that `embrm scores` or `embrm score --out` wrote.

    split: by default the file's only split, or ood/SUITE where it has several.
    Raises: UserError for a missing or damaged file, or a split that it does not have.
    """
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        # The first failed reward, a word, may stand far down in a column of numbers.
        ".jsonl": partial(pl.read_ndjson, infer_schema_length=None),
        ".csv": partial(pl.read_csv, infer_schema_length=None),
    }
    if path.suffix not in readers:
        raise UserError(f"{path}: the name must end in {', '.join(readers)}: pass a file of scores")
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
            f"{path} has no split {wanted!r}: choose one with split (--split), "
            f"{nearest(wanted, splits)}"
        )
    return pairs.filter(pl.col("split").cast(pl.String) == wanted)
