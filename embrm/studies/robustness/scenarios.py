"""Show in the report how configurations generalize to unseen prompts and response models.

A sweep with scenarios evaluates on splits that share both, one or neither with training, see
`embrm.data.scenarios`.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from embrm.core.drawing import BLACK, CURVES, GREY, new_figure, short_name
from embrm.core.formatting import short_difference_text, short_text
from embrm.core.table import Table
from embrm.results.comparison import Comparison

_SHOWN = len(CURVES)
"""Maximal number of configurations in the figure, besides the baseline."""

CAPTION = (
    "Scenarios, from seen to unseen prompts and response models, with 95 % intervals: the "
    f"{_SHOWN} best configurations of the ranking and the baseline (left), paired differences to "
    "the baseline (right)"
)

_METRICS = {"accuracy": ("accuracy", "Accuracy (%)"), "tau": ("Kendall tau-b", "Kendall τ-b")}
"""Metric → its name in a table's title and on an axis."""

_COLUMNS = (
    ("estimate", "low", "high"),
    ("difference", "difference_low", "difference_high"),
)
"""The value and its interval of the left and of the right panels."""

_DODGE = 0.6
"""Width over which the points of a scenario are spread, so that their intervals do not overlap."""


def scenario_tables(comparison: Comparison, top: int) -> list[Table]:
    """Make one table per metric: its value in every scenario, and the change from the first
    scenario to the last.

    top: number of configurations to show; the baseline is always among them.
    """
    return [_table(comparison, metric, top) for metric in _metrics(comparison)]


def _metrics(comparison: Comparison) -> list[str]:
    """The metrics that at least two scenarios have."""
    here = comparison.scores.filter(pl.col("split").is_in(comparison.scenarios))
    return [
        metric
        for metric in _METRICS
        if here.filter(metric=metric)["split"].n_unique() > 1 and len(comparison.scenarios) > 1
    ]


def _table(comparison: Comparison, metric: str, top: int) -> Table:
    scores = comparison.scores.filter(metric=metric)
    splits = [split for split in comparison.scenarios if split in scores["split"]]
    found = {(row["split"], row["name"]): row for row in scores.iter_rows(named=True)}
    falls = comparison.scenario_falls
    changes = (
        {row["name"]: row for row in falls.filter(metric=metric).iter_rows(named=True)}
        if not falls.is_empty()
        else {}
    )
    names = comparison.best(max(top, 1))
    columns = ["configuration", *splits]
    rows = [[name, *(short_text(found[split, name], metric) for split in splits)] for name in names]
    notes = ["Plus or minus: half the width of the 95 % interval."]
    if changes:
        columns.append(f"{splits[-1]} minus {splits[0]}")
        for row, name in zip(rows, names, strict=True):
            row.append(short_text(changes[name], metric, "+"))
        notes.append(
            "Some scenarios are harder than others for all configurations: compare the changes of "
            "configurations with each other rather than with 0."
        )
        if comparison.baseline is not None:
            columns.append(f"minus {comparison.baseline}'s")
            for row, name in zip(rows, names, strict=True):
                own = name == comparison.baseline
                row.append("baseline" if own else short_difference_text(changes[name], metric))
            notes.append(
                f"minus {comparison.baseline}'s: the change of the row minus that of "
                f"{comparison.baseline}. Triangle: its interval excludes 0 (not adjusted for the "
                "many rows)."
            )
    unit = " %" if metric == "accuracy" else ""
    title = f"Scenarios: {_METRICS[metric][0]}{unit}"
    return Table(title, tuple(columns), tuple(map(tuple, rows)), " ".join(notes))


def scenario_figure(comparison: Comparison) -> Callable[[], Figure] | None:
    """Return a function that draws, for every metric, its value in each scenario (left) and the
    difference to the baseline (right); None with fewer than two scenarios."""
    metrics = _metrics(comparison)
    return (lambda: _draw(comparison, metrics)) if metrics else None


def _draw(comparison: Comparison, metrics: list[str]) -> Figure:
    names = comparison.best(_SHOWN)
    paired = comparison.baseline is not None and len(names) > 1
    figure, axes = new_figure(0.7 + 2.4 * len(metrics), 1 + paired, len(metrics))
    panels = iter(axes)
    for metric in metrics:
        scores = comparison.scores.filter(metric=metric)
        splits = [split for split in comparison.scenarios if split in scores["split"]]
        found = {(row["split"], row["name"]): row for row in scores.iter_rows(named=True)}
        scale = 100 if metric == "accuracy" else 1
        unit = "points" if metric == "accuracy" else "Δτ"
        titles = [_METRICS[metric][1]]
        titles += [f"Minus {short_name(comparison.baseline or '', 24)} ({unit})"] * paired
        for title, columns in zip(titles, _COLUMNS, strict=False):
            axis, colors = next(panels), iter(CURVES)
            for number, name in enumerate(names):
                is_baseline = name == comparison.baseline
                color = BLACK if is_baseline else next(colors)
                if is_baseline and columns == _COLUMNS[1]:
                    continue
                rows = [found[split, name] for split in splits]
                value, low, high = (
                    scale * np.array([row[key] for row in rows], dtype=float) for key in columns
                )
                offset = (number - (len(names) - 1) / 2) * _DODGE / max(1, len(names) - 1)
                x = np.arange(len(splits)) + offset
                axis.vlines(x, low, high, color=color, linewidth=1.4)
                axis.plot(
                    x,
                    value,
                    "D" if is_baseline else "o",
                    color=color,
                    markersize=4,
                    label=short_name(name),
                )
            if columns == _COLUMNS[1]:
                axis.axhline(0, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.set_xticks(range(len(splits)), [short_name(split) for split in splits])
            axis.set_xlim(-0.6, len(splits) - 0.4)
            axis.tick_params(axis="x", length=0)
            axis.set_title(title)
            axis.grid(axis="y")
            axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure
