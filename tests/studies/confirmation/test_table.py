"""The comparison of a sweep with its fine-tune: tables, figure and files."""

import json
from pathlib import Path

import polars as pl
import pytest
from small_stage import SPLITS, small_stage
from two_stages import FROZEN, FULL, MATCHES, statistic

from embrm.core.drawing import drawn
from embrm.core.table import markdown
from embrm.reports.run import confirmation_report
from embrm.results.ledger import Results, open_results
from embrm.studies.confirmation.measure import Confirmation, compare_stages
from embrm.studies.confirmation.table import confirmation_figure, confirmation_tables


def test_without_the_baselines_fine_tune_there_are_no_gains(
    frozen: Results, tmp_path: Path
) -> None:
    folder = small_stage(tmp_path / "t", FULL | {"bt": None}, stage=1)
    found = compare_stages(frozen, open_results(folder), MATCHES, (), "bt", SPLITS)
    assert statistic(found, "slope", "id", "accuracy") is None
    assert statistic(found, "ordered", "id", "accuracy") == 1
    assert "n/a: the baseline has no fine-tuned run." in confirmation_tables(found)[1].note


def test_three_configurations_have_no_rank_correlation(frozen: Results, full: Results) -> None:
    found = compare_stages(frozen, full, MATCHES[1:4], (), "bt", SPLITS)
    ranks = confirmation_tables(found)[0]
    assert ranks.rows[0][2:4] == ("n/a", "n/a")
    assert "n/a: 3 fine-tuned configurations: it needs 4." in ranks.note
    assert drawn({"agreement": confirmation_figure(found)})


def test_tables_show_the_numbers(confirmation: Confirmation) -> None:
    ranks, gains, configurations, left_out = confirmation_tables(confirmation)
    assert [row[:2] for row in ranks.rows] == [
        *((split, "accuracy %") for split in ("mean", *SPLITS)),
        *((split, "NLL") for split in ("mean", *SPLITS)),
    ]
    assert ranks.rows[0][2].startswith("0.872 [")
    assert ranks.rows[0][4].startswith("88.9 [")
    assert gains.title == "Regret, and gains over bt"
    assert gains.rows[0][2].startswith("0.0 [0.0, ")
    assert configurations.title == "Accuracy %: mean over id, ood/far"
    rows = {row[1]: row for row in configurations.rows}
    assert rows["a-lr"][0] == "2"
    assert rows["a-lr"][2] == "a|b $x$"
    assert rows["bt"][4] == rows["bt"][6] == "baseline"
    assert rows["hinge"][6].startswith("-")
    assert left_out.rows == (
        ("its fine-tune diverged in every seed", "1", "worse", "6"),
        ("state = 'mean'", "2", "mean", "7"),
    )


def test_the_note_says_which_stage_has_one_seed_and_resamples_prompts_only(
    frozen: Results, full: Results, tmp_path: Path
) -> None:
    one = [
        open_results(small_stage(tmp_path / str(stage), skills, seeds=(4,), stage=stage))
        for stage, skills in enumerate((FROZEN, FULL))
    ]
    reason = "prompts only, because there is one seed"
    for stages, said in (
        ((frozen, full), "over prompts and seeds."),
        ((frozen, one[1]), f"over prompts and seeds (fine-tuned: {reason})."),
        ((one[0], full), f"over prompts and seeds (frozen: {reason})."),
        (one, f"over {reason}."),
    ):
        found = compare_stages(*stages, MATCHES, (), "bt", SPLITS)
        assert said in confirmation_tables(found)[0].note


def test_splits_with_groups_only_are_ranked_by_tau(
    frozen: Results, full: Results, tmp_path: Path
) -> None:
    """The made-up stages without pairs: every prompt's tau is what its accuracy was."""
    stages = []
    for results in (frozen, full):
        folder = tmp_path / results.folder.name
        folder.mkdir()
        for path in results.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        results.prompts.with_columns(pairs=pl.lit(0.0)).write_parquet(folder / "prompts.parquet")
        results.outcomes.with_columns(tau=pl.col("wins").list.eval(pl.element() / 8)).write_parquet(
            folder / "outcomes.parquet"
        )
        stages.append(open_results(folder))
    found = compare_stages(*stages, MATCHES, (), "bt", SPLITS)
    assert set(found.agreement["metric"]) == {"tau"}
    assert statistic(found, "ordered", "mean", "tau") == pytest.approx(8 / 9)
    assert confirmation_tables(found)[2].title == "Kendall tau-b: mean over id, ood/far"
    assert b"Frozen Kendall" in drawn({"agreement": confirmation_figure(found)})["agreement.svg"]


def test_files_are_written_and_their_bytes_repeat(
    confirmation: Confirmation, tmp_path: Path
) -> None:
    found = confirmation_report(confirmation, tmp_path / "one")
    confirmation_report(confirmation, tmp_path / "two")
    names = {path.relative_to(tmp_path / "one").as_posix() for path in found.files}
    assert names == {
        *("confirm.md", "confirm.json", "figures/agreement.png", "figures/agreement.svg"),
    }
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    content = json.loads((tmp_path / "one" / "confirm.json").read_text())
    assert content == json.loads(found.json())
    assert content["matches"][1]["full"] == "a|b $x$"
    assert content["excluded"][0]["reason"] == "state = 'mean'"
    text = (tmp_path / "one" / "confirm.md").read_text()
    assert text.startswith(
        "# swept, confirmed\n\n5 configurations of the sweep, fine-tuned as 4.\n"
    )
    assert "(figures/agreement.png)" in text
    assert "a\\|b \\$x\\$" in text
    assert text.count("## NLL: ") == 3


def test_the_figure_has_one_panel_per_split_with_its_rank_correlation(
    confirmation: Confirmation,
) -> None:
    content = drawn({"agreement": confirmation_figure(confirmation)})["agreement.svg"]
    for split in ("mean", *SPLITS):
        assert f"<!-- {split}, ρ = 0.87 -->".encode() in content
    assert b"1  a|b $x$" in content


def test_markdown_of_the_tables_is_escaped(confirmation: Confirmation) -> None:
    assert "a|b" not in markdown(confirmation_tables(confirmation)[2])
