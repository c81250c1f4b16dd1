"""Compare a sweep's configurations by the official scores of published benchmarks, in tables."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs

from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.formatting import MISSING, mark_text, short_text, value_text
from embrm.core.table import Table, escape, markdown
from embrm.metrics.intervals import Replicates, compare, mean
from embrm.results.ledger import finished_runs, open_results
from embrm.studies.benchmarks.measure import SuiteScores, suite_scores
from embrm.sweeps.ledger import parquet

MEAN = "mean"
"""The name of the mean over suites, where others have the name of their split."""

_ACROSS = 7
"""Maximal number of scores in a table, so that it fits a terminal of 100 columns."""

_NOTE = (
    "In percent, ± half the width of the 95 % interval over prompts and seeds. ★: best of its "
    "column. ▲▼: the interval of the paired difference to {} excludes 0."
)


@dataclass(frozen=True)
class Suites:
    """The scores of a sweep's configurations on its suites, the tables shown and the files written.

    scores: one row per split, score and configuration, the overall score of a suite first.
        split, suite, score, overall (whether it is the suite's overall score), name, seeds.
        estimate with its 95 % interval over prompts and seeds, low and high.
        difference (paired, to the baseline) with difference_low, difference_high, p and p_holm;
        null for the baseline itself.
        best: whether no configuration has a higher estimate. prompts: their number. longer: the
        score if the longer response is always preferred.
        With several suites there are rows for the unweighted mean of their overall scores, whose
        split, suite and score are `MEAN`.
    notes: sentences on the splits, items and runs that were left out, and on prompts seen in
        training.
    """

    baseline: str
    scores: pl.DataFrame
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    files: tuple[Path, ...]

    def json(self) -> str:
        """Every number, to 12 significant digits."""
        content: dict[str, Any] = {"baseline": self.baseline, "notes": self.notes}
        return json.dumps(content | {"scores": self.scores.to_dicts()}, indent=1) + "\n"


def suites(
    folder: Path,
    *,
    named: Mapping[str, str] | None = None,
    baseline: str | None = None,
    top: int = 20,
    cache: Path | None = None,
    out: Path | None = None,
) -> Suites:
    """Write suites.parquet, suites.csv, suites.json and suites.md for the sweep in `folder`.

    named, cache: see `suite_scores`. baseline: the configuration that all others are compared with;
    by default the spec's. top: number of configurations in a table. out: folder to write to; by
    default the sweep's. Equal rewards give equal bytes.

    Raises: UserError when the sweep evaluates no suite, a name is unknown, or no run has weights.
    """
    if MEAN in (named or {}):
        raise UserError(
            f"a split named {MEAN!r} cannot be scored, because the mean over suites has that "
            "name: rename the split in the data"
        )
    results = open_results(folder)
    runs, reference, diverged = finished_runs(results, baseline)
    found, skipped = suite_scores(results, runs, named=named, cache=cache)
    scores = summarize(found, runs, reference)
    partial = [f"{one.split}: {note}" for one in found for note in one.notes]
    leaked = [
        f"{one.split}: {one.leaked} of its prompts also occur in training"
        for one in found
        if one.leaked
    ]
    tables = suite_tables(scores, reference, top)
    out = out or folder
    files = tuple(out / f"suites.{kind}" for kind in ("parquet", "csv", "json", "md"))
    notes = (*skipped, *partial, *diverged, *leaked)
    made = Suites(reference, scores, notes, tuple(tables), files)
    contents = (
        parquet(scores),
        scores.write_csv().encode(),
        made.json().encode(),
        _markdown(folder.name, made).encode(),
    )
    for path, content in zip(files, contents, strict=True):
        write_bytes(path, content)
    return made


def summarize(found: Sequence[SuiteScores], runs: pl.DataFrame, baseline: str) -> pl.DataFrame:
    """Compute `Suites.scores`. runs: name and seed, in the order of the replicates' columns."""
    tables = [
        _compared(replicates, runs, baseline, one.longer.get(score)).select(
            pl.lit(one.split).alias("split"),
            pl.lit(one.suite).alias("suite"),
            pl.lit(score).alias("score"),
            pl.lit(place == 0).alias("overall"),
            pl.all(),
        )
        for one in found
        for place, (score, replicates) in enumerate(one.scores.items())
    ]
    overall = [(next(iter(one.scores)), one) for one in found]
    # A suite with a missing part has no overall score.
    whole = [(score, one) for score, one in overall if not np.isnan(one.scores[score].estimates[0])]
    if len(whole) > 1:
        longer = [one.longer[score] for score, one in whole if score in one.longer]
        together = mean(one.scores[score] for score, one in whole)
        of_length = float(np.mean(longer)) if len(longer) == len(whole) else None
        tables.append(
            _compared(together, runs, baseline, of_length).select(
                *(pl.lit(MEAN).alias(column) for column in ("split", "suite", "score")),
                pl.lit(True).alias("overall"),
                pl.all(),
            )
        )
    numbers = cs.float()
    return pl.concat(tables).with_columns(numbers.fill_nan(None).round_sig_figs(12))


def _compared(
    replicates: Replicates, runs: pl.DataFrame, baseline: str, longer: float | None
) -> pl.DataFrame:
    table = compare(replicates, runs, baseline)
    estimate = pl.col("estimate").round_sig_figs(12)  # equal scores may differ in the last bits
    return table.select(
        *("name", "seeds", "estimate", "low", "high"),
        *("difference", "difference_low", "difference_high", "p", "p_holm"),
        best=(estimate == estimate.max()).fill_null(False),
        prompts=pl.lit(replicates.prompts, pl.Int64),
        longer=pl.lit(longer, pl.Float64),
    )


def suite_tables(scores: pl.DataFrame, baseline: str, top: int) -> list[Table]:
    """Make tables of the overall scores of all suites, then of the scores of each suite.

    scores: those of `Suites`. The configurations are sorted by the mean over suites, or by the only
    overall score if there is one suite. top: number of configurations to show; the baseline and the
    best of every suite are always among them.
    """
    overall = scores.filter("overall")
    known = overall.drop_nulls("estimate")["split"]
    last = overall.filter(split=known[-1] if len(known) else overall["split"][-1])
    ranked = last.sort("estimate", "name", descending=[True, False], nulls_last=True)["name"]
    always = {
        baseline,
        *overall.filter("best").unique("split", keep="first", maintain_order=True)["name"],
    }
    shown = [name for place, name in enumerate(ranked) if place < max(top, 1) or name in always]
    notes = [_NOTE.format(baseline)]
    if hidden := len(ranked) - len(shown):
        notes.append(f"{hidden} more configurations in suites.json.")
    if (scores["seeds"] == 1).any():
        notes.append("* one seed: variance between seeds is not covered.")
    if MEAN in overall["split"]:
        notes.append("mean: unweighted mean of the overall scores; no suite defines it.")
    headings = _headings(dict(overall.select("split", "suite").iter_rows()))
    tables = _tables("Suites: overall scores", "split", overall, shown, headings, " ".join(notes))
    for (split,), parts in scores.group_by("split", maintain_order=True):
        if parts["score"].n_unique() > 1:
            each = {score: score for score in parts["score"].unique(maintain_order=True)}
            tables += _tables(headings[str(split)], "score", parts, shown, each, "")
    return tables


def _headings(suites: Mapping[str, str]) -> dict[str, str]:
    """Split → its name in a table, for `suites`, split → suite.

    The prefix ood/ is dropped unless two splits would then share a name, and the suite is added in
    parentheses unless the split is named after it.
    """
    short = {split: split.removeprefix("ood/") for split in suites}
    times = Counter(short.values())
    return {
        split: (short[split] if times[short[split]] == 1 else split)
        + (f" ({suite})" if short[split] != suite else "")
        for split, suite in suites.items()
    }


def _tables(
    title: str,
    columns: str,
    scores: pl.DataFrame,
    shown: Sequence[str],
    headings: Mapping[str, str],
    note: str,
) -> list[Table]:
    """Tables with one row per configuration and at most `_ACROSS` columns.

    columns: the column of `scores` whose values become columns, "split" or "score". headings: such
    a value → its name in the table.
    """
    every = [*headings]
    rows = {(row["name"], row[columns]): row for row in scores.iter_rows(named=True)}
    tables = []
    for first in range(0, len(every), _ACROSS):
        some = every[first : first + _ACROSS]
        lines = [
            (
                name + ("" if rows[name, some[0]]["seeds"] > 1 else "*"),
                *(_cell(rows[name, column]) for column in some),
            )
            for name in shown
        ]
        longer = [value_text(rows[shown[0], column]["longer"], "accuracy") for column in some]
        if set(longer) != {MISSING}:
            lines.append(("the longer response", *longer))
        named = [headings[column] for column in some]

        tables.append(Table(title, ("configuration", *named), tuple(lines), note))
    return tables


def _cell(row: dict[str, Any]) -> str:
    best = "★" if row["best"] else ""
    return short_text(row, "accuracy") + mark_text(row) + best


def _markdown(title: str, found: Suites) -> str:
    parts = [f"# {escape(title)}: suites\n", *(markdown(table) for table in found.tables)]
    return "\n".join([*parts, *(f"- {escape(note)}.\n" for note in found.notes)])
