"""Show in the report what wrong training labels cost, for sweeps with a grid over `label_noise`.

A line is a set of configurations that differ in their label noise only: a row of the table, a curve
of the figure.
"""

from collections.abc import Callable

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from embrm.core.drawing import BLACK, CURVES, new_figure, panel_grid, short_name
from embrm.core.formatting import MISSING, short_difference_text, short_text
from embrm.core.table import Table
from embrm.results.comparison import MEAN, Comparison

_SHOWN = len(CURVES)
"""Maximal number of lines in the figure, besides the baseline's."""

CAPTION = (
    f"Label noise: the {_SHOWN} configurations that are best at the highest rate of flipped "
    "training labels, and the baseline, with 95 % intervals"
)


def noise_tables(comparison: Comparison, top: int) -> list[Table]:
    """Make one table per panel of the figure: the metric at every rate, and the change from the
    lowest to the highest.

    top: number of lines to show; the baseline's is always among them.
    """
    return [_table(comparison, split, top) for split in _panels(comparison)]


def _panels(comparison: Comparison) -> list[str]:
    """The splits to show, which may include `MEAN`."""
    if comparison.noise.is_empty():
        return []
    return comparison.noise["split"].unique(maintain_order=True).to_list()


def _lines(comparison: Comparison, top: int) -> list[str]:
    """The `top` lines that are best at the highest rate on the first panel, and the baseline's."""
    first = comparison.noise.filter(split=_panels(comparison)[0])
    # Lines may end at different rates: those that reach the highest come first.
    last = first.group_by("line").agg(pl.all().sort_by("label_noise").last())
    order = last.sort(
        "label_noise", "estimate", "line", descending=[True, True, False], nulls_last=True
    )
    names = order["line"].to_list()[:top]
    own = _baseline(comparison)
    return names if own is None or own in names else [*names, own]


def _baseline(comparison: Comparison) -> str | None:
    """The line that the baseline belongs to, if any."""
    own = comparison.noise.filter(name=comparison.baseline or "")["line"]
    return None if own.is_empty() else str(own[0])


def _table(comparison: Comparison, split: str, top: int) -> Table:
    metric, baseline = comparison.metric, _baseline(comparison)
    here = comparison.noise.filter(split=split)
    rates = here["label_noise"].unique().sort().to_list()
    found = {(row["line"], row["label_noise"]): row for row in here.iter_rows(named=True)}
    changes = {
        row["name"]: row for row in comparison.noise_falls.filter(split=split).iter_rows(named=True)
    }
    rows = []
    for line in _lines(comparison, max(top, 1)):
        change = changes.get(line)
        cells = [
            short_text(found[line, rate], metric) if (line, rate) in found else MISSING
            for rate in rates
        ]
        cells.append(short_text(change, metric, "+") if change else MISSING)
        if baseline is not None:
            versus = short_difference_text(change, metric) if change else MISSING
            cells.append("baseline" if line == baseline else versus)
        rows.append((line, *cells))
    what = "accuracy %" if metric == "accuracy" else "Kendall tau-b"
    where = f"mean over {', '.join(comparison.ranked_splits)}" if split == MEAN else split
    difference = f"{_rate(rates[-1])} minus {_rate(rates[0])}"
    notes = [
        "Columns: share of the training labels that are flipped; evaluation labels are unchanged.",
        "Plus or minus: half the width of the 95 % interval.",
    ]
    if baseline is not None:
        notes += [
            f"minus {baseline}'s: the change of the row minus that of {baseline}.",
            "Triangle: its interval excludes 0 (not adjusted for the many rows).",
        ]
    return Table(
        f"Label noise, {what}: {where}",
        (
            "configuration",
            *(_rate(rate) for rate in rates),
            difference,
            *([f"minus {baseline}'s"] if baseline else []),
        ),
        tuple(rows),
        " ".join(notes),
    )


def _rate(rate: float) -> str:
    return f"{100 * rate:g} %"


def noise_figure(comparison: Comparison) -> Callable[[], Figure] | None:
    """Return a function that draws the metric against the rate of flipped labels, one panel per
    split, or None if the sweep has no grid over `label_noise`."""
    return (lambda: _draw(comparison)) if _panels(comparison) else None


def _draw(comparison: Comparison) -> Figure:
    panels, baseline = _panels(comparison), _baseline(comparison)
    names = _lines(comparison, _SHOWN)
    scale = 100 if comparison.metric == "accuracy" else 1
    columns, rows = panel_grid(len(panels))
    figure, axes = new_figure(0.8 + 2.3 * rows, columns, rows)
    noise = comparison.noise.with_columns(
        pl.col("label_noise") * 100, pl.col("estimate", "low", "high").cast(pl.Float64) * scale
    )
    width = np.ptp(noise["label_noise"].to_numpy())
    for axis, split in zip(axes, panels, strict=False):
        colors = iter(CURVES)
        for number, name in enumerate(names):
            is_baseline = name == baseline
            color = BLACK if is_baseline else next(colors)
            own = noise.filter(split=split, line=name).sort("label_noise")
            # Shifted a little, so that the intervals of different lines do not overlap.
            offset = (number - (len(names) - 1) / 2) * 0.018 * width
            rate = own["label_noise"].to_numpy() + offset
            low, high = (own[end].to_numpy() for end in ("low", "high"))
            axis.vlines(rate, low, high, color=color, linewidth=1.1, alpha=0.7)
            axis.plot(
                rate,
                own["estimate"].to_numpy(),
                "D" if is_baseline else "o",
                color=color,
                markersize=3.5,
                linewidth=1.4,
                linestyle=(0, (4, 2)) if is_baseline else "-",
                label=short_name(name),
            )
        mean = f"Mean of {len(comparison.ranked_splits)} splits"
        axis.set_title(mean if split == MEAN else short_name(split, 26))
        axis.grid()
        axis.set_axisbelow(True)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
    for axis in axes[len(panels) :]:
        axis.axis("off")
    what = "Accuracy (%)" if comparison.metric == "accuracy" else "Kendall τ-b"
    for axis in axes[: len(panels) : columns]:
        axis.set_ylabel(what)
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("Flipped training labels (%)")

    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure
