"""Compare best-of-n selection by a sweep's runs: curves with intervals, tables and a figure."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
from matplotlib.figure import Figure
from numpy.typing import NDArray

from embrm.core.drawing import (
    BLACK,
    CURVES,
    GREY,
    drawn,
    new_figure,
    short_name,
)
from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.formatting import difference_text, number_text, p_text, with_range_text
from embrm.core.table import Table, escape, markdown
from embrm.metrics.best_of_n import gao_fit, kl_bound
from embrm.metrics.intervals import Replicates, compare, resample
from embrm.results.ledger import finished_runs, open_results
from embrm.studies.best_of_n.measure import SplitChoices, measure_best_of_n
from embrm.sweeps.ledger import parquet

Floats = NDArray[np.float64]

_CAPTION = (
    "Gain of the gold score (left) and of the reward (right) over a random response, in standard "
    "deviations within a prompt, with 95 % intervals"
)

_NOTE = (
    "peak n: the n with the highest gold. drop: gold at its peak minus gold at the largest n; the "
    "peak is chosen on other prompts; above 0, gold falls while the reward rises. gap: gain of "
    "the reward minus gain of gold at the largest n; 0 if the reward were gold itself. Both are in "
    "standard deviations within a prompt. Square brackets: 95 % intervals, bootstrap over prompts "
    "and seeds."
)

_FIT_NOTE = (
    "alpha, beta: gain of gold fitted as d (alpha - beta d) with d = √KL (arXiv 2210.10760). "
    "fitted peak: the d of its maximum, if it is reached; fitted drop: from there to the largest n."
)
"""On columns that the terminal has no room for."""


@dataclass(frozen=True)
class BestOfN:
    """Curves and summaries of best-of-n selection, the tables shown and the files written.

    Standard deviations (sd) are within a prompt, see `SplitChoices`. The columns x_low and x_high
    are the 95 % interval of x over prompts and seeds. x_difference is paired and to the baseline,
    null for the baseline itself.

    curves: one row per split, configuration and n.
        split, n, kl (`kl_bound`), kl_estimate (null without log-probabilities), name.
        gold and gold_difference in the data's units; gain, the gold gained over n = 1, and proxy,
        the reward gained, in sd; all with intervals.
    summary: one row per split and configuration, the highest gold at the largest n first.
        split, rank, name, seeds, n (the largest).
        At the largest n, with intervals: gold and gold_difference in the data's units; gap, gain of
        the reward minus gain of gold, drop, gold at its peak minus gold there, gap_difference and
        drop_difference in sd. p and p_holm: of gold_difference.
        peak_n: the n with the highest gold. alpha, beta, fit_peak (a √KL; null if beyond the
        largest n), fit_drop: of the curve `gao_fit`. tied: number of prompts whose responses all
        have the same reward, mean over seeds.
    splits: one row per split: split, prompts, least and most (responses to a prompt), gold_at_1,
        gold_sd, constant (prompts whose responses all have the same gold score), leaked (prompts
        that also occur in training), excluded (groups left out, by reason).
    notes: sentences on the runs and splits that were left out.
    """

    baseline: str
    curves: pl.DataFrame
    summary: pl.DataFrame
    splits: pl.DataFrame
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    files: tuple[Path, ...]

    def json(self) -> str:
        """Every number, to 12 significant digits."""
        content: dict[str, Any] = {"baseline": self.baseline, "notes": self.notes}
        for name in ("splits", "summary", "curves"):
            content[name] = getattr(self, name).to_dicts()
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def best_of_n(
    folder: Path,
    *,
    split: str | None = None,
    ns: Sequence[int] | None = None,
    baseline: str | None = None,
    top: int = 20,
    cache: Path | None = None,
    out: Path | None = None,
) -> BestOfN:
    """Write bon.parquet (the curves), bon.json, bon.md and figures/bon.* for the sweep in `folder`.

    split, ns, cache: see `measure_best_of_n`. baseline: the configuration that all others are
    compared with; by default the spec's. top: number of configurations in a table. out: folder to
    write to; by default the sweep's. Equal rewards give equal bytes.

    Raises: UserError when the sweep has no groups with gold scores, a name is unknown, or no run
    has weights.
    """
    results = open_results(folder)
    runs, reference, diverged = finished_runs(results, baseline)
    if ns is not None and max(ns) < 2:
        raise UserError("n = 1 chooses a response at random: name at least one larger n")
    chosen, skipped = measure_best_of_n(results, runs, split=split, ns=ns, cache=cache)
    notes = [*skipped, *diverged]
    compared = [summarize(one, runs, reference) for one in chosen]
    curves, summary = (pl.concat(tables) for tables in zip(*compared, strict=True))
    splits = _rounded(pl.DataFrame([_described(one) for one in chosen]))
    tables = best_of_n_tables(summary, splits, reference, top)
    images = best_of_n_figure(curves, summary, reference)
    out = out or folder
    names = "bon.parquet", "bon.json", "bon.md", *(f"figures/{image}" for image in images)
    files = tuple(out / name for name in names)
    found = BestOfN(reference, curves, summary, splits, tuple(notes), tuple(tables), files)
    contents = [parquet(curves), found.json().encode(), _markdown(folder.name, found).encode()]
    for path, content in zip(files, [*contents, *images.values()], strict=True):
        write_bytes(path, content)
    return found


def summarize(
    chosen: SplitChoices, runs: pl.DataFrame, baseline: str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Compute `BestOfN.curves` and `BestOfN.summary` of one split.

    runs: columns name and seed, in the order of the runs of `chosen`.
    """
    seeds_of = {
        name: np.flatnonzero(runs["name"].to_numpy() == name)
        for name in runs["name"].unique().sort()  # the order of `compare`
    }
    prompts, ns = len(chosen.prompt_ids), chosen.ns
    columns = runs.height * len(ns)
    of_prompts = [
        chosen.gold.reshape(prompts, columns),
        chosen.proxy.reshape(prompts, columns),
        _drops(chosen, seeds_of.values()),
    ]
    found = resample(chosen.prompt_ids, np.concatenate(of_prompts, axis=1), np.ones((prompts, 1)))
    # Row 0 is the estimate, the others are its bootstrap replicates: all get the same arithmetic.
    every = np.concatenate([found.estimates[None], found.draws])
    gold, proxy, drop = np.split(every, [columns, 2 * columns], axis=1)
    gold, proxy = (part.reshape(-1, runs.height, len(ns)) for part in (gold, proxy))
    gain = gold - gold[..., :1]

    def compared(values: Floats) -> pl.DataFrame:
        return compare(Replicates(values[0], values[1:], found.prompts), runs, baseline)

    divergences = kl_bound(ns)
    curves = []
    for place, n in enumerate(ns):
        estimates = [chosen.kl[seeds, place].mean() for seeds in seeds_of.values()]
        known = {"split": chosen.split, "n": n, "kl": divergences[place], "kl_estimate": estimates}
        curves.append(
            pl.DataFrame(known | {"name": [*seeds_of]})
            .hstack(_in_units(compared(gold[..., place]), chosen).select(_named("gold")))
            .hstack(compared(gain[..., place]).select(_named("gain")[:3]))
            .hstack(compared(proxy[..., place]).select(_named("proxy")[:3]))
        )
    mean_gains = np.stack([gain[0, seeds].mean(axis=0) for seeds in seeds_of.values()])
    fit, end = gao_fit(ns, mean_gains), float(np.sqrt(divergences[-1]))
    of_gold = _in_units(compared(gold[..., -1]), chosen)
    summary = (
        of_gold.select(
            pl.lit(chosen.split).alias("split"),
            pl.col("estimate").rank("min", descending=True).cast(pl.Int64).alias("rank"),
            "name",
            "seeds",
            pl.lit(ns[-1]).alias("n"),
            *_named("gold"),
            "p",
            "p_holm",
        )
        .hstack(compared(proxy[..., -1] - gain[..., -1]).select(_named("gap")))
        .hstack(compared(drop).select(_named("drop")))
        .with_columns(
            peak_n=pl.Series([ns[place] for place in mean_gains.argmax(axis=1)]),
            alpha=pl.Series(fit.alpha),
            beta=pl.Series(fit.beta),
            fit_peak=pl.Series(np.where(fit.peak <= end, fit.peak, np.nan)),
            fit_drop=pl.Series(fit.drop(end)),
            tied=pl.Series([chosen.tied[seeds].mean() for seeds in seeds_of.values()]),
        )
    )
    return _rounded(pl.concat(curves)), _rounded(summary.sort("rank", "name"))


