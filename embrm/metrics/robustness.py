"""Changes of a metric from the easiest to the hardest condition: over scenarios (unseen prompts and
response models) and over rates of label noise, with intervals.

A change is the hardest minus the easiest condition, paired by prompt and seed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.specs import canonical_json
from embrm.metrics.intervals import Replicates, compare

_NOISE = "label_noise"

_LINE = {"line": pl.String(), _NOISE: pl.Float64(), "name": pl.String()}


def scenario_falls(
    resampled: Mapping[tuple[str, str], Replicates],
    scenarios: Sequence[str],
    runs: pl.DataFrame,
    baseline: str | None,
) -> pl.DataFrame:
    """Accuracy and τ-b on the last of `scenarios` minus those on the first: metric and the columns
    of `intervals.compare`, one row per metric and configuration.

    resampled: (split, metric) → replicates, one column per run. scenarios: splits, the nearest to
    training first. runs: name and seed. Empty where neither metric exists on both splits.
    """
    found = []
    for metric in ("accuracy", "tau"):
        having = [split for split in scenarios if (split, metric) in resampled]
        if len(having) < 2 or (having[0], having[-1]) != (scenarios[0], scenarios[-1]):
            continue
        near, far = (resampled[split, metric] for split in (having[0], having[-1]))
        change = _minus(far, near)
        found.append(
            compare(change, runs, baseline).select(pl.lit(metric).alias("metric"), pl.all())
        )
    return pl.concat(found) if found else pl.DataFrame()


def noise_lines(ledger: pl.DataFrame) -> pl.DataFrame:
    """Find configurations that a spec's grid over `label_noise` made and that differ in nothing
    else. Those that share everything but the rate form a line, as in a plot of metric by rate.

    ledger: name and spec of the runs. Returns line (the common part of the names), label_noise and
    name, sorted by line and rate; empty where there are none.
    """
    rows = []
    for name, text in ledger.select("name", "spec").unique("name").iter_rows():
        rest = json.loads(text)
        line, rate = _without_noise(name), rest.pop(_NOISE, None)
        if line is not None and rate is not None:
            rest.pop("seed", None)
            rows.append({"line": line, _NOISE: rate, "name": name, "rest": canonical_json(rest)})
    table = pl.DataFrame(rows, schema=_LINE | {"rest": pl.String()}).sort("line", _NOISE)
    alike = pl.col("rest").n_unique().over("line") == 1
    several = pl.col(_NOISE).n_unique().over("line") > 1
    return table.filter(alike & several).drop("rest")


def _without_noise(name: str) -> str | None:
    """The name that a grid gives, without the rate: bt[lr=0.1] for bt[lr=0.1,label_noise=0.2]; None
    where it has no rate."""
    base, _, labels = name.removesuffix("]").rpartition("[")
    parts = labels.split(",")
    kept = [part for part in parts if not part.startswith(f"{_NOISE}=")]
    if not base or len(kept) == len(parts):
        return None
    return f"{base}[{','.join(kept)}]" if kept else base


def noise_falls(
    lines: pl.DataFrame, result: Replicates, runs: pl.DataFrame, baseline: str | None
) -> pl.DataFrame:
    """A metric at the highest rate of label noise minus that at the lowest: the columns of
    `intervals.compare`, where name is the line and differences are to the baseline's line.

    Only for lines that have both the highest and the lowest rate of all lines, so that they can be
    compared. lines: from `noise_lines`. result: one column per run. runs: name and seed.
    """
    seeds = [name for name in ("seed", "data_seed") if name in runs.columns]
    places = {
        (name, tuple(own)): place
        for place, (name, *own) in enumerate(runs.select("name", *seeds).iter_rows())
    }
    rate = pl.col(_NOISE)
    clean, noisy = (
        dict(lines.filter(rate == end).select("line", "name").iter_rows())
        for end in (lines[_NOISE].min(), lines[_NOISE].max())
    )
    ends = {
        (line, seed): (places[clean[line], seed], places[noisy[line], seed])
        for line in clean.keys() & noisy.keys()
        for seed in runs.select(seeds).unique().iter_rows()
        if (clean[line], seed) in places and (noisy[line], seed) in places
    }
    schema: dict[str, Any] = {"name": pl.String} | dict.fromkeys(seeds, pl.Int64)
    fallen = pl.DataFrame([(line, *own) for line, own in ends], schema, orient="row")
    columns = np.array([*ends.values()], dtype=np.int64).reshape(-1, 2)
    line_of = dict(lines.select("name", "line").iter_rows())
    change = _minus(_of(result, columns[:, 1]), _of(result, columns[:, 0]))
    return compare(change, fallen, line_of.get(baseline or ""))


def _minus(one: Replicates, other: Replicates) -> Replicates:
    """Difference of two results of the same runs; replicates are paired, as they share counts."""
    return Replicates(
        estimates=one.estimates - other.estimates,
        draws=one.draws - other.draws,
        prompts=min(one.prompts, other.prompts),
        overlap=max(one.overlap, other.overlap),
    )


def _of(result: Replicates, columns: NDArray[np.int64]) -> Replicates:
    return replace(result, estimates=result.estimates[columns], draws=result.draws[:, columns])
