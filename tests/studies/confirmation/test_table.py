"""A sweep against its fine-tune: numbers from two made-up result folders, tables and files."""

import json
from pathlib import Path

import polars as pl
import pytest
from small_stage import SPLITS, small_stage

from embrm.core.errors import UserError
from embrm.core.table import markdown
from embrm.reports.figures import confirmation_figures
from embrm.reports.run import confirmation_report
from embrm.results.comparison import compare_runs
from embrm.studies.confirmation.table import (
    Confirmation,
    Excluded,
    Match,
    compare_stages,
    confirmation_tables,
)
from embrm.sweeps.ledger import Results, open_results

FROZEN = {"a|b $x$": 0.75, "a-lr": 0.74, "hinge": 0.68, "bt": 0.6, "low": 0.5, "worse": 0.4}
FULL = {"a|b $x$": 0.8, "hinge": 0.72, "bt": 0.74, "low": 0.6, "worse": None}
MATCHES = tuple(
    Match(name, rank, "top:6", "a|b $x$" if name == "a-lr" else name, ())
    for rank, name in enumerate(FROZEN, start=1)
)
EXCLUDED = (Excluded("mean", 7, "state = 'mean'"), Excluded("tokens", 9, "state = 'mean'"))


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return open_results(small_stage(tmp_path_factory.mktemp("frozen") / "swept", FROZEN))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Results:
    # Its seeds are others: nothing pairs seeds of the two stages.
    folder = tmp_path_factory.mktemp("full") / "tuned"
    return open_results(small_stage(folder, FULL, seeds=(7, 8), stage=1))


@pytest.fixture(scope="module")
def confirmation(frozen: Results, full: Results) -> Confirmation:
    return compare_stages(frozen, full, MATCHES, EXCLUDED, "bt", SPLITS)


def statistic(confirmation: Confirmation, name: str, split: str, metric: str) -> float | None:
    return confirmation.agreement.filter(
        pl.col("statistic") == name, pl.col("split") == split, pl.col("metric") == metric
    )["value"][0]


def test_every_split_and_their_mean_by_accuracy_and_nll(confirmation: Confirmation) -> None:
    cells = confirmation.agreement.select("split", "metric").unique(maintain_order=True).rows()
    assert sorted(cells) == sorted(
        (split, metric) for split in (*SPLITS, "mean") for metric in ("accuracy", "nll")
    )
    for split in (*SPLITS, "mean"):
        # frozen: a, a-lr, hinge, bt, low; full: a = a-lr, bt, hinge, low. ρ by hand: ranks
        # 5 4 3 2 1 and 4.5 4.5 2 3 1, so 3 + 1.5 + 0 + 0 + 4; 8 of 9 twos alike
        assert statistic(confirmation, "spearman", split, "accuracy") == pytest.approx(
            8.5 / (10 * 9.5) ** 0.5
        )
        assert statistic(confirmation, "ordered", split, "accuracy") == pytest.approx(8 / 9)
        assert statistic(confirmation, "regret", split, "accuracy") == 0
        # nll is 1.2 - accuracy: the same ranks and, with its sign, the same gains
        for name in ("spearman", "slope", "bias"):
            assert statistic(confirmation, name, split, "nll") == pytest.approx(
                statistic(confirmation, name, split, "accuracy"), rel=1e-5
            )


def test_points_are_the_reports(confirmation: Confirmation, frozen: Results, full: Results) -> None:
    for stage, results, key in (("frozen", frozen, "name"), ("full", full, "full_name")):
        scores = compare_runs(
            "x", results.ledger, results.prompts, results.outcomes, SPLITS, "bt"
        ).scores
        for row in confirmation.points.filter(split="ood/far", metric="accuracy").iter_rows(
            named=True
        ):
            own = scores.filter(name=row[key], split="ood/far", metric="accuracy").to_dicts()[0]
            for column in ("estimate", "low", "high", "difference", "difference_high", "seeds"):
                assert row[f"{stage}_{column}"] == own[column]


