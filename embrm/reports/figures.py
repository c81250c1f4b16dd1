"""Figures of a sweep's report. The same numbers give the same PNG and SVG bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from embrm.core.drawing import (
    BLACK,
    BLUE,
    CURVES,
    GREY,
    ORANGE,
    dot,
    drawn,
    new_figure,
    short_name,
)
from embrm.core.table import printable
from embrm.results.comparison import Comparison

_MOST_BEYOND = 0.25
"""A reference line at most this share of the axis beyond its ends is drawn; the axis grows."""

_MOST_NUMBERED = 24
"""Largest number of configurations that the figure of distortion names: a column beside it."""

_LINEAR = 10
"""Token KLs that differ by more than this factor are drawn on a logarithmic axis."""

_MANY_TICKS = 1000
"""Where they differ by more than this, only powers of ten have room for their numbers."""


def figures(comparison: Comparison, curves: pl.DataFrame, top: int) -> dict[str, bytes]:
    """Draw the figures that the sweep has data for; file name, such as "ranked.png" → content.

    ranked: estimates, and differences to the baseline, of the best `top` configurations.
    id_vs_ood: accuracy out of distribution against accuracy in distribution.
    distortion: the ranking's metric against token KL, of the configurations with an adapter.
    curves: validation NLL and accuracy by epoch, of the best configurations and the baseline.

    The argument `curves` has the columns name (of the configuration), run_id, epoch,
    validation_nll and validation_accuracy.
    """
    made = {"ranked": _ranked(comparison, top)}
    scatter = _scatter_axes(comparison)
    if scatter:
        made["id_vs_ood"] = _id_vs_ood(comparison, *scatter)
    moved = _moved(comparison)
    if not moved.is_empty():
        made["distortion"] = _distortion(comparison, moved, top)
    names = comparison.best(len(CURVES) - 1)
    curves = curves.filter(pl.col("name").is_in(names)).drop_nulls("validation_nll")
    if curves["epoch"].n_unique() > 1:
        made["curves"] = _learning_curves(comparison, curves, names)
    return drawn(made)


def _label(comparison: Comparison) -> str:
    what, unit = ("accuracy", " (%)") if comparison.metric == "accuracy" else ("Kendall τ-b", "")
    splits = comparison.ranked_splits
    if len(splits) > 1:
        return f"Mean {what} over {len(splits)} splits{unit}"
    return f"{what[0].upper()}{what[1:]}, {short_name(splits[0], 30)}{unit}"


def _ranked(comparison: Comparison, top: int) -> Callable[[], Figure]:
    def draw() -> Figure:
        names = comparison.best(top)
        rows = {row["name"]: row for row in comparison.ranking.iter_rows(named=True)}
        paired = comparison.baseline is not None and len(rows) > 1
        figure, axes = new_figure(1.1 + 0.2 * len(names), 2 if paired else 1)
        scale = 100 if comparison.metric == "accuracy" else 1
        places = np.arange(len(names))[::-1]
        for axis, keys in zip(
            axes,
            (("estimate", "low", "high"), ("difference", "difference_low", "difference_high")),
            strict=False,
        ):
            for place, name in zip(places, names, strict=True):
                value, low, high = (rows[name][key] for key in keys)
                if value is None:
                    continue
                color, filled = _color_and_fill(rows[name], name == comparison.baseline)
                if low is not None:
                    axis.plot(
                        [scale * low, scale * high],
                        [place, place],
                        color=color,
                        linewidth=1.6,
                        solid_capstyle="butt",
                        zorder=2,
                    )
                axis.plot(
                    scale * value,
                    place,
                    "o",
                    color=color,
                    markersize=4.5,
                    markerfacecolor=color if filled else "white",
                    zorder=3,
                )
            axis.set_yticks(places, [short_name(name) for name in names])
            axis.set_ylim(-0.7, len(names) - 0.3)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x")
            axis.set_axisbelow(True)
            axis.spines["left"].set_visible(False)
            axis.xaxis.set_major_locator(MaxNLocator(6))
        axes[0].set_xlabel(_label(comparison))
        # Values are artists or tuples of them, which matplotlib's stubs cannot express.
        entries: dict[str, Any] = {}
        if comparison.baseline is not None:
            reference = rows[comparison.baseline]["estimate"]
            if reference is not None:
                axes[0].axvline(scale * reference, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        if paired:
            axes[1].axvline(0, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
            axes[1].set_yticklabels([])
            unit = "points" if comparison.metric == "accuracy" else "Δτ"
            axes[1].set_xlabel(f"Minus {short_name(comparison.baseline or '')} ({unit})")
            entries |= {
                "above the baseline": dot(BLUE),
                "below": dot(ORANGE),
                "interval excludes 0, Holm p ≥ 0.05": (dot(BLUE, False), dot(ORANGE, False)),
                "not distinguishable": dot(GREY),
                "baseline": dot(BLACK, False),
            }
        length = comparison.longer_is_better()
        low, high = axes[0].get_xlim()
        near = _MOST_BEYOND * (high - low)
        if length is not None and low - near <= scale * length <= high + near:
            entries["longer is better"] = axes[0].axvline(
                scale * length, color=BLACK, linewidth=1.1, linestyle=":"
            )
        if entries:
            figure.legend(
                list(entries.values()),
                list(entries),
                loc="outside lower center",
                ncols=3,
                handler_map={tuple: HandlerTuple(ndivide=None)},
            )
        return figure

    return draw


def _color_and_fill(row: dict[str, float | None], is_baseline: bool) -> tuple[str, bool]:
    """Choose a configuration's colour, and whether its dot is filled (Holm-adjusted p < 0.05)."""
    difference, low, high = row["difference"], row["difference_low"], row["difference_high"]
    if difference is None or low is None or high is None:
        return BLACK, not is_baseline
    sure = row["p_holm"] is not None and row["p_holm"] < 0.05
    if sure or low > 0 or high < 0:
        return BLUE if difference > 0 else ORANGE, sure
    return GREY, True


