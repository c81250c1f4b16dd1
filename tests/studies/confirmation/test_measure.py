"""The comparison of a sweep with its fine-tune: its numbers, on made-up results of both."""

from pathlib import Path

import polars as pl
import pytest
from small_stage import SPLITS, small_stage
from small_sweep import compare_tables
from two_stages import FROZEN, FULL, MATCHES, statistic

from embrm.core.errors import UserError
from embrm.results.ledger import Results, open_results
from embrm.studies.confirmation.measure import Confirmation, Excluded, Match, compare_stages


def test_every_split_and_their_mean_by_accuracy_and_nll(confirmation: Confirmation) -> None:
    cells = confirmation.agreement.select("split", "metric").unique(maintain_order=True).rows()
    assert sorted(cells) == sorted(
        (split, metric) for split in (*SPLITS, "mean") for metric in ("accuracy", "nll")
    )
    for split in (*SPLITS, "mean"):
        # ρ by hand: from best to worst, frozen ranks a, a-lr, hinge, bt, low and full ranks
        # a = a-lr, bt, hinge, low. Ranks 5 4 3 2 1 and 4.5 4.5 2 3 1 have the centred products
        # 3 + 1.5 + 0 + 0 + 4. Of the 9 pairs that are not tied, 8 have the same order.
        assert statistic(confirmation, "spearman", split, "accuracy") == pytest.approx(
            8.5 / (10 * 9.5) ** 0.5
        )
        assert statistic(confirmation, "ordered", split, "accuracy") == pytest.approx(8 / 9)
        assert statistic(confirmation, "regret", split, "accuracy") == 0
        # The made-up NLL is 1.2 - accuracy: the same ranks, and gains that are its decrease.
        for name in ("spearman", "slope", "bias"):
            assert statistic(confirmation, name, split, "nll") == pytest.approx(
                statistic(confirmation, name, split, "accuracy"), rel=1e-5
            )


def test_points_have_the_values_of_the_report(
    confirmation: Confirmation, frozen: Results, full: Results
) -> None:
    for stage, results, key in (("frozen", frozen, "name"), ("full", full, "full_name")):
        scores = compare_tables(
            "x", results.ledger, results.prompts, results.outcomes, SPLITS, "bt"
        ).scores
        for row in confirmation.points.filter(split="ood/far", metric="accuracy").iter_rows(
            named=True
        ):
            own = scores.filter(name=row[key], split="ood/far", metric="accuracy").to_dicts()[0]
            for column in ("estimate", "low", "high", "difference", "difference_high", "seeds"):
                assert row[f"{stage}_{column}"] == own[column]


def test_the_bias_is_the_mean_difference_of_gains_over_the_baseline(
    confirmation: Confirmation,
) -> None:
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


def test_a_stage_compared_with_itself_agrees_with_a_nonzero_interval(frozen: Results) -> None:
    """Both stages draw their seeds independently: with equal draws every replicate would agree."""
    own = tuple(Match(match.name, match.rank, "", match.name, ()) for match in MATCHES)
    found = compare_stages(frozen, frozen, own, (), "bt", SPLITS)
    row = found.agreement.filter(statistic="ordered", split="id", metric="accuracy").to_dicts()[0]
    assert row["value"] == row["high"] == 1
    assert row["low"] < 1


def test_a_diverged_fine_tune_is_left_out_with_its_reason(confirmation: Confirmation) -> None:
    assert [match.name for match in confirmation.matches] == [*FROZEN][:-1]
    assert confirmation.untuned == (Excluded("worse", 6, "its fine-tune diverged in every seed"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_id": "other"}, "was made with cache other, .* with c0: confirm a sweep with"),
        ({"splits": ("elsewhere",)}, "have no evaluation split in common"),
        ({"skills": {"hinge": 0.5, "a|b $x$": None}}, "finished runs of fewer than 2"),
    ],
)
def test_stages_that_do_not_belong_together_are_refused_with_one_line(
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
