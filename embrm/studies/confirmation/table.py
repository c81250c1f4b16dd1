"""Show how far a sweep ranks its configurations as fine-tuning would: tables and figure."""

from collections.abc import Callable
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from embrm.core.drawing import BLUE, ORANGE, PANELS, new_figure, short_name
from embrm.core.formatting import MISSING, range_text, value_text
from embrm.core.table import Table
from embrm.results.comparison import MEAN
from embrm.studies.confirmation.measure import GAIN, METRICS, VALUE, Confirmation, Excluded

CAPTION = "Frozen against fine-tuned configurations, with 95 % intervals"

_LABELS = dict(zip(METRICS, ("accuracy %", "Kendall tau-b", "NLL"), strict=True))


def confirmation_tables(confirmation: Confirmation) -> list[Table]:
    """Make the tables for the terminal: agreement of ranks, agreement of gains, the values of the
    configurations in both stages, and the configurations that are not compared."""
    return [
        _rank_agreement(confirmation),
        _gain_agreement(confirmation),
        _configurations(confirmation, _leading_cell(confirmation)),
        *_not_compared(confirmation),
    ]


def further_confirmation_tables(confirmation: Confirmation) -> list[Table]:
    """Make the tables that only the Markdown report has: the values of the configurations on the
    other splits and by the other metrics."""
    shown = _leading_cell(confirmation)
    cells = confirmation.points.select("split", "metric").unique(maintain_order=True).rows()
    return [_configurations(confirmation, cell) for cell in cells if cell != shown]


def _leading_cell(confirmation: Confirmation) -> tuple[str, str]:
    """The split and metric that the sweep was ranked by, or the next best that both stages have."""
    present = set(confirmation.points.select("split", "metric").unique().rows())
    wanted = [MEAN, *confirmation.ranked_splits, *confirmation.splits]
    return next(
        (split, metric)
        for metric in ("accuracy", "tau")
        for split in wanted
        if (split, metric) in present
    )


def _statistics(
    confirmation: Confirmation,
) -> list[tuple[str, str, dict[str, dict[str, float | None]]]]:
    """Split, metric, and their rows of `agreement` by the name of the statistic. Sorted by metric;
    within a metric the mean over splits comes first."""
    cells = confirmation.agreement.select("split", "metric").unique(maintain_order=True).rows()
    found: dict[tuple[str, str], dict[str, dict[str, float | None]]] = {cell: {} for cell in cells}
    for row in confirmation.agreement.iter_rows(named=True):
        found[row["split"], row["metric"]][row["statistic"]] = row
    order = sorted(found, key=lambda cell: (METRICS.index(cell[1]), cell[0] != MEAN))
    return [(split, metric, found[split, metric]) for split, metric in order]


def _text(row: dict[str, float | None], metric: str, sign: str = "") -> str:
    interval = range_text(row["low"], row["high"], metric, sign)
    return f"{value_text(row['value'], metric, sign)} {interval}".strip()


def _what_is_resampled(confirmation: Confirmation) -> str:
    """A clause for the notes. A stage with one seed has no seeds to resample."""
    one_seed = [
        name
        for name, column in (("frozen", "frozen_seeds"), ("fine-tuned", "full_seeds"))
        if (confirmation.points[column] == 1).all()
    ]
    if len(one_seed) == 2:
        return "prompts only, because there is one seed"
    exception = f" ({one_seed[0]}: prompts only, because there is one seed)" if one_seed else ""
    return f"prompts and seeds{exception}"


