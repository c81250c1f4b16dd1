"""Published benchmarks under the heads of a sweep: the official scores of every run, in tables."""

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
"""The name of the mean over benchmarks, in place of a split."""

_ACROSS = 7
"""Most scores side by side, which fit 100 terminal columns beside the names."""

_CELLS = (
    "In percent, ± half of the 95 % interval over prompts and seeds. ★ best of its column; ▲▼ the "
    "interval of the paired difference to {} excludes 0."
)


@dataclass(frozen=True)
class Suites:
    """The scores of a sweep on its benchmarks, and the files that were written.

    tables: those that the terminal shows.

    scores: one row per split, score and configuration, the overall score of a suite first: split,
        suite, score, overall, name, seeds, estimate, low, high; difference to the baseline with
        difference_low, difference_high, p and p_holm, null for the baseline itself; best (of the
        configurations); prompts; longer, the same score of "the longer response is better".
        Intervals are of 95 %, over prompts and seeds. Of several splits, the unweighted mean of
        their overall scores is one more, whose split and suite are `MEAN`.
    notes: what was left out, and why.
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
    """Write suites.parquet, suites.csv, suites.json and suites.md of the sweep in `folder`.

    named, cache: see `measure.suite_scores`. baseline: the configuration that all others are
    compared with; the spec's unless given. top: configurations in a table. out: where to write; the
    sweep folder unless given. The same rewards give the same bytes.

    Raises: UserError where the sweep evaluates no suite, a name is wrong, or no run has weights.
    """
    if MEAN in (named or {}):
        raise UserError(
            f"a split named {MEAN!r} cannot be scored: the mean over suites stands under that "
            "name: give the split another one in the data"
        )
    results = open_results(folder)
    runs, reference, diverged = finished_runs(results, baseline)
    found, skipped = suite_scores(results, runs, named=named, cache=cache)
    scores = summarize(found, runs, reference)
    leaked = [
        f"{one.split}: {one.leaked} of its prompts are in training too"
        for one in found
        if one.leaked
    ]
    tables = suite_tables(scores, reference, top)
    out = out or folder
    files = tuple(out / f"suites.{kind}" for kind in ("parquet", "csv", "json", "md"))
    notes = (*skipped, *diverged, *leaked)
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
    """`Suites.scores`. runs: name and seed, in the order of the replicates' columns."""
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
    """Overall scores of all suites, then the parts of each; `scores` are those of `Suites`.

    The best by the mean over suites come first, or by the only overall score there is. top:
    configurations to show; the baseline and the best of every suite are always among them.
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
    notes = [_CELLS.format(baseline)]
    if hidden := len(ranked) - len(shown):
        notes.append(f"{hidden} more configurations in suites.json.")
    if (scores["seeds"] == 1).any():
        notes.append("* one seed: variance between seeds is not covered.")
    if MEAN in overall["split"]:
        notes.append("mean: of the overall scores, unweighted, not any suite's own.")
    heads = _heads(dict(overall.select("split", "suite").iter_rows()))
    tables = _tables("Suites: overall scores", "split", overall, shown, heads, " ".join(notes))
    for (split,), parts in scores.group_by("split", maintain_order=True):
        if parts["score"].n_unique() > 1:
            each = {score: score for score in parts["score"].unique(maintain_order=True)}
            tables += _tables(heads[str(split)], "score", parts, shown, each, "")
    return tables


def _heads(suites: Mapping[str, str]) -> dict[str, str]:
    """What the splits of `suites` are called in a table: without ood/ where that leaves them
    apart, and with their suite where its name is another."""
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
    heads: Mapping[str, str],
    note: str,
) -> list[Table]:
    """Configurations against the values of `columns`, which `heads` has the names of, some at a
    time."""
    every = [*heads]
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
        named = [heads[column] for column in some]
        tables.append(Table(title, ("configuration", *named), tuple(lines), note))
    return tables


def _cell(row: dict[str, Any]) -> str:
    best = "★" if row["best"] else ""
    return short_text(row, "accuracy") + mark_text(row) + best


def _markdown(title: str, found: Suites) -> str:
    parts = [f"# {escape(title)}: suites\n", *(markdown(table) for table in found.tables)]
    return "\n".join([*parts, *(f"- {escape(note)}.\n" for note in found.notes)])
