"""How far each configuration moves the language model's predictions, beside the configuration that
differs from it only in having no regularizer."""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from embrm.core.specs import canonical_json
from embrm.metrics.intervals import Replicates, compare

_UNCOMPARED = ("seed", "data_seed", "regularizer", "match")
"""Keys of a spec in which a run and its twin may differ. `match` chooses the learning rate, which
is compared."""

_OF_THE_HEAD = "fisher"
"""The kind of regularizer that acts on the head alone and moves no state."""

_TWINS = {"name": pl.String(), "regularizer": pl.String(), "twin": pl.String()}

_DIFFERENCE = ("difference", "difference_low", "difference_high")


def regularizer_twins(ledger: pl.DataFrame) -> pl.DataFrame:
    """Find the configurations that can move the language model's predictions, and their twins.

    ledger: name and spec (JSON) of the runs. Returns name, regularizer (its kind; null without one,
    or where its weight is 0) and twin, for every configuration with an adapter or a regularizer at
    token rows. twin: the configuration without a regularizer, or with one of weight 0, whose spec
    is the same otherwise; null where there is none, and for configurations without a regularizer.
    """
    kinds: dict[str, str | None] = {}
    shared: dict[str, str] = {}  # configuration → the part of its spec that its twin shares
    plain: dict[str, str] = {}  # this part → the configuration without a regularizer
    configurations = ledger.select("name", "spec").unique("name").sort("name")
    for name, text in configurations.iter_rows():
        spec = json.loads(text)
        regularizer = spec.get("regularizer")
        kind = regularizer["kind"] if regularizer and _is_active(regularizer) else None
        key = canonical_json({k: v for k, v in spec.items() if k not in _UNCOMPARED})
        if kind is None and (key not in plain or regularizer is None):
            plain[key] = name
        if kind != _OF_THE_HEAD and (kind or (spec.get("head") or {}).get("adapter")):
            kinds[name], shared[name] = kind, key
    # A twin may have no adapter: a fine-tune moves the states without one.
    twins = {plain[shared[name]] for name, kind in kinds.items() if kind and shared[name] in plain}
    kinds |= dict.fromkeys(twins - kinds.keys())
    rows = [(name, kind, plain.get(shared[name]) if kind else None) for name, kind in kinds.items()]
    return pl.DataFrame(rows, _TWINS, orient="row").sort("name")


def _is_active(regularizer: Mapping[str, Any]) -> bool:
    # A kind reads one of the two, and the other one then has its default, which is not 0.
    return bool(regularizer.get("alpha", 1) and regularizer.get("weight", 1))


def measure_distortion(
    ledger: pl.DataFrame,
    runs: pl.DataFrame,
    geometry: pl.DataFrame | None,
    trained_on: str,
    result: Replicates,
    ranking: pl.DataFrame,
) -> pl.DataFrame:
    """Put the token KL and the accuracy of every configuration beside those of its twin.

    ledger: name and spec of all runs. runs: run_id, name and seed of the finished ones. geometry:
    run_id, split and kl_tokens. trained_on: the split that the training responses are in geometry.
    result: the ranking's metric, one column per run of `runs`. ranking: `Comparison.ranking`.

    Returns `Comparison.distortion`, in the ranking's order; empty if no configuration has a
    regularizer or an adapter.
    """
    found = regularizer_twins(ledger)
    if found.is_empty():
        return pl.DataFrame()
    measured = _token_kl(runs, geometry, trained_on)
    differences = [
        compare(result, runs, twin, set(found.filter(twin=twin)["name"])).select(
            "name", *_DIFFERENCE
        )
        for twin in sorted(set(found["twin"].drop_nulls()) & set(runs["name"]))
    ]
    empty = pl.DataFrame(schema={"name": pl.String()} | dict.fromkeys(_DIFFERENCE, pl.Float64()))
    return (
        ranking.select("name", "estimate", "low", "high")
        .join(found, on="name", maintain_order="left")
        .join(measured, on="name", how="left", maintain_order="left")
        .join(
            measured.rename({"name": "twin", "kl": "twin_kl", "kl_sd": "twin_kl_sd"}),
            on="twin",
            how="left",
            maintain_order="left",
        )
        .join(pl.concat([empty, *differences]), on="name", how="left", maintain_order="left")
        .select(
            *("name", "regularizer", "kl", "kl_sd", "twin", "twin_kl", "twin_kl_sd"),
            *("estimate", "low", "high", *_DIFFERENCE),
        )
    )


def _token_kl(runs: pl.DataFrame, geometry: pl.DataFrame | None, trained_on: str) -> pl.DataFrame:
    """name, kl (mean over runs; null unless all have a value) and kl_sd (sample standard deviation;
    null with a single run)."""
    measured = pl.lit(None, pl.Float64).alias("kl_tokens")
    own = runs.select("run_id", "name")
    if geometry is None or "kl_tokens" not in geometry.columns:
        table = own.with_columns(measured)
    else:
        trained = geometry.filter(pl.col("split") == trained_on).select("run_id", "kl_tokens")
        table = own.join(trained, on="run_id", how="left")
    complete = pl.when(pl.col("kl_tokens").null_count() == 0)
    return (
        table.group_by("name")
        .agg(
            complete.then(pl.col("kl_tokens").mean()).alias("kl"),
            complete.then(pl.col("kl_tokens").std()).alias("kl_sd"),
        )
        .sort("name")
    )