def _drops(chosen: SplitChoices, configurations: Iterable[NDArray[np.int64]]) -> Floats:
    """Gold at the peak minus gold at the largest n, [prompts, runs]; NaN with one prompt.

    Each half of the prompts uses the peak that the configuration has on the other half. On the same
    prompts the highest of several points is partly noise, so every curve would seem to fall after.
    """
    half = np.unique(chosen.prompt_ids.to_numpy(), return_inverse=True)[1] % 2
    drops = np.full(chosen.gold.shape[:2], np.nan)
    if half.any():
        for own in configurations:
            for side in (0, 1):
                here = np.ix_(half == side, own)
                peak = chosen.gold[half != side][:, own].mean(axis=(0, 1)).argmax()
                drops[here] = chosen.gold[here][..., peak] - chosen.gold[here][..., -1]
    return drops


def _in_units(comparison: pl.DataFrame, chosen: SplitChoices) -> pl.DataFrame:
    """Convert gold from standard deviations around the mean of the pools to the data's units."""
    values, differences = pl.col("estimate", "low", "high"), cs.starts_with("difference")
    return comparison.with_columns(
        values * chosen.gold_sd + chosen.gold_mean, differences * chosen.gold_sd
    )


def _named(measure: str) -> list[pl.Expr]:
    """The values, differences and intervals of `compare`, renamed after the measure."""
    ends = {"estimate": "", "low": "_low", "high": "_high"}
    ends |= {f"difference{end}": f"_difference{end}" for end in ("", "_low", "_high")}
    return [pl.col(column).alias(measure + end) for column, end in ends.items()]