def test_gains_are_of_means_over_the_baseline(confirmation: Confirmation) -> None:
    points = confirmation.points.filter(split="mean", metric="accuracy", name="hinge")
    others = confirmation.points.filter(
        pl.col("split") == "mean", pl.col("metric") == "accuracy", pl.col("name") != "bt"
    )
    gains = [
        others[f"{stage}_estimate"]
        - confirmation.points.filter(split="mean", metric="accuracy", name="bt")[
            f"{stage}_estimate"
        ][0]
        for stage in ("frozen", "full")
    ]
    assert statistic(confirmation, "bias", "mean", "accuracy") == pytest.approx(
        (gains[0] - gains[1]).mean()
    )
    assert points.height == 1


def test_a_stage_against_its_own_copy_agrees_but_not_surely(frozen: Results) -> None:
    """The copy draws seeds of its own: with the same draws every replicate would agree."""
    own = tuple(Match(match.name, match.rank, "", match.name, ()) for match in MATCHES)
    found = compare_stages(frozen, frozen, own, (), "bt", SPLITS)
    row = found.agreement.filter(statistic="ordered", split="id", metric="accuracy").to_dicts()[0]
    assert row["value"] == row["high"] == 1
    assert row["low"] < 1


def test_a_fine_tune_that_diverged_is_told_and_left_out(confirmation: Confirmation) -> None:
    assert [match.name for match in confirmation.matches] == [*FROZEN][:-1]
    assert confirmation.untuned == (Excluded("worse", 6, "its fine-tune diverged in every seed"),)


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
    assert confirmation_figures(found)


def test_tables_tell_what_the_numbers_are(confirmation: Confirmation) -> None:
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


def test_stages_of_one_seed_are_said_to_be_over_prompts_only(
    frozen: Results, full: Results, tmp_path: Path
) -> None:
    """The interval of one seed has no seeds in it, and its note did say so."""
    one = [
        open_results(small_stage(tmp_path / str(stage), skills, seeds=(4,), stage=stage))
        for stage, skills in enumerate((FROZEN, FULL))
    ]
    for stages, said in (
        ((frozen, full), "over prompts and seeds, of these"),
        ((frozen, one[1]), "over prompts and seeds (fine-tuned: prompts only: one seed), of these"),
        ((one[0], full), "over prompts and seeds (frozen: prompts only: one seed), of these"),
        (one, "over prompts only: one seed, of these"),
    ):
        found = compare_stages(*stages, MATCHES, (), "bt", SPLITS)
        assert said in confirmation_tables(found)[0].note


def test_tau_ranks_where_there_are_groups_alone(
    frozen: Results, full: Results, tmp_path: Path
) -> None:
    """Groups instead of pairs: tau is what accuracy was, at every prompt."""
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
    assert b"Frozen Kendall" in confirmation_figures(found)["agreement.svg"]


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


def test_the_figure_has_a_panel_a_split_with_its_rank_correlation(
    confirmation: Confirmation,
) -> None:
    drawn = confirmation_figures(confirmation)["agreement.svg"]
    for split in ("mean", *SPLITS):
        assert f"<!-- {split}, ρ = 0.87 -->".encode() in drawn
    assert b"1  a|b $x$" in drawn


def test_markdown_of_the_tables_is_escaped(confirmation: Confirmation) -> None:
    assert "a|b" not in markdown(confirmation_tables(confirmation)[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_id": "other"}, "was made with cache other, .* with c0: confirm a sweep with"),
        ({"splits": ("elsewhere",)}, "have no evaluation split in common"),
        ({"skills": {"hinge": 0.5, "a|b $x$": None}}, "finished runs of fewer than 2"),
    ],
)
def test_stages_that_do_not_belong_together_are_one_line(
    frozen: Results, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    arguments = {"skills": FULL} | changes
    other = open_results(small_stage(tmp_path / "other", **arguments))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as error:
        compare_stages(frozen, other, MATCHES, (), "bt", SPLITS)
    assert "\n" not in str(error.value)


def test_other_prompts_of_one_split_are_refused(frozen: Results, tmp_path: Path) -> None:
    folder = small_stage(tmp_path / "other", FULL)
    prompts = pl.read_parquet(folder / "prompts.parquet")
    prompts.with_columns(prompt_id=pl.col("prompt_id") + "x").write_parquet(
        folder / "prompts.parquet"
    )
    with pytest.raises(UserError, match=r"split 'id' has other prompts in .*other than in"):
        compare_stages(frozen, open_results(folder), MATCHES, (), "bt", SPLITS)
