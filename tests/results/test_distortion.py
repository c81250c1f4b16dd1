"""Token KL of runs beside their twins without a regularizer: constructed specs, and a sweep."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sweep_fixtures import sweep_fixture, toy_cache_fixture

from embrm.core.table import escape, markdown
from embrm.reports.figures import figures
from embrm.reports.sections.distortion import distortion_tables
from embrm.reports.tables import terminal_tables
from embrm.results.comparison import ComparedTables, compare_results, compare_runs
from embrm.results.distortion import regularizer_twins
from embrm.results.ledger import open_results

SPEC = """
baseline = "plain"
seeds = [0, 1]
validation = 0.2
[defaults]
epochs = 2
batch_pairs = 16
lr = 0.01
head = { kind = "linear", adapter = { kind = "low-rank", width = 2 } }
[[runs]]
name = "plain"
head = { kind = "linear" }
[[runs]]
name = "bt"
[[runs]]
name = "bt-far"
lr = 0.03
[[runs]]
name = "kept"
regularizer = { kind = "preserve-kl", weight = 10.0 }
grid = { lr = [0.01, 0.03] }
[[runs]]
name = "alone"
epochs = 3
regularizer = { kind = "grm-sft" }
[[runs]]
name = "head"
head = { kind = "linear" }
regularizer = { kind = "fisher" }
"""

cache = toy_cache_fixture(prompts=300, token_rows=2)
swept = sweep_fixture(SPEC)


def twins(**specs: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """`regularizer_twins` of these specs: configuration → regularizer and twin."""
    ledger = pl.DataFrame({"name": [*specs], "spec": [json.dumps(spec) for spec in specs.values()]})
    return {name: (kind, twin) for name, kind, twin in regularizer_twins(ledger).iter_rows()}


ADAPTER = {"head": {"kind": "linear", "adapter": {"kind": "low-rank", "width": 2}}}
GRM = {"kind": "grm-sft", "alpha": 0.01, "beta": 0.1, "weight": 1.0}


def test_a_twin_may_differ_in_regularizer_match_and_seeds_only() -> None:
    found = twins(
        bt={**ADAPTER, "lr": 0.01, "seed": 0},
        grm={**ADAPTER, "lr": 0.01, "seed": 1, "regularizer": GRM, "match": {"kl": 0.16}},
        other_lr={**ADAPTER, "lr": 0.02, "regularizer": GRM},
        noisy={**ADAPTER, "lr": 0.01, "regularizer": GRM, "label_noise": 0.1},
        plain={"lr": 0.01},
    )
    assert found == {
        "bt": (None, None),
        "grm": ("grm-sft", "bt"),
        "other_lr": ("grm-sft", None),
        "noisy": ("grm-sft", None),
    }


def test_a_regularizer_of_weight_0_makes_a_twin() -> None:
    off = {**ADAPTER, "regularizer": GRM | {"alpha": 0.0}}
    on = {**ADAPTER, "regularizer": GRM}
    assert twins(off=off, on=on) == {"off": (None, None), "on": ("grm-sft", "off")}
    kept = {"kind": "preserve-kl", "alpha": 0.01, "weight": 0.0}
    assert twins(off={**ADAPTER, "regularizer": kept}, on=on)["on"] == ("grm-sft", "off")
    # Where there is also a configuration without any, it is the twin.
    assert twins(a_off=off, bt=ADAPTER, on=on)["on"] == ("grm-sft", "bt")


def test_fine_tunes_have_twins_without_an_adapter() -> None:
    assert twins(bt={"lr": 0.1}, grm={"lr": 0.1, "regularizer": GRM}, other={"lr": 0.2}) == {
        "bt": (None, None),
        "grm": ("grm-sft", "bt"),
    }


def test_numbers_are_those_of_the_geometry_and_of_the_paired_comparison(swept: Path) -> None:
    results = open_results(swept)
    found = compare_results(results).distortion
    rows = {row["name"]: row for row in found.iter_rows(named=True)}
    assert {name: (row["regularizer"], row["twin"]) for name, row in rows.items()} == {
        "bt": (None, None),
        "bt-far": (None, None),
        "kept[lr=0.01]": ("preserve-kl", "bt"),
        "kept[lr=0.03]": ("preserve-kl", "bt-far"),
        "alone": ("grm-sft", None),
    }
    geometry = results.geometry.filter(split="train").join(results.ledger, on="run_id")
    for name, row in rows.items():
        values = geometry.filter(config=name)["kl_tokens"].to_numpy()
        assert len(values) == 2
        assert row["kl"] == pytest.approx(values.mean())
        assert row["kl_sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        if row["twin"]:
            assert (row["twin_kl"], row["twin_kl_sd"]) == tuple(
                rows[row["twin"]][key] for key in ("kl", "kl_sd")
            )
            assert row["kl"] < row["twin_kl"]
            own = compare_results(results, baseline=row["twin"]).ranking.filter(name=name)
            for key in ("estimate", "low", "high", "difference", "difference_low"):
                assert row[key] == own[key].item()
        else:
            assert row["twin_kl"] is row["difference"] is None


def test_the_table_shows_each_twin_above_the_runs_that_it_belongs_to(swept: Path) -> None:
    comparison = compare_results(open_results(swept))
    [table] = distortion_tables(comparison, 9)
    assert table.title == "Distortion: token KL of train"
    names = [row[1] for row in table.rows]
    assert sorted(names) == ["alone", "bt", "bt-far", "kept[lr=0.01]", "kept[lr=0.03]"]
    cells = {row[1]: row[2:] for row in table.rows}
    for twin, kept in (("bt", "kept[lr=0.01]"), ("bt-far", "kept[lr=0.03]")):
        assert names.index(kept) == names.index(twin) + 1
        assert cells[twin][0] == "is the twin"
        assert cells[kept][0] == twin
        assert cells[kept][2] == cells[twin][1]
        assert "±" in cells[kept][1]
    assert cells["alone"][0] == "none in this sweep: add it"
    assert (cells["alone"][2], cells["alone"][4]) == ("n/a", "n/a")
    assert "A regularizer can only protect" in table.note
    assert "none in this sweep: add it: without a run" in table.note
    assert "not measured" not in table.note
    assert escape("kept[lr=0.01]") in markdown(table)
    assert table in terminal_tables(comparison, 9)


def test_runs_left_out_of_the_table_are_counted(swept: Path) -> None:
    comparison = compare_results(open_results(swept))
    regularized = {"kept[lr=0.01]", "kept[lr=0.03]", "alone"}
    for top in range(1, 8):
        shown = regularized & set(comparison.best(top))
        tables = distortion_tables(comparison, top)
        assert len(tables) == (1 if shown else 0)
        for table in tables:
            assert shown == {row[1] for row in table.rows if row[2] != "is the twin"}
            left_out = len(regularized) - len(shown)
            assert (f"{left_out} more configurations" in table.note) == (left_out > 0)


def test_what_was_not_measured_or_did_not_finish_is_said(swept: Path) -> None:
    tables = ComparedTables.of(open_results(swept))

    def cells(tables: ComparedTables) -> tuple[dict[str, tuple[str, ...]], str]:
        [table] = distortion_tables(compare_runs(tables, "plain"), 9)
        return {row[1]: row[2:] for row in table.rows}, table.note

    found, note = cells(replace(tables, geometry=None))
    assert found["kept[lr=0.01]"][:3] == ("bt", "n/a", "n/a")
    assert found["kept[lr=0.01]"][4] != "n/a"
    assert "not measured" in note
    finished = tables.ledger.filter(pl.col("config") != "bt")["run_id"].implode()
    found, note = cells(
        replace(tables, outcomes=tables.outcomes.filter(pl.col("run_id").is_in(finished)))
    )
    assert "bt" not in found
    assert found["kept[lr=0.01]"][::2] == ("bt", "no finished runs", "n/a")
    assert "not measured" not in note


def test_the_figure_has_a_point_for_every_configuration_with_a_token_kl(swept: Path) -> None:
    results = open_results(swept)
    comparison, curves = (
        compare_results(results),
        results.curves.head(0).with_columns(name=pl.lit("")),
    )
    drawn = figures(comparison, curves, 20)
    svg = drawn["distortion.svg"].decode()
    assert drawn["distortion.png"].startswith(b"\x89PNG")
    colors = re.findall(r'<use [^>]*style="fill: (#[0-9a-f]+); stroke: #ffffff', svg)
    # Five configurations, and one entry of the legend for the twins and each kind of regularizer.
    assert len(colors) == 5 + 3
    assert colors.count("#222222") == 2 + 1
    assert "Token KL, train (nats)" in svg
    for text in ("BT twin", "preserve-kl", "grm-sft", "1  ", "5  "):
        assert f"<!-- {text}" in svg
    assert "<!-- 0.01 -->" in svg  # A logarithmic axis, whose numbers are not mathematics.
    near = comparison.distortion.with_columns(kl=0.1 + 0.01 * pl.int_range(pl.len()))
    linear = figures(replace(comparison, distortion=near), curves, 20)["distortion.svg"]
    assert b"<!-- 0.12" in linear
    unmeasured = compare_runs(replace(ComparedTables.of(results), geometry=None), "plain")
    assert "distortion.svg" not in figures(unmeasured, curves, 20)


def test_a_sweep_without_adapters_has_neither_table_nor_figure(swept: Path) -> None:
    tables = ComparedTables.of(open_results(swept))
    plain = compare_runs(
        replace(tables, ledger=tables.ledger.filter(pl.col("config").is_in(["plain", "head"]))),
        "plain",
    )
    assert plain.distortion.is_empty()
    assert distortion_tables(plain, 9) == []