def _described(chosen: SplitChoices) -> dict[str, Any]:
    """A row of `BestOfN.splits`."""
    return {
        "split": chosen.split,
        "prompts": chosen.prompt_ids.n_unique(),
        "least": chosen.sizes[0],
        "most": chosen.sizes[1],
        "gold_at_1": float(chosen.gold[:, 0, 0].mean() * chosen.gold_sd + chosen.gold_mean),
        "gold_sd": chosen.gold_sd,
        "constant": chosen.constant,
        "leaked": chosen.leaked,
        "excluded": ", ".join(f"{count} {reason}" for reason, count in chosen.excluded.items()),
    }


def _rounded(table: pl.DataFrame) -> pl.DataFrame:
    """Round to 12 significant digits; the others depend on the machine's order of summation."""
    return table.with_columns(cs.float().fill_nan(None).round_sig_figs(12))


def _markdown(title: str, found: BestOfN) -> str:
    parts = [f"# {escape(title)}: best of n\n", f"![{_CAPTION}](figures/bon.png)\n"]
    parts += [markdown(table) for table in found.tables]
    parts.append(f"{_FIT_NOTE}\n")
    parts += [f"- {escape(note)}.\n" for note in found.notes]
    return "\n".join(parts)


def best_of_n_tables(
    summary: pl.DataFrame, splits: pl.DataFrame, baseline: str, top: int
) -> list[Table]:
    """Make a table of the response pools, then one of the configurations for each split.

    summary, splits: those of `BestOfN`. top: number of configurations to show; the baseline is
    always among them.
    """
    pools = Table(
        "Response pools",
        (
            "split",
            "prompts",
            "responses",
            "gold at n = 1",
            "gold sd",
            "constant gold",
            "seen in training",
        ),
        tuple(
            (
                row["split"],
                f"{row['prompts']:,}",
                "-".join(str(size) for size in dict.fromkeys((row["least"], row["most"]))),
                number_text(row["gold_at_1"]),
                number_text(row["gold_sd"]),
                str(row["constant"]),
                str(row["leaked"]),
            )
            for row in splits.iter_rows(named=True)
        ),
        " ".join(
            ["gold sd: standard deviation of gold within a prompt."]
            + [
                f"Groups of {row['split']} left out: {row['excluded']}."
                for row in splits.iter_rows(named=True)
                if row["excluded"]
            ]
        ),
    )
    return [
        pools,
        *(
            _split_table(summary.filter(pl.col("split") == split), baseline, top)
            for split in splits["split"]
        ),
    ]


