"""Reliability diagrams of a sweep, and the report of a sweep with scenarios and label noise."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from small_sweep import compare_tables
from toy_groups import toy_groups

from embrm.core.errors import UserError
from embrm.metrics.reliability import FEW
from embrm.reports.run import report
from embrm.results.ledger import open_results
from embrm.studies.reliability.measure import measure_reliability
from embrm.studies.reliability.table import reliability_figure, reliability_tables
from embrm.sweeps.execute import sweep

SPEC = """
baseline = "bt[label_noise=0]"
seeds = [0]
validation = 0.2
scenarios = { splits = ["train", "more"], models = 0.4 }
evaluate = ["id", "prompt", "model", "mutual"]
defaults = { epochs = 8, lr = 0.03, batch_pairs = 64 }
[[runs]]
name = "bt"
grid = { label_noise = [0.0, 0.3] }
[[runs]]
name = "hinge"
loss = "hinge"
grid = { label_noise = [0.0, 0.3] }
"""
SCENARIOS = ("id", "prompt", "model", "mutual")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    (folder / "s.toml").write_text(SPEC)
    return sweep(folder / "s.toml", toy_groups(folder / "cache"), jobs=1)


def test_the_bins_reproduce_the_calibration_errors_of_the_ledger(swept: Path) -> None:
    names = ["hinge[label_noise=0]", "bt[label_noise=0]"]
    results = open_results(swept)
    found = measure_reliability(results, names)
    assert set(found["split"]) == {*SCENARIOS}
    assert found["name"].unique(maintain_order=True).to_list() == names
    for name in names:
        row = results.ledger.filter(config=name).row(0, named=True)
        assert row["temperature"] is not None
        for split in SCENARIOS:
            for at_temperature, metric in ((False, "ece"), (True, "ece_calibrated")):
                own = found.filter(split=split, name=name, at_temperature=at_temperature)
                assert own["pairs"].sum() == row[f"pairs@{split}"]
                gaps = own["pairs"] * (own["observed"] - own["predicted"]).abs()
                error = gaps.sum() / own["pairs"].sum()
                assert error == pytest.approx(row[f"{metric}@{split}"], abs=1e-6)


def test_runs_without_a_temperature_have_no_rows_at_it(swept: Path) -> None:
    results = open_results(swept)
    ledger = results.ledger.with_columns(temperature=pl.lit(None, dtype=pl.Float64))
    unfitted = type(results)(**{**vars(results), "ledger": ledger})
    assert not measure_reliability(unfitted, ["bt[label_noise=0]"])["at_temperature"].any()


def test_the_report_shows_scenarios_noise_and_reliability(swept: Path, tmp_path: Path) -> None:
    """The report reads a cache that has moved since the sweep from the path given to it."""
    cache, moved = Path(open_results(swept).cache), tmp_path / "moved"
    shutil.copytree(cache, moved)
    found = report(swept, cache=moved, out=tmp_path)
    names = {path.name for path in found.files}
    assert {"scenarios.png", "noise.svg", "reliability.png"} < names
    assert found.comparison.scenarios == SCENARIOS
    assert found.notes == ()
    assert set(found.comparison.noise["line"]) == {"bt", "hinge"}
    text = (tmp_path / "report.md").read_text()
    for part in (
        "## Scenarios: accuracy %",
        "## Scenarios: Kendall tau-b",
        "## Label noise, accuracy %: mean over",
        "## Reliability: mutual",
        "(figures/reliability.png)",
        r"| configuration | 0 % | 30 % | 30 % minus 0 % | minus bt's |",
    ):
        assert part in text
    content = json.loads((tmp_path / "report.json").read_text())
    best = found.comparison.ranking["name"][0]
    assert {row["name"] for row in content["reliability"]} == {best, "bt[label_noise=0]"}
    assert content["scenarios"] == list(SCENARIOS)
    with pytest.raises(UserError, match="nowhere"):
        report(swept, cache=tmp_path / "nowhere", out=tmp_path)
    again = measure_reliability(open_results(swept), [best, "bt[label_noise=0]"])
    if best != "bt[label_noise=0]":
        assert again.equals(found.reliability)


def test_the_figure_and_the_tables_show_the_bins(swept: Path) -> None:
    results = open_results(swept)
    name = "bt[label_noise=0]"
    comparison = compare_tables(
        "s", results.ledger, results.prompts, results.outcomes, ["prompt", "mutual"], name
    )
    found = measure_reliability(results, [name]).filter(pl.col("split").is_in(comparison.splits))
    # The toy splits have too few prompts for any bin to be drawn: pretend that there are enough.
    found = found.with_columns(prompts=pl.lit(FEW))

    draw = reliability_figure(found, comparison)
    assert draw is not None
    for axis, split, table in zip(
        draw().axes, ("prompt", "mutual"), reliability_tables(found), strict=True
    ):
        assert axis.get_title() == split
        for line, at_temperature in zip(axis.lines[1:], (False, True), strict=True):
            own = found.filter(split=split, at_temperature=at_temperature)
            x, y = line.get_data()
            assert x.tolist() == pytest.approx((100 * own["predicted"]).to_list())
            assert y.tolist() == pytest.approx((100 * own["observed"]).to_list())
            column = 6 if at_temperature else 3
            cells = [row[column] for row in table.rows if row[column] != "n/a"]
            assert cells == [f"{value:.1f}" for value in x]
        texts = [text.get_text() for text in axis.texts]
        row = comparison.measures.filter(split=split, name=name).row(0, named=True)
        assert texts == [f"ECE {row['ece']:.3f} → {row['ece_calibrated']:.3f}"]
    few = found.with_columns(prompts=pl.lit(FEW - 1))
    assert reliability_figure(few, comparison) is None
    assert reliability_figure(pl.DataFrame(), comparison) is None
    assert reliability_tables(pl.DataFrame()) == []