@dataclass(frozen=True)
class _ScatterAxis:
    """One axis of the scatter plot: its label, and configuration → accuracy in percent."""

    label: str
    accuracy: dict[str, float]


def _scatter_axes(comparison: Comparison) -> tuple[_ScatterAxis, _ScatterAxis] | None:
    """Choose the axes: in distribution, then out of distribution; None if one has no accuracies.

    Splits whose names start with "ood" are out of distribution, and the others in distribution. If
    all of the splits are on one side, the x axis is the accuracy on the training prompts held out
    for validation, and the y axis the mean over all splits.
    """
    scored = comparison.scores.filter(pl.col("metric") == "accuracy")
    splits = [split for split in comparison.splits if split in scored["split"]]
    outside = [split for split in splits if split.startswith("ood")]
    inside = [split for split in splits if split not in outside] if outside else []
    outside = outside or splits

    def mean_over(names: list[str]) -> _ScatterAxis:
        means = (
            scored.filter(pl.col("split").is_in(names))
            .group_by("name")
            .agg(pl.col("estimate").mean())
            .drop_nulls()
        )
        return _ScatterAxis(f"Accuracy, {_split_names(names)} (%)", _percent(means))

    held_out = _ScatterAxis(
        "Accuracy, held-out training prompts (%)", _percent(comparison.validation.drop_nulls())
    )
    x, y = mean_over(inside) if inside else held_out, mean_over(outside)
    return (x, y) if x.accuracy.keys() & y.accuracy.keys() else None


def _percent(means: pl.DataFrame) -> dict[str, float]:
    return {name: 100 * share for name, share in means.iter_rows()}