def _split_table(summary: pl.DataFrame, baseline: str, top: int) -> Table:
    shown = summary.filter((pl.int_range(pl.len()) < max(top, 1)) | (pl.col("name") == baseline))
    split, n = summary["split"][0], summary["n"][0]
    rows = []
    for row in shown.iter_rows(named=True):
        gold = {f"difference{end}": row[f"gold_difference{end}"] for end in ("", "_low", "_high")}
        rows.append(
            (
                str(row["rank"] or ""),
                row["name"] + ("°" if row["tied"] else ""),
                f"{row['seeds']}{'' if row['seeds'] > 1 else '*'}",
                with_range_text(row, "gold"),
                "baseline" if row["name"] == baseline else difference_text(gold, ""),
                p_text(row["p_holm"]),
                str(row["peak_n"]),
                "none"
                if row["peak_n"] == n and row["drop"] == 0
                else with_range_text(row, "drop", "+"),
                with_range_text(row, "gap", "+"),
                *(number_text(row[name]) for name in ("alpha", "beta", "fit_peak", "fit_drop")),
            )
        )
    notes = [_NOTE]

    if hidden := summary.height - shown.height:
        notes.append(f"{hidden} more configurations in bon.json.")
    if shown["gold_low"].is_null().all():
        notes.append("No intervals: too few prompts to resample.")
    if (shown["seeds"] == 1).any():
        notes.append("* one seed: variance between seeds is not covered.")
    if (shown["tied"] > 0).any():
        notes.append(
            "° gives all responses to some prompts the same reward, and chooses at random there."
        )
    return Table(
        f"Best of n: {split}",
        (
            *("#", "configuration", "seeds", f"gold at n = {n}", f"minus {baseline}", "Holm p"),
            *("peak n", "drop", "gap", "alpha", "beta", "fitted peak", "fitted drop"),
        ),
        tuple(rows),
        " ".join(notes),
        left=2,
        wide=("alpha", "beta", "fitted peak", "fitted drop"),
    )


def best_of_n_figure(
    curves: pl.DataFrame, summary: pl.DataFrame, baseline: str
) -> dict[str, bytes]:
    """Draw gold and reward against √KL, one row of panels per split; returns file name → content.

    curves, summary: those of `BestOfN`. The figure shows the baseline and the configurations with
    the highest gold at the largest n of the first split.
    """

    return drawn({"bon": lambda: _draw(curves, summary, baseline)})


def _draw(curves: pl.DataFrame, summary: pl.DataFrame, baseline: str) -> Figure:
    splits = summary["split"].unique(maintain_order=True).to_list()
    first = summary.filter(split=splits[0])["name"].to_list()
    names = [*[name for name in first if name != baseline][: len(CURVES)], baseline]
    figure, axes = new_figure(0.6 + 2.6 * len(splits), 2, len(splits))
    for of_gold, of_reward, split in zip(axes[::2], axes[1::2], splits, strict=True):
        of_reward.sharey(of_gold)
        for axis, measure, title in ((of_gold, "gain", "Gold"), (of_reward, "proxy", "Reward")):
            colors = iter(CURVES)
            for name in names:
                own = curves.filter(split=split, name=name).sort("n")
                d = np.sqrt(own["kl"].to_numpy())
                value, low, high = (
                    own[column].cast(pl.Float64).to_numpy()
                    for column in (measure, f"{measure}_low", f"{measure}_high")
                )
                color = BLACK if name == baseline else next(colors)
                axis.fill_between(d, low, high, color=color, alpha=0.12, linewidth=0)
                axis.plot(
                    d,
                    value,
                    "o",
                    color=color,
                    markersize=3,
                    linewidth=1.4,
                    linestyle=(0, (4, 2)) if name == baseline else "-",
                    label=short_name(name),
                )
            axis.axhline(0, color=GREY, linewidth=0.9)
            axis.set_title(f"{title}, {short_name(split, 30)}")
            axis.set_xlabel("√KL, KL in nats")
            axis.set_ylabel("Gain over n = 1 (sd)")
            axis.grid()
            axis.set_axisbelow(True)
            above = axis.secondary_xaxis("top")
            above.set_xticks(d, [str(n) for n in own["n"]], fontsize=7, color=GREY)
            above.tick_params(length=0)
            above.spines["top"].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure
