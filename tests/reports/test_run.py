"""The report of a sweep folder: files read, files written."""

import json
from pathlib import Path

import polars as pl
import pytest
from small_sweep import SKILL, SPLITS, small_geometry, small_sweep

from embrm.core.errors import UserError
from embrm.core.specs import canonical_json
from embrm.reports.run import report
from embrm.sweeps.ledger import parquet
from embrm.sweeps.spec import SweepSpec

FILES = {
    *("report.md", "report.json"),
    *(f"{name}.{kind}" for name in ("ranked", "id_vs_ood", "curves") for kind in ("png", "svg")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sweep's results as `embrm sweep` leaves them."""
    sweep = small_sweep()
    folder = tmp_path / "small"
    folder.mkdir()
    spec = SweepSpec(evaluate=SPLITS, baseline="bt", runs=tuple({"name": name} for name in SKILL))
    header = {"spec": spec.model_dump(mode="json"), "cache_id": "0", "cache": "cache/x"}
    (folder / "sweep.json").write_text(
        canonical_json(header | {"environment": {}, "leaked": {"id": ["id 3"]}})
    )
    for name in ("ledger", "curves", "prompts", "outcomes"):
        (folder / f"{name}.parquet").write_bytes(parquet(getattr(sweep, name)))
    (folder / "timings.parquet").write_bytes(parquet(sweep.ledger.select("run_id")))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_is_written_to_the_sweep_folder(folder: Path) -> None:
    found = report(folder)
    assert {path.name for path in found.files} == FILES
    assert all(path.is_file() for path in found.files)
    text = (folder / "report.md").read_text()
    assert text.startswith("# small\n\n4 configurations, 11 runs.\n")
    assert "(figures/ranked.png)" in text
    assert found.tables[0].title.startswith("Ranking by accuracy %")


def test_without_the_cache_the_report_notes_that_reliability_is_missing(folder: Path) -> None:
    found = report(folder)
    (note,) = found.notes
    assert note.startswith("no reliability diagrams: the sweep's cache is not at cache/x")
    assert (folder / "report.md").read_text().endswith(f"- {note}\n")
    assert json.loads(found.json())["reliability"] == []
    with pytest.raises(UserError, match="elsewhere"):
        report(folder, cache=folder / "elsewhere")


def test_json_holds_every_configuration_whatever_top_is(folder: Path) -> None:
    found = report(folder, top=1)
    content = json.loads((folder / "report.json").read_text())
    assert found.json() == (folder / "report.json").read_text()
    assert len(content["ranking"]) == 4
    assert content["baseline"] == "bt"
    assert content["ranking"][0]["run_ids"] == [f"bsr[lr=0.01]-{seed}" for seed in range(3)]
    assert content["at_epoch_limit"] == []
    assert content["ranking"][0]["estimate"] == pytest.approx(
        found.comparison.ranking["estimate"][0], rel=1e-11
    )


def test_a_second_report_in_another_folder_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    report(folder)
    first = {name: content for name, content in contents(folder).items() if name in FILES}
    report(folder, out=tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere") == first


def test_rank_by_chooses_the_splits_of_the_ranking(folder: Path) -> None:
    assert report(folder, rank_by="ood/maths").tables[0].title == "Ranking by accuracy %: ood/maths"
    with pytest.raises(UserError, match=r"rank_by \(--rank-by\) = \'nowhere\'"):
        report(folder, rank_by="nowhere")


def test_another_baseline_can_be_chosen(folder: Path) -> None:
    ranking = report(folder, baseline="bsr[lr=0.01]").comparison.ranking
    own = ranking.filter(pl.col("name") == "bsr[lr=0.01]")
    assert own["difference"].null_count() == 1
    assert ranking.filter(pl.col("name") == "bt")["difference"].null_count() == 0
    with pytest.raises(UserError, match="did you mean 'bsr"):
        report(folder, baseline="bsr[lr=0.1]")


def test_leaked_prompts_add_a_table(folder: Path) -> None:
    titles = [table.title for table in report(folder).tables]
    assert "Accuracy % without prompts seen in training" in titles


def test_geometry_is_in_tables_and_json_if_it_was_measured(folder: Path) -> None:
    assert json.loads(report(folder).json())["geometry"] == []
    assert "Geometry" not in (folder / "report.md").read_text()
    (folder / "geometry.parquet").write_bytes(parquet(small_geometry()))
    found = report(folder)
    assert found.tables[-2].title == "Geometry: train"
    assert "## Geometry: train\n" in (folder / "report.md").read_text()
    content = json.loads(found.json())
    assert content["trained_on"] == "train"
    rows = [row for row in content["geometry"] if row["split"] == "train"]
    assert [row["name"] for row in rows] == sorted(SKILL)
    by_name = {row["name"]: row for row in rows}
    assert by_name["bt"]["drift"] is None
    assert by_name["bsr[lr=0.01]"]["drift"] == 0.001


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep results in"):
        report(tmp_path)