def _id_vs_ood(
    comparison: Comparison, inside: _ScatterAxis, outside: _ScatterAxis
) -> Callable[[], Figure]:
    def draw() -> Figure:
        x, y = inside.accuracy, outside.accuracy
        names = sorted(x.keys() & y.keys())
        front = [
            name
            for name in names
            if not any(
                x[other] >= x[name]
                and y[other] >= y[name]
                and (x[other], y[other]) != (x[name], y[name])
                for other in names
            )
        ]
        front.sort(key=lambda name: x[name])
        figure, (axis,) = new_figure(4.4, 1)
        rest = [name for name in names if name not in front and name != comparison.baseline]
        axis.plot(
            [x[name] for name in rest],
            [y[name] for name in rest],
            "o",
            color="#B5B5B5",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            label="other configurations",
        )
        axis.plot(
            [x[name] for name in front],
            [y[name] for name in front],
            "o-",
            color=BLUE,
            markersize=5.5,
            linewidth=1.0,
            label="Pareto front",
        )
        labelled = list(front)
        if comparison.baseline in names:
            name = comparison.baseline
            axis.plot(
                x[name],
                y[name],
                "D",
                color=ORANGE,
                markersize=6,
                markeredgecolor="white",
                label="baseline",
            )
            labelled += [name] if name not in front else []
        for number, name in enumerate(labelled, start=1):
            axis.annotate(
                str(number),
                (x[name], y[name]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
        listing = [f"{number}  {short_name(name, 30)}" for number, name in enumerate(labelled, 1)]
        axis.text(1.03, 0.97, "\n".join(listing), transform=axis.transAxes, va="top", fontsize=8)
        axis.margins(0.08)
        axis.grid()
        axis.set_axisbelow(True)
        axis.set_xlabel(inside.label)
        axis.set_ylabel(outside.label)
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=3, columnspacing=1.2)
        return figure

    return draw


def _moved(comparison: Comparison) -> pl.DataFrame:
    """The rows of `Comparison.distortion` with a point to draw: token KL and an estimate."""
    table = comparison.distortion
    return table if table.is_empty() else table.drop_nulls(["kl", "estimate"])


def _distortion(comparison: Comparison, moved: pl.DataFrame, top: int) -> Callable[[], Figure]:
    def draw() -> Figure:
        scale = 100 if comparison.metric == "accuracy" else 1
        rows = {row["name"]: row for row in moved.iter_rows(named=True)}
        points = {name: (row["kl"], scale * row["estimate"]) for name, row in rows.items()}
        figure, (axis,) = new_figure(4.4, 1)
        for name, row in rows.items():
            if row["twin"] in points:
                ends = zip(points[row["twin"]], points[name], strict=True)
                axis.plot(*ends, color="#D0D0D0", linewidth=0.8, zorder=1)
        twins = set(moved["twin"].drop_nulls())
        for label, color, names in _distortion_groups(moved, twins):
            own = [rows[name] for name in names if rows[name]["low"] is not None]
            axis.vlines(
                [row["kl"] for row in own],
                [scale * row["low"] for row in own],
                [scale * row["high"] for row in own],
                color=color,
                linewidth=0.9,
                alpha=0.5,
                zorder=2,
            )
            axis.plot(
                *zip(*(points[name] for name in names), strict=True),
                "D" if twins & set(names) else "o",
                color=color,
                markersize=5.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=label,
                zorder=3,
            )
        best = [name for name in rows if name not in twins][:top]
        numbered = [name for name in rows if name in twins or name in best][:_MOST_NUMBERED]
        for number, name in enumerate(numbered, start=1):
            axis.annotate(
                str(number),
                points[name],
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
            )
        listing = [f"{number}  {short_name(name)}" for number, name in enumerate(numbered, 1)]
        axis.text(1.03, 0.99, "\n".join(listing), transform=axis.transAxes, va="top", fontsize=6.5)
        values = moved["kl"].to_numpy()
        least, most = values.min(), values.max()
        if 0 < _LINEAR * least < most:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(
                LogLocator(subs=(1, 2, 5) if most < _MANY_TICKS * least else (1,))
            )
            axis.xaxis.set_major_formatter("{x:g}")  # By default numbers are mathematics.
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(0.08)
        axis.grid()
        axis.set_axisbelow(True)
        axis.set_xlabel(f"Token KL, {short_name(comparison.trained_on, 30)} (nats)")
        axis.set_ylabel(_label(comparison))
        figure.legend(
            *axis.get_legend_handles_labels(), loc="outside lower left", ncols=3, columnspacing=1.2
        )
        return figure

    return draw


def _distortion_groups(moved: pl.DataFrame, twins: set[str]) -> list[tuple[str, str, list[str]]]:
    """Label, colour and configurations of every kind of point that there is: BT twins, other
    configurations without a regularizer, and each kind of regularizer."""
    plain = pl.col("regularizer").is_null()
    is_twin = pl.col("name").is_in(list(twins))
    kinds = moved["regularizer"].drop_nulls().unique().sort()
    groups = [
        ("no regularizer", GREY, plain & ~is_twin),
        *(
            (kind, CURVES[number % len(CURVES)], pl.col("regularizer") == kind)
            for number, kind in enumerate(kinds)
        ),
        ("BT twin", BLACK, plain & is_twin),
    ]
    named = [(label, color, moved.filter(own)["name"].to_list()) for label, color, own in groups]
    return [group for group in named if group[2]]


def _learning_curves(
    comparison: Comparison, curves: pl.DataFrame, names: list[str]
) -> Callable[[], Figure]:
    def draw() -> Figure:
        figure, axes = new_figure(2.9, 2)
        colors = iter(CURVES)
        for name in names:
            own = curves.filter(pl.col("name") == name)
            is_baseline = name == comparison.baseline
            color = BLACK if is_baseline else next(colors)
            for axis, column, scale in (
                (axes[0], "validation_nll", 1),
                (axes[1], "validation_accuracy", 100),
            ):
                band = (
                    own.group_by("epoch")
                    .agg(
                        pl.len().alias("seeds"),
                        pl.col(column).median().alias("median"),
                        pl.col(column).min().alias("low"),
                        pl.col(column).max().alias("high"),
                    )
                    .filter(pl.col("seeds") == pl.col("seeds").max())  # Seeds may stop early.
                    .sort("epoch")
                )
                epochs = band["epoch"].to_numpy()
                axis.fill_between(
                    epochs,
                    scale * band["low"].to_numpy(),
                    scale * band["high"].to_numpy(),
                    color=color,
                    alpha=0.15,
                    linewidth=0,
                )
                axis.plot(
                    epochs,
                    scale * band["median"].to_numpy(),
                    color=color,
                    linewidth=1.5,
                    linestyle=(0, (4, 2)) if is_baseline else "-",
                    label=short_name(name),
                )
        for axis, title in zip(axes, ("Validation NLL", "Validation accuracy (%)"), strict=True):
            axis.set_title(title)
            axis.set_xlabel("Epoch")
            axis.grid()
            axis.set_axisbelow(True)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
        return figure

    return draw


def _split_names(splits: list[str]) -> str:
    if len(splits) == 1:
        return printable(splits[0])
    listed = ", ".join(printable(split) for split in splits)
    return f"mean of {listed if len(listed) <= 40 else f'{len(splits)} splits'}"
