"""Scores of a sweep's runs on suites: equal to those of `embrm suite`; what cannot be scored."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import polars as pl
import pytest
from toy_cache import toy_cache
from toy_sweep import MEAN_STATE, toy_sweep

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.metrics.intervals import compare
from embrm.results.ledger import Results, finished_runs, open_results
from embrm.results.rewards import scores
from embrm.studies.benchmarks.measure import suite_scores, suite_splits
from embrm.studies.benchmarks.table import suites
from embrm.suites.registry import SUITES
from embrm.suites.scoring import score_suite


def answered(members: pl.DataFrame) -> pl.DataFrame:
    """Members whose gold says whether an answer is correct, one question per prompt."""
    return members.with_columns(
        gold=(pl.col("gold") > 0).cast(pl.Float64),
        source=pl.lit("toy"),
        row=pl.col("prompt_id").rle_id().cast(pl.Int64),
    )


made = partial(toy_cache, prompts=100, per_prompt=8, members=answered)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("cache") / "toy")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Results:
    return open_results(toy_sweep(tmp_path_factory.mktemp("sweeps"), cache, MEAN_STATE))


def test_every_run_has_the_scores_that_its_score_file_would_get(swept: Results) -> None:
    runs, baseline, notes = finished_runs(swept, None)
    assert (baseline, notes, runs.height) == ("bt", [], 4)
    found, skipped = suite_scores(swept, runs, named={"ood/far": "hhh", "id": "ppe-correctness"})
    assert skipped == []
    assert [(one.split, one.suite) for one in found] == [
        ("id", "ppe-correctness"), ("ood/far", "hhh"),
    ]  # fmt: skip
    for one in found:
        assert tuple(one.scores) == SUITES[one.suite].main
        assert {replicates.bounds for replicates in one.scores.values()} == {(0, 1)}
        for place, run_id in enumerate(runs["run_id"]):
            own = score_suite(one.suite, scores(swept.folder, run_id).filter(split=one.split))
            rows = {row["score"]: row for row in own.iter_rows(named=True)}
            for name, replicates in one.scores.items():
                assert replicates.estimates[place] == rows[name]["estimate"]
                assert replicates.prompts == rows[name]["prompts"]
                assert one.longer[name] == rows[name]["longer"]
                ends = np.quantile(replicates.draws[:, place], [0.025, 0.975])
                assert ends == pytest.approx([rows[name]["low"], rows[name]["high"]])
    [_, hhh] = found
    ledger = swept.ledger.rename({"config": "name"}).sort("name", "seed")
    accuracy = ledger["accuracy@ood/far"].to_numpy()
    np.testing.assert_allclose(hhh.scores["accuracy"].estimates, accuracy)
    table = compare(hhh.scores["accuracy"], runs, "bt")
    assert table["seeds"].to_list() == [2, 2]
    assert table["difference"].null_count() == 1


def test_groups_are_scored_from_the_rewards_of_all_their_members(
    swept: Results, cache: Path
) -> None:
    runs, _, _ = finished_runs(swept, None)
    [found], _ = suite_scores(swept, runs, named={"ood/far": "ppe-best-of-k"}, replicates=50)
    opened = open_cache(cache)
    for place, run_id in enumerate(runs["run_id"]):
        table = scores(swept.folder, run_id)  # every response is in a pair
        rewards = dict(zip(opened.pairs["chosen"], table["scores_chosen"], strict=True))
        rewards |= dict(zip(opened.pairs["rejected"], table["scores_rejected"], strict=True))
        members = opened.members.with_columns(
            score=pl.col("response").replace_strict(rewards, return_dtype=pl.Float32)
        )
        own = score_suite("ppe-best-of-k", members, 50)
        expected = dict(zip(own["score"], own["estimate"], strict=True))
        for name, replicates in found.scores.items():
            assert replicates.estimates[place] == pytest.approx(expected[name])
    assert 0 < found.longer["best of K, mean of subsets"] < 1


def test_splits_named_after_a_suite_are_found() -> None:
    def evaluated(*names: str) -> Results:
        return cast(Results, SimpleNamespace(folder="sweeps/one", evaluated=[*names], redivided=[]))

    found = suite_splits(evaluated("id", "ood/rm-bench", "hhh"), {"id": "judge-bench"})
    assert found == {"id": "judge-bench", "ood/rm-bench": "rm-bench", "hhh": "hhh"}
    assert suite_splits(evaluated("ood/hhh"), {"ood/hhh": "mt-bench"}) == {"ood/hhh": "mt-bench"}
    with pytest.raises(UserError, match="no split named after a suite, only id, ood/hh: say which"):
        suite_splits(evaluated("id", "ood/hh"), {})


def test_what_cannot_be_scored_is_refused_or_left_out(
    swept: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, _, _ = finished_runs(swept, None)
    with monkeypatch.context() as patch:  # as if the splits were named after these suites
        splits = {"ood/far": "hhh", "id": "rm-bench"}
        patch.setattr("embrm.studies.benchmarks.measure.suite_splits", lambda *_: splits)
        found, [skipped] = suite_scores(swept, runs)
    assert [one.split for one in found] == ["ood/far"]
    remedy = "no column 'chosen_model' in the cache: extract its data with suite = \"rm-bench\""
    assert skipped == f"id is left out: rm-bench finds {remedy}"
    for named, word in (
        ({"ood/near": "hhh"}, "evaluates no split 'ood/near': did you mean 'ood/far'"),
        ({"ood/far": "hh"}, "no suite 'hh': did you mean 'hhh'"),
        ({"ood/far": "rm-bench"}, f"ood/far cannot be scored: rm-bench finds {remedy}"),
        ({"ood/far": "hhh", "id": "rm-bench"}, "id cannot be scored: rm-bench finds no column"),
        ({"id": "ppe-best-of-k"}, "finds no groups in the cache: extract"),
    ):
        with pytest.raises(UserError, match=word) as caught:
            suite_scores(swept, runs, named=named)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="baseline = 'bsr' has no finished runs"):
        finished_runs(swept, "bsr")


def test_items_of_which_the_cache_holds_a_part_are_named_and_left_out(
    swept: Results, cache: Path, tmp_path: Path
) -> None:
    """In the cache, one question has fewer samples than the others."""
    partial = made(tmp_path / "toy", members=lambda members: answered(members).head(-3))
    runs, _, _ = finished_runs(swept, None)
    named = {"ood/far": "ppe-best-of-k"}
    whole = suites(swept.folder, named=named, out=tmp_path)
    assert not [note for note in whole.notes if "left out" in note]
    [found], _ = suite_scores(swept, runs, named=named, cache=cache, replicates=20)
    assert found.notes == ()
    other = toy_sweep(tmp_path, partial, MEAN_STATE)
    some = suites(other, named=named)
    assert "ood/far: 1 items without all K samples are left out" in " ".join(some.notes)
    assert "1 items without all K samples" in (other / "suites.md").read_text()