def _rank_agreement(confirmation: Confirmation) -> Table:
    rows = [
        (
            split,
            _LABELS[metric],
            _text(found["spearman"], ""),
            _text(found["kendall"], ""),
            _text(found["ordered"], "accuracy"),
            _text(found["halves_full"], ""),
            _text(found["halves_frozen"], ""),
        )
        for split, metric, found in _statistics(confirmation)
    ]
    notes = [
        f"Square brackets: 95 % intervals, bootstrap over {_what_is_resampled(confirmation)}. They "
        "hold for these configurations; others may agree differently. They are widened upwards, "
        "because noise in the means hides agreement.",
        "ordered: share of the pairs of configurations that both stages put in the same order.",
        "halves: Spearman rho between two halves of one stage's own seeds; the noise of half the "
        "seeds lowers perfect agreement to about this value.",
        *_reasons(confirmation, ("spearman", "kendall", "ordered", "halves_full", "halves_frozen")),
    ]
    return Table(
        f"Frozen against fine-tuned ranking, {len(confirmation.matches)} configurations",
        ("split", "by", "Spearman rho", "Kendall tau-b", "ordered %", "halves full", "frozen"),
        tuple(rows),
        " ".join(notes),
        left=2,
    )


def _gain_agreement(confirmation: Confirmation) -> Table:
    rows = [
        (
            split,
            _LABELS[metric],
            _text(found["regret"], metric),
            _text(found["slope"], ""),
            _text(found["intercept"], metric, "+"),
            _text(found["bias"], metric, "+"),
        )
        for split, metric, found in _statistics(confirmation)
    ]
    notes = [
        "regret: the best fine-tuned value minus the fine-tuned value of the configuration that "
        "frozen states rank first.",
        "slope, intercept: of the line fitted to fine-tuned against frozen gains; 1 and 0 if they "
        "are equal. Noise in the frozen gains flattens the line, because the best of many "
        "configurations owe part of their gain to luck.",
        "bias: mean frozen gain minus mean fine-tuned gain. Gains of NLL are its decrease.",
        *_reasons(confirmation, ("regret", "slope", "intercept", "bias")),
    ]
    return Table(
        f"Regret, and gains over {confirmation.baseline}",
        ("split", "by", "regret", "slope", "intercept", "bias"),
        tuple(rows),
        " ".join(notes),
        left=2,
    )


def _reasons(confirmation: Confirmation, statistics: tuple[str, ...]) -> list[str]:
    """Sentences that say why some of these statistics are missing, one per reason."""
    found = confirmation.agreement.filter(pl.col("statistic").is_in(statistics))["reason"]
    return [f"{MISSING}: {reason}." for reason in found.drop_nulls().unique(maintain_order=True)]


def _configurations(confirmation: Confirmation, cell: tuple[str, str]) -> Table:
    """A table of every configuration's values and gains in both stages. cell: split and metric."""
    split, metric = cell
    points = confirmation.points.filter(pl.col("split") == split, pl.col("metric") == metric)
    rows = []
    for match, row in zip(confirmation.matches, points.iter_rows(named=True), strict=True):
        stages = []
        for stage in ("frozen", "full"):
            for names, sign in ((VALUE, ""), (GAIN, "+")):
                value, low, high = (row[f"{stage}_{name}"] for name in names)
                text = value_text(value, metric, sign)
                stages.append(f"{text} {range_text(low, high, metric, sign)}".strip())
        if match.name == confirmation.baseline:
            stages[1] = "baseline"
        if match.full == confirmation.baseline:
            stages[3] = "baseline"
        rows.append(
            (
                str(match.rank),
                match.name,
                "" if match.full == match.name else match.full,
                *stages,
                f"{row['frozen_seeds']}, {row['full_seeds']}",
                match.by,
                "; ".join(match.left),
            )
        )
    averaged = ", ".join(confirmation.ranked_splits)
    where = f"mean over {averaged}" if split == MEAN else split
    return Table(
        f"{_LABELS[metric][0].upper()}{_LABELS[metric][1:]}: {where}",
        (
            *("#", "configuration", "tuned as", "frozen", "gain", "tuned", "its gain"),
            *("seeds", "chosen by", "not taken over"),
        ),
        tuple(rows),
        "#: rank in the sweep. tuned as: name in the fine-tune, where another configuration of the "
        "sweep stands for it; both then have the same fine-tuned values.",
        left=3,
        wide=("seeds", "chosen by", "not taken over"),
    )


