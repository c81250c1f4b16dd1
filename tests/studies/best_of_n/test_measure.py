"""Best-of-n selection by a sweep's runs: checked against `scores`; groups that cannot be used."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from toy_cache import toy_cache
from toy_sweep import MEAN_STATE, toy_sweep

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.metrics.best_of_n import Ranking, kl_estimate
from embrm.results.ledger import open_results
from embrm.results.rewards import scores
from embrm.studies.best_of_n.measure import SplitChoices, measure_best_of_n

made = partial(toy_cache, prompts=100, per_prompt=8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("cache") / "toy")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return toy_sweep(tmp_path_factory.mktemp("sweeps"), cache, MEAN_STATE)


def runs_of(folder: Path) -> pl.DataFrame:
    return open_results(folder).ledger.sort("config", "seed").select("run_id", name="config")


def measured_with(
    swept: Path, folder: Path, members: Callable[[pl.DataFrame], pl.DataFrame], **options: object
) -> tuple[list[SplitChoices], list[str]]:
    """Measure with a copy of the sweep's cache whose group members are changed by `members`."""
    other = made(folder / "other", members=members)
    return measure_best_of_n(open_results(swept), runs_of(swept), cache=other, **options)  # type: ignore[arg-type]


def first(rows: int) -> pl.Expr:
    """Selects the first `rows` members of each prompt."""
    return pl.int_range(pl.len()).over("prompt_id") < rows


def test_choices_follow_from_the_rewards_that_scores_gives(swept: Path, cache: Path) -> None:
    runs = runs_of(swept)
    [chosen], skipped = measure_best_of_n(open_results(swept), runs)
    assert skipped == []
    assert (chosen.split, chosen.ns, chosen.sizes) == ("ood/far", (1, 2, 4, 8), (8, 8))
    assert chosen.gold.shape == chosen.proxy.shape == (20, 4, 4)
    opened = open_cache(cache)
    S = opened.responses["S"].to_numpy()
    for place, run_id in enumerate(runs["run_id"]):
        table = scores(swept, run_id)
        reward = dict(zip(opened.pairs["chosen"], table["scores_chosen"], strict=True))
        reward |= dict(zip(opened.pairs["rejected"], table["scores_rejected"], strict=True))
        variances, divergence = [], []
        for prompt_id, gold, proxy in zip(
            chosen.prompt_ids, chosen.gold[:, place], chosen.proxy[:, place], strict=True
        ):
            own = opened.members.filter(prompt_id=prompt_id)
            rewards = np.array([reward[response] for response in own["response"]])
            ranking = Ranking.by(rewards)
            expected = ranking.expected(own["gold"].to_numpy(), chosen.ns)
            np.testing.assert_allclose(gold * chosen.gold_sd + chosen.gold_mean, expected)
            gain = ranking.expected_proxy(chosen.ns) - rewards.mean()
            assert np.corrcoef(gain, proxy)[0, 1] == pytest.approx(1)
            variances.append((gain[-1] / proxy[-1]) ** 2)
            of_responses = S[own["response"].to_numpy()]
            divergence.append(ranking.expected(kl_estimate(4, of_responses), (4,))[0])
        assert np.ptp(variances) < 1e-4 * np.mean(variances)  # all prompts share one unit
        assert chosen.kl[place, 2] == pytest.approx(np.mean(divergence))
    golds = opened.members.group_by("prompt_id").agg(pl.col("gold").var(ddof=0))["gold"]
    assert chosen.gold_sd == pytest.approx(np.sqrt(golds.mean()))
    assert chosen.gold_mean == pytest.approx(opened.members["gold"].mean())


def test_small_groups_are_left_out_and_counted(swept: Path, tmp_path: Path) -> None:
    def uneven(members: pl.DataFrame) -> pl.DataFrame:
        ids = members["prompt_id"].unique().sort()
        alone, three, six = ids[:2].implode(), ids[2:5].implode(), ids[5:9].implode()
        prompt = pl.col("prompt_id")
        most = pl.when(prompt.is_in(alone)).then(1).when(prompt.is_in(three)).then(3)
        most = most.when(prompt.is_in(six)).then(6).otherwise(8)
        return members.filter(pl.int_range(pl.len()).over("prompt_id") < most)

    [chosen], _ = measured_with(swept, tmp_path, uneven, ns=[6, 2, 6])
    assert chosen.ns == (1, 2, 6)
    assert chosen.sizes == (6, 8)
    assert len(chosen.prompt_ids) == 15
    assert chosen.excluded == {"one response": 2, "fewer than 6 responses": 3}
    # By default the largest n is one for which 90 % of the groups with several responses suffice.
    again, _ = measure_best_of_n(open_results(swept), runs_of(swept), cache=tmp_path / "other")
    assert again[0].ns == (1, 2)
    assert again[0].excluded == {"one response": 2}
    assert np.isfinite(again[0].gold).all()


