"""Strength of preference, by tenths of the pairs: a table and a figure of a table of strengths."""

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
    "Labels that agree with gold, with 95 % intervals over prompts, and strength from the lowest "
    "to the highest, by tenths of the pairs"
)


def strength_report(
    title: str, strengths: pl.DataFrame, made: Mapping[str, Any], out: Path
) -> tuple[Path, ...]:
    """Write strength.md and figures/strength.png, *.svg to `out`; the paths.

    strengths: the rows of a label table of that kind. made: its digest and provenance. Equal tables
    give the same bytes.
    """
    tenths = with_agreement(strengths)
    images = drawn({"strength": strength_figure(tenths)})
    parameters = made["parameters"]
    text = "\n".join(
        [
            f"# {escape(title)}\n",
            f"{escape(made['rule'])}: {strengths.height:,} pairs judged by "
            f"{len(parameters['run_ids'])} runs of cache {made['cache_id']}; "
            f"digest {made['digest']}.\n",
            f"![{_CAPTION}](figures/strength.png)\n",
            markdown(strength_table(tenths)),
        ]
    )
    written = {
        out / "strength.md": text.encode(),
        **{out / "figures" / name: image for name, image in images.items()},
    }
    for path, content in written.items():
        write_bytes(path, content)
    return tuple(written)


def with_agreement(strengths: pl.DataFrame) -> pl.DataFrame:
    """As `deciles`, and right_low, right_high: the interval of right, over prompts; null of fewer
    than two, or where all labels agree or none does."""
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
    told = pl.col("right_low") < pl.col("right_high")  # else the bootstrap says nothing
    intervals = intervals.with_columns(pl.when(told).then(pl.col("right_low", "right_high")))
    return deciles(strengths).join(intervals, on="decile", how="left", maintain_order="left")


def strength_table(tenths: pl.DataFrame) -> Table:
    """tenths: as of `with_agreement`."""
    rows = []
    for row in tenths.iter_rows(named=True):
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
        "Tenths of the pairs, weakest first",
        ("tenth", "pairs", "strength", "range", "spread", "below 0 %", "right %", "gold"),
        tuple(rows),
        "strength: mean reward difference in the direction of the label, over the members; spread: "
        "its standard deviation over them. right: labels that agree with gold, of the pairs whose "
        "gold is known and not 0. gold: its mean difference in the direction of the label.",
    )


def strength_figure(tenths: pl.DataFrame) -> Callable[[], Figure]:
    """Agreement with gold, where it is known, and strength; a point a tenth.

    tenths: as of `with_agreement`.
    """
    return lambda: _draw(tenths)


def _draw(tenths: pl.DataFrame) -> Figure:
    percent = tenths.with_columns(pl.col("right", "right_low", "right_high") * 100)
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
        axis.set_xlabel("Tenth of the pairs, weakest first")
        axis.set_title(title)
        axis.grid(axis="y")
        axis.set_axisbelow(True)
    return figure