def _not_compared(confirmation: Confirmation) -> list[Table]:
    by_reason: dict[str, list[Excluded]] = {}
    for entry in (*confirmation.untuned, *confirmation.excluded):
        by_reason.setdefault(entry.reason, []).append(entry)
    if not by_reason:
        return []
    rows = []
    for reason, entries in by_reason.items():
        best = min(entries, key=lambda entry: entry.rank)
        rows.append((reason, str(len(entries)), best.name, str(best.rank)))
    return [
        Table(
            "Configurations of the sweep that are not compared",
            ("reason", "configurations", "best of them", "its rank"),
            tuple(rows),
        )
    ]


def confirmation_figure(confirmation: Confirmation) -> Callable[[], Figure]:
    """Return a function that draws fine-tuned against frozen values, one panel per split.

    A panel shows accuracy, or Kendall's tau-b on a split with groups only. The last panel lists
    the configurations by their rank in the sweep, which labels the points.
    """
    metric_of: dict[str, str] = {}
    cells = confirmation.points.select("split", "metric").unique(maintain_order=True).rows()
    for split, metric in cells:
        if metric != "nll":
            metric_of.setdefault(split, metric)
    order = sorted(metric_of, key=lambda split: split != MEAN)

    def draw() -> Figure:
        panels = len(order) + 1
        columns = 2 if panels % 2 == 0 and panels % PANELS else min(PANELS, panels)
        rows = -(-panels // columns)
        listing = [f"{match.rank}  {short_name(match.name, 34)}" for match in confirmation.matches]
        figure, axes = new_figure(max(2.5 * rows, 1.0 + 0.15 * len(listing)), columns, rows)
        for axis, split in zip(axes, order, strict=False):
            _draw_split(axis, confirmation, split, metric_of[split])
        for axis in axes[len(order) :]:
            axis.axis("off")
        axes[len(order)].text(
            0, 1, "\n".join(listing), transform=axes[len(order)].transAxes, va="top", fontsize=7
        )
        entries = {
            "configuration": Line2D([], [], color=BLUE, marker="o", linestyle=""),
            "baseline": Line2D([], [], color=ORANGE, marker="D", linestyle=""),
            "95 % interval": Line2D([], [], color=BLUE, linewidth=0.8, alpha=0.4),
        }
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=3)
        return figure

    return draw


def _draw_split(axis: Axes, confirmation: Confirmation, split: str, metric: str) -> None:
    here = (pl.col("split") == split, pl.col("metric") == metric)
    points = confirmation.points.filter(*here)
    for match, row in zip(confirmation.matches, points.iter_rows(named=True), strict=True):
        if row["frozen_estimate"] is not None and row["full_estimate"] is not None:
            _draw_point(
                axis,
                row,
                100 if metric == "accuracy" else 1,
                str(match.rank),
                is_baseline=match.name == confirmation.baseline,
            )
    rho = confirmation.agreement.filter(*here, pl.col("statistic") == "spearman")["value"]
    known = "n/a" if rho[0] is None else f"{rho[0]:.2f}"
    axis.set_title(f"{short_name(split, 20)}, ρ = {known}")
    unit = "accuracy (%)" if metric == "accuracy" else "Kendall τ-b"
    axis.set_xlabel(f"Frozen {unit}")
    axis.set_ylabel(f"Fine-tuned {unit}")
    axis.margins(0.12)
    axis.grid()
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_locator(MaxNLocator(5))


def _draw_point(
    axis: Axes, row: dict[str, Any], scale: float, label: str, *, is_baseline: bool
) -> None:
    """Draw one configuration, with the intervals of both stages if both have one."""

    x, y = scale * row["frozen_estimate"], scale * row["full_estimate"]
    color = ORANGE if is_baseline else BLUE
    if row["frozen_low"] is not None and row["full_low"] is not None:
        low, high = scale * row["frozen_low"], scale * row["frozen_high"]
        axis.plot([low, high], [y, y], color=color, linewidth=0.8, alpha=0.4)
        low, high = scale * row["full_low"], scale * row["full_high"]
        axis.plot([x, x], [low, high], color=color, linewidth=0.8, alpha=0.4)
    axis.plot(x, y, "D" if is_baseline else "o", color=color, markersize=4.5)
    axis.annotate(label, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
