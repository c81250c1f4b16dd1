"""Report preference strengths by decile, as a page with a table and a figure."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from embrm.core.drawing import BLUE, GREY, drawn, new_figure
from embrm.core.files import write_bytes
from embrm.core.formatting import MISSING, number_text, range_text, value_text
from embrm.core.table import Table, escape, markdown
from embrm.metrics.intervals import resample
from embrm.studies.strength.measure import deciles, with_decile

_CAPTION = (
    "By decile of preference strength: labels that agree with gold, if it is known, with 95 % "
    "intervals over prompts; and mean strength, with the range in the decile"
)


def strength_report(
    title: str, strengths: pl.DataFrame, made: Mapping[str, Any], out: Path
) -> tuple[Path, ...]:
    """Write strength.md, figures/strength.png and figures/strength.svg to `out`; returns the paths.

    strengths: the rows of a "strengths" label table. made: its digest and provenance. Equal tables
    give equal bytes.
    """
    summary = deciles_with_intervals(strengths)
    images = drawn({"strength": strength_figure(summary)})
    parameters = made["parameters"]
    text = "\n".join(
        [
            f"# {escape(title)}\n",
            f"{escape(made['rule'])}: {strengths.height:,} pairs, evaluated by the heads of "
            f"{len(parameters['run_ids'])} runs on cache {made['cache_id']}; digest of the label "
            f"table: {made['digest']}.\n",
            f"![{_CAPTION}](figures/strength.png)\n",
            markdown(strength_table(summary)),
        ]
    )
    written = {
        out / "strength.md": text.encode(),
        **{out / "figures" / name: image for name, image in images.items()},
    }
    for path, content in written.items():
        write_bytes(path, content)
    return tuple(written)


def deciles_with_intervals(strengths: pl.DataFrame) -> pl.DataFrame:
    """Summarize strengths as `deciles` does, with the 95 % interval of `right`, bootstrapped over
    prompts.

    Adds the columns right_low and right_high. They are null with fewer than two prompts, and where
    all labels agree with gold or none does.
    """
    known = with_decile(strengths).filter(pl.col("gold") != 0)
    rows = []
    for (decile,), own in known.group_by("decile", maintain_order=True):
        right = (own["gold"] > 0).cast(pl.Float64).to_numpy()[:, None]
        found = resample(own["prompt_id"], right, np.ones_like(right))
        low, high = (
            np.nanquantile(found.draws, [0.025, 0.975]) if found.prompts > 1 else (None, None)
        )
        rows.append({"decile": decile, "right_low": low, "right_high": high})
    schema = {"decile": pl.Int64, "right_low": pl.Float64, "right_high": pl.Float64}
    intervals = pl.DataFrame(rows, schema=schema)
    # Where all labels agree or none does, every bootstrap draw is the same: that is no interval.
    varies = pl.col("right_low") < pl.col("right_high")
    intervals = intervals.with_columns(pl.when(varies).then(pl.col("right_low", "right_high")))
    return deciles(strengths).join(intervals, on="decile", how="left", maintain_order="left")


def strength_table(summary: pl.DataFrame) -> Table:
    """Make the table of a summary by `deciles_with_intervals`, one row per decile."""
    rows = []
    for row in summary.iter_rows(named=True):
        right = value_text(row["right"], "accuracy")
        interval = range_text(row["right_low"], row["right_high"], "accuracy")
        rows.append(
            (
                str(row["decile"]),
                f"{row['pairs']:,}",
                number_text(row["strength"]),
                f"{number_text(row['lowest'])} to {number_text(row['highest'])}",
                number_text(row["spread"]),
                value_text(row["negative"], "accuracy"),
                MISSING if row["right"] is None else f"{right} {interval}".rstrip(),
                number_text(row["gold"]),
            )
        )
    return Table(
        "Deciles of the pairs by preference strength, weakest first",
        ("decile", "pairs", "strength", "range", "spread", "below 0 %", "right %", "gold"),
        tuple(rows),
        "strength: reward difference in the direction of the label, averaged over the heads. "
        "range: the lowest and the highest strength in the decile. spread: mean standard deviation "
        "of a pair's reward difference over the heads. below 0: pairs with negative strength. "
        "right: labels that agree with the gold scores, among pairs whose gold difference is known "
        "and not 0; square brackets: 95 % interval, bootstrap over prompts. gold: mean gold "
        "difference in the direction of the label.",
    )


def strength_figure(summary: pl.DataFrame) -> Callable[[], Figure]:
    """Return a function that draws agreement with gold, if it is known, and strength by decile.

    summary: made by `deciles_with_intervals`.
    """
    return lambda: _draw(summary)


def _draw(summary: pl.DataFrame) -> Figure:
    percent = summary.with_columns(pl.col("right", "right_low", "right_high") * 100)
    panels = {
        "Labels that agree with gold (%)": ("right", "right_low", "right_high"),
        "Strength (reward difference)": ("strength", "lowest", "highest"),
    }
    panels = {
        title: columns
        for title, columns in panels.items()
        if percent[columns[0]].null_count() < percent.height
    }
    figure, axes = new_figure(2.8, len(panels))
    for axis, (title, columns) in zip(axes, panels.items(), strict=True):
        value, low, high = (percent[column].cast(pl.Float64).to_numpy() for column in columns)
        axis.axhline(
            50 if columns[0] == "right" else 0, color=GREY, linewidth=0.9, linestyle=(0, (4, 3))
        )
        axis.vlines(percent["decile"].to_numpy(), low, high, color=BLUE, linewidth=1.4, alpha=0.6)
        axis.plot(percent["decile"].to_numpy(), value, "o-", color=BLUE, markersize=4, linewidth=1)
        axis.set_xticks(percent["decile"].to_list())
        axis.set_xlabel("Decile of the pairs, weakest first")

        axis.set_title(title)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
    return figure
