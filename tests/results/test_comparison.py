"""Ranking of configurations, against sums computed by hand from the same tables."""

import dataclasses

import polars as pl
import pytest
from small_sweep import SKILL, SPLITS, SmallSweep, compare_tables, small_geometry, small_sweep

from embrm.core.errors import UserError
from embrm.metrics.geometry import MEASURES as GEOMETRY
from embrm.results.comparison import MEASURES, Comparison

SWEEP = small_sweep()


def compared(**changes: object) -> Comparison:
    arguments = {
        "title": "small",
        "ledger": SWEEP.ledger,
        "prompts": SWEEP.prompts,
        "outcomes": SWEEP.outcomes,
        "splits": SPLITS,
        "baseline": "bt",
    }
    return compare_tables(**(arguments | changes))


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compared()


def accuracy(name: str, split: str) -> float:
    """Mean over seeds of wins / pairs."""
    runs = SWEEP.ledger.filter(config=name)["run_id"]
    wins = SWEEP.outcomes.filter(pl.col("run_id").is_in(runs.to_list()), split=split)["wins"]
    pairs = SWEEP.prompts.filter(split=split)["pairs"].sum()
    return wins.list.sum().mean() / pairs


def test_ranks_by_the_mean_over_the_splits_with_pairs(comparison: Comparison) -> None:
    assert comparison.ranked_by == "mean"
    assert comparison.ranked_splits == ("id", "ood/chat_hard", "ood/maths")
    assert comparison.metric == "accuracy"
    for row in comparison.ranking.iter_rows(named=True):
        expected = sum(accuracy(row["name"], split) for split in comparison.ranked_splits) / 3
        assert row["estimate"] == pytest.approx(expected)
        assert row["low"] < row["estimate"] < row["high"]
    assert comparison.ranking["name"][0] == "bsr[lr=0.01]"
    assert comparison.ranking["name"][-1] == "bad"


def test_a_copy_of_the_baseline_shares_its_rank(comparison: Comparison) -> None:
    ranks = dict(comparison.ranking.select("name", "rank").iter_rows())
    assert ranks["bt"] == ranks["hinge|$x_1$ [red]*"] == 2
    assert ranks["bad"] == 4


def test_differences_are_significant_where_they_are_real(
    comparison: Comparison,
) -> None:
    rows = {row["name"]: row for row in comparison.ranking.iter_rows(named=True)}
    assert rows["bsr[lr=0.01]"]["difference_low"] > 0
    assert rows["bad"]["difference_high"] < 0
    assert rows["hinge|$x_1$ [red]*"]["difference"] == 0
    assert rows["hinge|$x_1$ [red]*"]["p_holm"] == 1
    assert rows["bt"]["difference"] is None
    assert rows["bad"]["seeds"] == rows["bad"]["common_seeds"] == 2


def test_run_ids_follow_the_seeds(comparison: Comparison) -> None:
    ids = dict(comparison.ranking.select("name", "run_ids").iter_rows())
    assert ids["bt"] == ["bt-0", "bt-1", "bt-2"]
    assert ids["bad"] == ["bad-0", "bad-1"]  # the third diverged


@pytest.mark.parametrize(
    ("spec", "epochs", "best_epoch", "flagged"),
    [
        ('{"epochs":9,"patience":3}', 9, 8, True),
        ('{"epochs":9,"patience":3,"lr":0.1}', 9, 7, True),
        ('{"epochs":9,"patience":3}', 9, 6, False),  # early stopping ended it in its last epoch
        ('{"epochs":9,"patience":3}', 8, 5, False),
        ('{"epochs":9,"patience":null}', 9, 8, False),
    ],
)
def test_runs_at_their_epoch_limit_are_flagged(
    spec: str, epochs: int, best_epoch: int, flagged: bool
) -> None:
    one_run = pl.col("run_id").is_in(["bt-1", "bad-2"])  # bad-2 diverged: no result, no flag
    ledger = SWEEP.ledger.with_columns(
        pl.when(one_run).then(pl.lit(value)).otherwise(column).alias(column)
        for column, value in (("spec", spec), ("epochs", epochs), ("best_epoch", best_epoch))
    )
    assert compared(ledger=ledger).at_epoch_limit == (("bt",) if flagged else ())


def test_configurations_at_the_epoch_limit_are_in_the_order_of_the_ranking() -> None:
    comparison = compared(ledger=SWEEP.ledger.with_columns(epochs=9, best_epoch=8))
    assert comparison.at_epoch_limit == tuple(comparison.ranking["name"])


def test_diverged_runs_are_listed(comparison: Comparison) -> None:
    assert comparison.unfinished.rows() == [("bad", "diverged", 1)]


def test_rank_by_one_split() -> None:
    comparison = compared(rank_by="ood/maths")
    assert comparison.ranked_splits == ("ood/maths",)
    for row in comparison.ranking.iter_rows(named=True):
        assert row["estimate"] == pytest.approx(accuracy(row["name"], "ood/maths"))
    same = comparison.scores.filter(split="ood/maths", metric="accuracy").drop("split", "metric")
    assert (
        same.drop("prompts")
        .sort("name")
        .equals(comparison.ranking.drop("rank", "run_ids").sort("name"))
    )


def test_rank_by_the_first_part_of_names_averages_over_them() -> None:
    comparison = compared(rank_by="ood")
    assert comparison.ranked_splits == ("ood/chat_hard", "ood/maths")
    both = [compared(rank_by=split).ranking for split in comparison.ranked_splits]
    for name, estimate in comparison.ranking.select("name", "estimate").rows():
        parts = [table.filter(pl.col("name") == name)["estimate"][0] for table in both]
        assert estimate == pytest.approx(sum(parts) / 2)


def test_rank_by_groups_uses_tau() -> None:
    comparison = compared(rank_by="groups")
    assert comparison.metric == "tau"
    estimates = dict(comparison.ranking.select("name", "estimate").iter_rows())
    for name, skill in SKILL.items():
        assert estimates[name] == pytest.approx(skill - 0.5 + 0.1)  # prompt 0 has no tau
    assert comparison.scores.filter(split="groups")["prompts"].unique().to_list() == [19]


def tables(sweep: SmallSweep) -> dict[str, pl.DataFrame]:
    return {"prompts": sweep.prompts, "outcomes": sweep.outcomes}


def with_one_prompt(*splits: str) -> dict[str, pl.DataFrame]:
    others = pl.col("prompt_id") != pl.col("split") + " 7"
    return tables(SWEEP.without(pl.col("split").is_in(splits), others))


def test_a_split_of_one_prompt_is_not_ranked_by_if_there_are_others() -> None:
    comparison = compared(**with_one_prompt("ood/maths"))
    assert comparison.ranked_splits == ("id", "ood/chat_hard")
    assert comparison.unranked_splits == ("ood/maths",)
    without = compared(splits=("id", "ood/chat_hard"))
    assert without.unranked_splits == ()
    assert comparison.ranking.equals(without.ranking)
    assert comparison.ranking["low"].null_count() == 0
    assert "ood/maths" in comparison.scores["split"]


def test_splits_of_one_prompt_are_ranked_by_if_there_are_no_others() -> None:
    both = ("ood/chat_hard", "ood/maths")
    comparison = compared(**with_one_prompt(*both), rank_by="ood")
    assert comparison.ranked_splits == both
    assert comparison.unranked_splits == ()
    assert comparison.ranking["estimate"].null_count() == 0
    assert comparison.ranking["low"].is_null().all()


def test_splits_named_train_are_not_ranked_by_if_there_are_others() -> None:
    renamed = {
        name: table.with_columns(pl.col("split").replace("id", "train/seen"))
        for name, table in tables(SWEEP).items()
    }
    comparison = compared(**renamed, splits=("train/seen", *SPLITS[1:]))
    assert comparison.ranked_splits == ("ood/chat_hard", "ood/maths")
    assert "train/seen" in comparison.splits
    only = compared(**renamed, splits=("train/seen",))
    assert only.ranked_splits == ("train/seen",)


def test_splits_without_results_are_left_out(comparison: Comparison) -> None:
    assert comparison.splits == SPLITS[:4]


def test_subsets_of_the_best_and_the_baseline(comparison: Comparison) -> None:
    assert set(comparison.subsets["split"]) == {"ood/chat_hard", "ood/maths"}
    assert set(comparison.subsets["subset"]) == {"easy", "hard|er\x1b[31m"}
    assert comparison.subsets["prompts"].unique().to_list() == [30]
    for split in ("ood/chat_hard", "ood/maths"):
        halves = comparison.subsets.filter(split=split, name="bt")["estimate"]
        assert halves.mean() == pytest.approx(accuracy("bt", split))


def test_length_baseline(comparison: Comparison) -> None:
    assert comparison.lengths["split"].to_list() == list(SPLITS[:3])
    assert comparison.lengths["estimate"].to_list() == [0.625] * 3
    assert comparison.lengths["pairs"].to_list() == [480.0] * 3
    assert comparison.lengths["low"].to_list() == [0.625] * 3
    assert comparison.longer_is_better() == 0.625
    assert compared(rank_by="groups").longer_is_better() is None


def test_measures_are_means_over_the_seeds_that_finished() -> None:
    ledger = SWEEP.ledger.with_columns(
        pl.when(pl.col("config") == "bad").then(pl.col("seed") * 1.0).otherwise(0.5).alias("nll@id")
    )
    measures = compared(ledger=ledger).measures
    assert measures.columns == ["split", "name", *MEASURES]
    assert measures.filter(split="id", name="bad")["nll"].item() == 0.5  # seeds 0 and 1 of 0, 1, 2
    assert measures.filter(split="groups")["nll"].is_null().all()


