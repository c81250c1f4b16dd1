"""Show reliability diagrams in the report: are heads right as often as their probabilities say?"""

from collections.abc import Callable
from typing import Any

import polars as pl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from embrm.core.drawing import BLACK, BLUE, GREY, new_figure, panel_grid, short_name
from embrm.core.formatting import MISSING, number_text, range_text, value_text
from embrm.core.table import Table
from embrm.metrics.calibration import BINS
from embrm.metrics.reliability import FEW
from embrm.results.comparison import Comparison

CAPTION = (
    "Reliability diagrams of the best configuration and the baseline: accuracy against confidence, "
    "before and after temperature scaling, with 95 % intervals; bins with fewer than "
    f"{FEW} prompts are left out"
)

_NOTE = (
    f"Confidence: predicted probability of the response with the higher reward, in the {BINS} "
    "equal-width bins of the ECE; the column gives its mean in the bin. accuracy: share of the "
    "labels that prefer this response; a tie counts as half. at T: after dividing rewards by the "
    "temperature fitted on the validation pairs. Seeds are pooled; pairs: mean number per seed. "
    f"Square brackets: 95 % intervals over prompts, for bins with at least {FEW} prompts."
)


def compared_names(comparison: Comparison) -> list[str]:
    """The best configuration and the baseline, whose reliability the report shows."""
    return comparison.best(1)


def reliability_tables(found: pl.DataFrame) -> list[Table]:
    """Make one table per split, with one row per configuration and bin.

    found: the rows of `measure_reliability`.
    """
    if found.is_empty():
        return []
    return [
        _table(split, found.filter(split=split))
        for split in found["split"].unique(maintain_order=True)
    ]


def _table(split: str, found: pl.DataFrame) -> Table:
    cells = found.select("name", "bin", "lowest", "highest").unique(maintain_order=True)
    order = {name: place for place, name in enumerate(cells["name"].unique(maintain_order=True))}
    rows = {(row["name"], row["bin"], row["at_temperature"]): row for row in found.to_dicts()}
    lines = []
    for name, number, lowest, highest in sorted(
        cells.iter_rows(), key=lambda cell: (order[cell[0]], cell[1])
    ):
        line = [name, f"{100 * lowest:.1f}-{100 * highest:.1f}"]
        for at_temperature in (False, True):
            row = rows.get((name, number, at_temperature))
            if row is None:
                line += [MISSING] * 3
                continue
            right = value_text(row["observed"], "accuracy")
            interval = range_text(row["low"], row["high"], "accuracy")
            line += [
                f"{row['pairs']:,.0f}",
                value_text(row["predicted"], "accuracy"),
                f"{right} {interval}".rstrip(),
            ]
        lines.append(tuple(line))
    columns = ("pairs", "confidence %", "accuracy %")
    return Table(
        f"Reliability: {split}",
        ("configuration", "bin %", *columns, *(f"{name} at T" for name in columns)),
        tuple(lines),
        _NOTE,
        left=2,
    )


def reliability_figure(found: pl.DataFrame, comparison: Comparison) -> Callable[[], Figure] | None:
    """Return a function that draws one panel per split, or None if no bin has `FEW` prompts.

    found: the rows of `measure_reliability`.
    """
    bins = found if found.is_empty() else found.filter(pl.col("prompts") >= FEW)
    return None if bins.is_empty() else lambda: _draw(bins, comparison)


def _draw(found: pl.DataFrame, comparison: Comparison) -> Figure:
    splits = found["split"].unique(maintain_order=True).to_list()
    columns, rows = panel_grid(len(splits))
    figure, axes = new_figure(0.8 + 2.5 * rows, columns, rows)
    percent = found.with_columns(
        pl.col("predicted", "observed", "low", "high").cast(pl.Float64) * 100
    )
    least = percent.select(pl.min_horizontal("observed", "low").min()).item()
    names = compared_names(comparison)
    colors = {name: BLACK if name == comparison.baseline else BLUE for name in names}
    for axis, split in zip(axes, splits, strict=False):
        axis.plot([50, 100], [50, 100], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        for name, color in colors.items():
            for at_temperature in (False, True):
                own = percent.filter(split=split, name=name, at_temperature=at_temperature)
                x, y, low, high = (
                    own[column].to_numpy() for column in ("predicted", "observed", "low", "high")
                )
                axis.vlines(x, low, high, color=color, linewidth=0.9, alpha=0.5)
                axis.plot(x, y, **_style(color, name == comparison.baseline, at_temperature))
        axis.set_xlim(49, 101)
        axis.set_ylim(min(45.0, least - 3), 103)
        axis.set_xticks(range(50, 101, 10))
        axis.set_title(short_name(split, 26), pad=6 + 10 * len(colors))
        for place, (name, color) in enumerate(colors.items()):
            axis.annotate(
                _ece(comparison, split, name),
                (0, 1),
                xytext=(0, 4 + 10 * (len(colors) - 1 - place)),
                xycoords="axes fraction",
                textcoords="offset points",
                color=color,
                fontsize=7.5,
            )
        axis.grid()
        axis.set_axisbelow(True)
    for axis in axes[: len(splits) : columns]:
        axis.set_ylabel("Accuracy (%)")
    for axis in axes[max(0, len(splits) - columns) : len(splits)]:
        axis.set_xlabel("Confidence (%)")
    for axis in axes[len(splits) :]:
        axis.axis("off")
    entries: dict[str, Line2D] = {}
    for name, color in colors.items():
        for at_temperature in sorted(found.filter(name=name)["at_temperature"].unique()):
            style = _style(color, name == comparison.baseline, at_temperature)
            what = ", with temperature" if at_temperature else ""
            entries[f"{short_name(name, 36)}{what}"] = Line2D([], [], **style)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=2)
    return figure


def _style(color: str, is_baseline: bool, at_temperature: bool) -> dict[str, Any]:
    return {
        "color": color,
        "marker": "D" if is_baseline else "o",
        "markersize": 3.5,
        "markerfacecolor": color if at_temperature else "white",
        "linewidth": 1.3 if at_temperature else 0.9,
        "linestyle": "-" if at_temperature else ":",
    }


def _ece(comparison: Comparison, split: str, name: str) -> str:
    """The ECE averaged over seeds, before and after temperature scaling."""
    row = comparison.measures.filter(split=split, name=name).row(0, named=True)
    before, after = row["ece"], row["ece_calibrated"]
    return f"ECE {number_text(before)}" + (f" → {number_text(after)}" if after is not None else "")