def test_prompts_with_constant_gold_are_kept_and_counted(swept: Path, tmp_path: Path) -> None:
    def partly(members: pl.DataFrame) -> pl.DataFrame:
        first = members["prompt_id"].unique().sort()[:3].implode()
        return members.with_columns(
            gold=pl.when(pl.col("prompt_id").is_in(first)).then(5.0).otherwise("gold")
        )

    [chosen], _ = measured_with(swept, tmp_path, partly)
    assert chosen.constant == 3
    flat = np.flatnonzero(np.ptp(chosen.gold, axis=(1, 2)) < 1e-12)
    assert len(flat) == 3
    np.testing.assert_allclose(chosen.gold[flat] * chosen.gold_sd + chosen.gold_mean, 5.0)


def test_one_prompt_is_enough_for_curves(swept: Path, tmp_path: Path) -> None:
    [chosen], _ = measured_with(
        swept, tmp_path, lambda members: members.filter(prompt_id=members["prompt_id"][0])
    )
    assert chosen.gold.shape == (1, 4, 4)


def test_a_response_without_log_probability_makes_the_kl_estimate_nan(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_first(members: pl.DataFrame) -> pl.DataFrame:
        response = pl.when(pl.int_range(pl.len()) == 0).then(0).otherwise("response")
        return members.with_columns(response=response.cast(pl.Int32))

    # embrm's own extraction always stores log-probabilities; imported states may lack them.
    monkeypatch.setattr("embrm.cache.writer._refuse_non_finite", lambda *_: None)
    [chosen], _ = measured_with(swept, tmp_path, with_first)
    assert np.isfinite(chosen.kl).all()
    other = made(tmp_path / "without", members=with_first, S=float("nan"))
    [chosen], _ = measure_best_of_n(open_results(swept), runs_of(swept), cache=other)
    assert np.isnan(chosen.kl).all()
    assert np.isfinite(chosen.gold).all()


def test_a_split_that_cannot_be_used_does_not_stop_the_others(swept: Path, tmp_path: Path) -> None:
    def twice(members: pl.DataFrame) -> pl.DataFrame:
        return pl.concat([members, members.with_columns(split=pl.lit("id"), gold=1.0)])

    [chosen], [skipped] = measured_with(swept, tmp_path, twice)
    assert chosen.split == "ood/far"
    assert skipped.startswith("split 'id': gold is constant within each of 20 prompts")
    with pytest.raises(UserError, match="split 'id': gold is constant"):
        measure_best_of_n(open_results(swept), runs_of(swept), cache=tmp_path / "other", split="id")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda m: m.filter(first(1)), "all 20 groups have one response"),
        (lambda m: m.with_columns(gold=0.5), "gold is constant within each of 20 prompts"),
        (
            lambda m: m.with_columns(
                gold=pl.when(pl.int_range(pl.len()) < 2).then(float("nan")).otherwise("gold")
            ),
            "gold of 2 of 160 responses is not finite",
        ),
        (lambda m: m.filter(first(5)), "n = 7, but the largest group has 5 responses: lower n"),
        (lambda m: m.clear(), "evaluates no split with groups"),
        (lambda m: m.with_columns(split=pl.lit("train")), "evaluates no split with groups"),
    ],
)
def test_unusable_groups_are_refused_with_one_line(
    swept: Path,
    tmp_path: Path,
    members: Callable[[pl.DataFrame], pl.DataFrame],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message) as error:
        measured_with(swept, tmp_path, members, ns=[7])
    assert "\n" not in str(error.value)


def test_a_split_without_groups_is_refused(swept: Path) -> None:
    with pytest.raises(UserError, match=r"split 'ood/fare'.*did you mean 'ood/far'"):
        measure_best_of_n(open_results(swept), runs_of(swept), split="ood/fare")