def test_a_measure_that_one_seed_lacks_is_null() -> None:
    lacking = (pl.col("config") == "bt") & (pl.col("seed") == 1)
    ledger = SWEEP.ledger.with_columns(
        pl.when(~lacking).then("nll_calibrated@id").alias("nll_calibrated@id")
    )
    measures = compared(ledger=ledger).measures.filter(split="id")
    missing = measures.filter(pl.col("nll_calibrated").is_null())["name"].to_list()
    assert missing == ["bt"]
    assert measures["nll"].null_count() == 0


def test_geometry_is_the_mean_over_seeds_on_training_responses_and_splits() -> None:
    found = compared(geometry=small_geometry()).geometry
    assert found.columns == ["split", "name", *GEOMETRY]
    assert found["split"].unique(maintain_order=True).to_list() == ["train", *SPLITS[:4]]
    norms = {row["split"]: row["norm"] for row in found.filter(name="bt").iter_rows(named=True)}
    assert norms == {"train": 1, "id": 11, "ood/chat_hard": 21, "ood/maths": 31, "groups": None}
    assert found.filter(name="bad", split="id")["norm"].item() == 10.5  # one seed diverged
    drifts = {row["name"]: row["drift"] for row in found.filter(split="id").iter_rows(named=True)}
    assert drifts.pop("bsr[lr=0.01]") == pytest.approx(0.011)
    assert set(drifts.values()) == {None}


def test_geometry_that_a_seed_lacks_is_null() -> None:
    geometry = small_geometry().filter(pl.col("run_id") != "bt-1")
    geometry = geometry.drop("drift_tokens")  # results of earlier releases lack this column
    found = compared(geometry=geometry).geometry.filter(split="train")
    assert found.filter(pl.col("norm").is_null())["name"].to_list() == ["bt"]
    assert found["drift_tokens"].null_count() == 4
    assert compared(geometry=geometry.clear()).geometry.is_empty()
    assert compared().geometry.is_empty()


def test_leak_free_accuracy_leaves_the_leaked_prompts_out() -> None:
    leaked = {"id": [f"id {prompt}" for prompt in range(15)], "ood/maths": {"elsewhere"}}
    comparison = compared(leaked=leaked)
    assert comparison.leak_free["split"].unique().to_list() == ["id"]
    assert comparison.leak_free["removed"].unique().to_list() == [15]
    assert comparison.leak_free["prompts"].unique().to_list() == [45]
    kept = SWEEP.without(pl.col("prompt_id").is_in(leaked["id"]))
    clean = compared(**tables(kept), rank_by="id").ranking
    found = comparison.leak_free.sort("name")
    assert found["estimate"].equals(clean.sort("name")["estimate"])
    assert found["low"].equals(clean.sort("name")["low"])


def test_a_split_whose_prompts_all_leaked_has_no_leak_free_accuracy() -> None:
    leaked = {"id": [f"id {prompt}" for prompt in range(60)]}
    comparison = compared(leaked=leaked)
    assert comparison.leak_free["prompts"].unique().to_list() == [0]
    assert comparison.leak_free["estimate"].is_null().all()


def test_no_baseline_gives_a_ranking_without_differences() -> None:
    comparison = compared(baseline=None)
    assert comparison.ranking["estimate"].null_count() == 0
    assert comparison.ranking["difference"].is_null().all()


def test_order_of_rows_does_not_matter() -> None:
    shuffled = compared(
        ledger=SWEEP.ledger.sample(fraction=1, shuffle=True, seed=1),
        outcomes=SWEEP.outcomes.sample(fraction=1, shuffle=True, seed=2),
        geometry=small_geometry().sample(fraction=1, shuffle=True, seed=3),
    )
    comparison = compared(geometry=small_geometry())
    for field in dataclasses.fields(Comparison):
        left, right = getattr(comparison, field.name), getattr(shuffled, field.name)
        assert left.equals(right) if isinstance(left, pl.DataFrame) else left == right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rank_by": "ood/math"},
            r"rank_by \(--rank-by\) = 'ood/math' .* did you mean 'ood/maths'",
        ),
        ({"baseline": "btt"}, "baseline = 'btt' .* did you mean 'bt'"),
        ({"outcomes": SWEEP.outcomes.head(0)}, "small has no finished runs"),
        (
            {
                "outcomes": SWEEP.outcomes.head(0),
                "ledger": SWEEP.ledger.with_columns(status=pl.lit("diverged")),
            },
            "^small: all 12 runs diverged: lower lr$",
        ),
        (
            {
                "outcomes": SWEEP.outcomes.filter(~pl.col("run_id").str.starts_with("bt")),
                "ledger": SWEEP.ledger.with_columns(
                    status=pl.when(pl.col("config") == "bt")
                    .then(pl.lit("diverged"))
                    .otherwise("status")
                ),
            },
            "^baseline 'bt' diverged with every seed: choose another with baseline "
            r"\(--baseline\)$",
        ),
    ],
)
def test_errors_of_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compared(**changes)
