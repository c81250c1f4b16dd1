"""The ranking of the configurations, with differences to the baseline."""

from typing import Any

from embrm.core.formatting import difference_text, p_text, range_text, value_text
from embrm.core.table import Table, printable
from embrm.results.comparison import MEAN, Comparison

_MOST_NAMED = 3
"""Largest number of configurations that a note lists by name."""


def ranking_tables(comparison: Comparison, top: int) -> list[Table]:
    """One row per configuration, best first, then the accuracies of two trivial rules."""
    shown = comparison.best(top)
    metric = comparison.metric
    rows = {row["name"]: row for row in comparison.ranking.iter_rows(named=True)}
    cells = [_cells(comparison, rows[name]) for name in shown]
    if metric == "accuracy":
        length = value_text(comparison.longer_is_better(), metric)
        cells += [
            ("", "(longer is better)", "", length, "", ""),
            ("", "(chance)", "", value_text(0.5, metric), "", ""),
        ]
    over = (
        f"mean over {', '.join(comparison.ranked_splits)}"
        if comparison.ranked_by == MEAN
        else comparison.ranked_by
    )
    label = "accuracy %" if metric == "accuracy" else "Kendall tau-b"
    versus = f"minus {comparison.baseline}" if comparison.baseline else "difference"
    return [
        Table(
            title=f"Ranking by {label}: {over}",
            columns=("#", "configuration", "seeds", label, versus, "Holm p"),
            rows=tuple(cells),
            note=_note(comparison, len(shown)),
            left=2,
        )
    ]


def _cells(comparison: Comparison, row: dict[str, Any]) -> tuple[str, ...]:
    name, metric = row["name"], comparison.metric
    return (
        str(row["rank"] or ""),
        f"{name}°" if name in comparison.at_epoch_limit else name,
        f"{row['seeds']}{'' if row['seeds'] > 1 else '*'}",
        f"{value_text(row['estimate'], metric)} {range_text(row['low'], row['high'], metric)}",
        "baseline" if name == comparison.baseline else difference_text(row, metric),
        p_text(row["p_holm"]),
    )


def _note(comparison: Comparison, shown: int) -> str:
    """Explain the table's signs, and say what it leaves out. shown: number of configurations.

    What is to be done about runs at their epoch limit stands on a line of its own.
    """
    lines = [" ".join(_notes(comparison, shown)), _at_epoch_limit(comparison)]
    return "\n".join(printable(line) for line in lines if line)


def _at_epoch_limit(comparison: Comparison) -> str:
    count, names = len(comparison.at_epoch_limit), comparison.at_epoch_limit[:_MOST_NAMED]
    if not count:
        return ""
    return (
        f"° {count} of {comparison.ranking.height} configurations "
        f"({', '.join([*names, *(['…'] if count > _MOST_NAMED else [])])}) reached their epoch "
        "limit before early stopping: raise epochs."
    )


def _notes(comparison: Comparison, shown: int) -> list[str]:
    ranking = comparison.ranking
    if ranking["low"].is_null().all():
        notes = ["No intervals: too few prompts to resample."]
    else:
        notes = [
            f"Square brackets: 95 % intervals. {comparison.covered}",
            "The variance between seeds is pooled over configurations.",
            "Up or down triangle: the interval of the paired difference excludes 0.",
            "Holm p: p value of the difference, adjusted for the number of configurations "
            "compared; where it disagrees with a triangle, trust Holm p.",
        ]
    if comparison.unranked_splits:
        left_out = ", ".join(comparison.unranked_splits)
        notes.append(f"Left out of the mean, because they have fewer than 2 prompts: {left_out}.")
    if (ranking["seeds"] == 1).any():
        notes.append("* one seed: the interval does not cover the variance between seeds.")
    if ranking.height > shown:
        notes.append(f"{ranking.height - shown} more configurations in report.json.")
    notes += [
        f"{row['name']}: {row['runs']} runs {row['status']}, left out."
        for row in comparison.unfinished.iter_rows(named=True)
    ]
    return [
        *notes,
        "The best of many configurations owes part of its lead to luck: confirm it on prompts that "
        "were not used to choose it.",
        "Rewards of the best configuration for every pair: embrm scores FOLDER "
        f"{ranking['run_ids'][0][0]} --out scores.parquet",
    ]
