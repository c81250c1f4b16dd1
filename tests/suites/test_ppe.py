"""PPE's best-of-K and rank metrics, checked by hand, enumeration, scipy and scikit-learn."""

from itertools import permutations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from embrm.core.errors import UserError
from embrm.metrics import intervals
from embrm.metrics.intervals import prompt_counts
from embrm.suites.ppe_best_of_k import METRICS, best_of_k
from embrm.suites.ppe_human import RANKS, ranks, ratings
from embrm.suites.registry import SUITES
from embrm.suites.scoring import score_suite

NAN = float("nan")

Group = tuple[list[float], list[float]]
"""Rewards and correctness of the samples of a question."""


def samples(groups: list[Group], subset: str = "MATH", prompts: int | None = None) -> pl.DataFrame:
    rows = [
        (subset, f"{subset} {number % (prompts or len(groups))}", subset, number, gold, score)
        for number, (scores, golds) in enumerate(groups)
        for score, gold in zip(scores, golds, strict=True)
    ]
    names = ("subset", "prompt_id", "source", "row", "gold", "score")
    return pl.DataFrame(rows, schema=names, orient="row")


def drawn(seed: int, questions: int = 6, k: int = 5, values: int = 4) -> list[Group]:
    """Few values, so that many rewards tie; correct and wrong samples in every question."""
    random = np.random.default_rng(seed)
    golds = [
        random.permutation([1.0, 0.0, *random.integers(0, 2, k - 2)]) for _ in range(questions)
    ]
    return [(random.integers(0, values, k).astype(float).tolist(), g.tolist()) for g in golds]


def values(members: pl.DataFrame, subset: str = "MATH") -> dict[str, float]:
    found = best_of_k(members, 20)
    return {metric: float(found[f"{subset}: {metric}"].estimates[0]) for metric in METRICS}


# Best of K.


def test_a_curve_by_hand() -> None:
    """The highest reward is wrong: best of 2 of {0, 1, 1} is right in one of three subsets."""
    found = values(samples([([3.0, 2.0, 1.0], [0.0, 1.0, 1.0])]))
    assert found["best of 1"] == pytest.approx(2 / 3)
    assert found["best of K"] == 0
    assert found["highest best of k"] == pytest.approx(2 / 3)
    # True curve 2/3, 1, 1; this one 2/3, 1/3, 0.
    assert found["loss to the true best of k"] == pytest.approx(((2 / 3) ** 2 + 1) / 3)
    assert found["ROC AUC"] == 0


def test_curves_are_those_of_all_orders() -> None:
    """The first highest reward among the first k samples, averaged over all orders."""
    groups = drawn(3, k=4)
    curves = np.zeros((2, len(groups), 4))
    for number, (scores, golds) in enumerate(groups):
        for order in permutations(range(4)):
            for k in range(1, 5):
                seen = list(order[:k])
                best = max(seen, key=lambda one: (scores[one], -seen.index(one)))
                curves[0, number, k - 1] += golds[best] / 24
                curves[1, number, k - 1] += max(golds[one] for one in seen) / 24
    ours, true = curves.mean(axis=1)
    found = values(samples(groups))
    assert found["best of K"] == pytest.approx(ours[-1], abs=1e-7)
    assert found["highest best of k"] == pytest.approx(ours.max(), abs=1e-7)
    assert found["best of 1"] == pytest.approx(ours[0], abs=1e-7)
    assert found["loss to the true best of k"] == pytest.approx(((true - ours) ** 2).mean())


def test_a_question_with_fewer_samples_is_left_out_of_the_suite() -> None:
    whole, short = ([2.0, 1.0, 0.0], [1.0, 0.0, 0.0]), ([1.0, 2.0], [1.0, 0.0])
    found = score_suite("ppe-best-of-k", samples([whole, short]), 20)
    best = found.filter(score="MATH: best of K").row(0, named=True)
    assert (best["estimate"], best["prompts"], best["incomplete"]) == (1.0, 1, 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_auc_is_scikit_learns_of_rewards_scaled_within_questions(seed: int) -> None:
    groups = drawn(seed)
    scaled, correct = [], []
    for scores, golds in groups:
        low, high = min(scores), max(scores)
        scaled += [(score - low) / (high - low) if high > low else 0.5 for score in scores]
        correct += golds
    assert values(samples(groups))["ROC AUC"] == pytest.approx(roc_auc_score(correct, scaled))


def test_replicates_of_auc_repeat_whole_prompts() -> None:
    """Two questions of one prompt are drawn together; scikit-learn scores the repeated samples."""
    groups = drawn(5)
    found = best_of_k(samples(groups, prompts=3), 30)["MATH: ROC AUC"]
    counts = prompt_counts([f"MATH {number}" for number in range(3)], 30)
    for replicate in range(30):
        scaled, correct = [], []
        for number, (scores, golds) in enumerate(groups):
            low, spread = min(scores), max(max(scores) - min(scores), 1e-9)
            times = int(counts[replicate, number % 3])
            scaled += [(score - low) / spread if spread > 1e-8 else 0.5 for score in scores] * times
            correct += golds * times
        if correct:
            expected = roc_auc_score(correct, scaled)
            assert found.draws[replicate, 0] == pytest.approx(expected)
        else:
            assert np.isnan(found.draws[replicate, 0])
    assert found.prompts == 3


def test_benchmarks_are_averaged_without_weights_and_graded_samples_have_no_auc() -> None:
    right: Group = ([1.0, 0.0], [1.0, 0.0])
    wrong: Group = ([0.0, 1.0], [1.0, 0.0])
    table = pl.concat([samples([right] * 3, "GPQA"), samples([right, wrong])])
    found = score_suite("ppe-best-of-k", table, 50)
    rows = dict(zip(found["score"], found["estimate"], strict=True))
    assert rows["best of K, mean of subsets"] == pytest.approx((1 + 1 / 2) / 2)
    assert rows["GPQA: best of K"] == 1.0
    assert found["prompts"].to_list()[:2] == [5, 5]
    graded = table.with_columns(gold=pl.col("gold") / 2)
    assert values(graded)["best of K"] == pytest.approx(1 / 4)
    assert np.isnan(values(graded)["ROC AUC"])


def test_intervals_hold_the_estimates_and_shrink_to_nothing_without_variance() -> None:
    table = samples(drawn(1, questions=80))
    found = score_suite("ppe-best-of-k", table, 200).drop_nulls("estimate")
    assert (found["low"] < found["estimate"]).all()
    assert (found["estimate"] < found["high"]).all()
    sure = score_suite("ppe-best-of-k", samples([([1.0, 0.0], [1.0, 0.0])] * 9), 50)
    assert sure.filter(score="MATH: best of K").select("low", "high").row(0) == (1.0, 1.0)


def test_bootstrap_counts_are_drawn_once_for_curves_and_auc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts in another order than that of their names, asked for by two runs."""
    asked: list[int] = []
    monkeypatch.setattr(
        intervals, "prompt_counts", lambda *of: asked.append(1) or prompt_counts(*of)
    )
    table = samples(drawn(2, questions=12), "once")
    assert table["prompt_id"].unique(maintain_order=True).to_list() != sorted(
        table["prompt_id"].unique()
    )
    for _ in range(2):
        best_of_k(table, 17)
    assert len(asked) == 1


def test_no_correct_sample_has_no_auc_and_no_loss() -> None:
    found = values(samples([([1.0, 2.0], [0.0, 0.0])] * 3))
    assert np.isnan(found.pop("ROC AUC"))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize(
    ("gold", "found"),
    [(pl.lit(3.75), "3.75"), (pl.lit("no"), "'no'"), (None, "None"), (NAN, "nan")],
)
def test_correctness_beyond_0_and_1_is_refused(gold: pl.Expr | None, found: str) -> None:
    table = samples([([1.0, 2.0], [1.0, 0.0])] * 3).with_columns(gold=gold)
    with pytest.raises(UserError) as caught:
        score_suite("ppe-best-of-k", table, 20)
    assert f"gold = {found} is not in 0 … 1: read the data with suite" in str(caught.value)


def test_correctness_may_be_true_and_false() -> None:
    table = samples([([1.0, 2.0], [1.0, 0.0])] * 3)
    assert values(table.with_columns(gold=pl.col("gold") == 1)) == values(table)


def test_the_length_baseline_of_samples() -> None:
    table = samples([([1.0, 0.0], [1.0, 0.0])] * 4).with_columns(tokens=1 - pl.col("score"))
    found = score_suite("ppe-best-of-k", table, 20)
    assert found.filter(score="MATH: best of K").select("estimate", "longer").row(0) == (1.0, 0.0)


# Ranks of models.


def votes(skill: dict[str, float], rewarded: dict[str, float], per_pair: int = 60) -> pl.DataFrame:
    """Votes by `skill`, rewards by `rewarded` with noise of their own."""
    random = np.random.default_rng(per_pair)
    rows = []
    for a in skill:
        for b in skill:
            if a < b:
                for number in range(per_pair):
                    first_wins = random.random() < expit(skill[a] - skill[b])
                    chosen, rejected = (a, b) if first_wins else (b, a)
                    own = random.random() < expit(rewarded[chosen] - rewarded[rejected])
                    rows.append((f"p{number}", chosen, rejected, float(own), 0.5))
    names = ("prompt_id", "chosen_model", "rejected_model", "scores_chosen", "scores_rejected")
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(
        subset=pl.lit("English"), label=pl.lit(1.0), weight=pl.lit(1.0)
    )


SKILL = {"a": 1.0, "b": 0.4, "c": 0.0, "d": -0.7}
REWARDED = {"a": 0.2, "b": 0.9, "c": 0.1, "d": -0.5}


def matrices(table: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Wins of the row over the column, under votes and under rewards."""
    places = {name: place for place, name in enumerate(SKILL)}
    human, reward = np.zeros((2, len(SKILL), len(SKILL)))
    for row in table.iter_rows(named=True):
        chosen, rejected = places[row["chosen_model"]], places[row["rejected_model"]]
        human[chosen, rejected] += 1
        margin = row["scores_chosen"] - row["scores_rejected"]
        reward[chosen, rejected] += 0.5 + np.sign(margin) / 2
        reward[rejected, chosen] += 0.5 - np.sign(margin) / 2
    return human, reward


def fitted(wins: np.ndarray) -> np.ndarray:
    def loss(rating: np.ndarray) -> float:
        return float(-(wins * np.log(expit(rating[:, None] - rating[None, :]))).sum())

    found = minimize(loss, np.zeros(len(wins)), tol=1e-12).x
    return found - found.mean()


def test_ratings_are_the_maximum_of_the_likelihood() -> None:
    wins = np.stack(matrices(votes(SKILL, REWARDED)))
    found = ratings(wins / wins.sum(axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(found, [fitted(one) for one in wins], atol=2e-4)


def test_ratings_of_a_model_that_wins_always_are_finite_and_first() -> None:
    wins = np.array([[0, 0.4, 0.2], [0, 0, 0.2], [0, 0.2, 0]])
    found = ratings(wins)
    assert np.isfinite(found).all()
    assert found.argmax() == 0
    assert found[1] == pytest.approx(found[2], abs=0.5)


def test_a_model_without_comparisons_has_no_rating_and_changes_no_other() -> None:
    wins = np.zeros((3, 3))
    wins[0, 2], wins[2, 0] = 0.75, 0.25
    found = ratings(np.stack([wins, np.zeros((3, 3))]))
    expected = [np.log(3) / 2, NAN, -np.log(3) / 2]
    np.testing.assert_allclose(found, [expected, [NAN] * 3], atol=1e-4)


def alike(prompts: int) -> pl.DataFrame:
    """Every prompt has the same votes, a over b over c; 2 of 3 votes go with the ranks."""
    rows = [
        (str(prompt), *ends, 1.0, 0.0)
        for prompt in range(prompts)
        for two in (("a", "b"), ("a", "c"), ("b", "c"))
        for ends in (two, two, two[::-1])
    ]
    names = ("prompt_id", "chosen_model", "rejected_model", "scores_chosen", "scores_rejected")
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(
        label=pl.lit(1.0), weight=pl.lit(1.0)
    )


def test_a_replicate_that_draws_no_prompt_is_nan() -> None:
    """With 3 prompts one replicate in 20 is empty; all others have the same ratings."""
    same = ranks(alike(3), 400)
    turned = ranks(alike(3).with_columns(scores_chosen=pl.lit(-1.0)), 400)
    assert np.isnan(same["Spearman of ratings"].draws).any()
    assert [same[name].estimates[0] for name in RANKS[3:]] == [1, 1, 0]
    assert [turned[name].estimates[0] for name in RANKS[3:]] == [1, -1, 1]
    one = ranks(alike(1), 400)
    assert one["Spearman of ratings"].estimates[0] == pytest.approx(1)
    assert np.isnan([one[name].estimates[0] for name in RANKS[3:]]).all()


def test_a_model_that_a_replicate_does_not_draw_has_no_rating_in_it() -> None:
    table = votes(SKILL, REWARDED)
    last = table.head(3).with_columns(
        prompt_id=pl.Series(["x", "y", "z"]),
        chosen_model=pl.Series(["a", "b", "c"]),
        rejected_model=pl.lit("last"),
        scores_chosen=pl.lit(1.0),
    )
    with_last, without = (ranks(one, 300) for one in (pl.concat([table, last]), table))
    absent = (prompt_counts(["x", "y", "z"], 300) == 0).all(axis=1)
    assert 5 < absent.sum() < 50
    for name in RANKS[:3]:
        draws = with_last[name].draws[absent], without[name].draws[absent]
        np.testing.assert_allclose(*draws, atol=1e-9)
    # Rewards separate only the new model from the four others: 4 of 10 pairs.
    undecided = pl.concat([table.with_columns(scores_chosen=pl.lit(0.5)), last])
    assert ranks(undecided, 300)["separability"].estimates[0] == pytest.approx(4 / 10)


def test_votes_count_as_their_label_and_weight_say() -> None:
    """Three votes, two of them for the chosen response, are two rows and a third one turned."""
    table = votes(SKILL, REWARDED, 12)
    weight = np.arange(table.height) % 3 + 1
    agreed = np.minimum(weight, np.arange(table.height) % 4)
    ends = {
        name: name.replace(side, other)
        for side, other in (("chosen", "rejected"), ("rejected", "chosen"))
        for name in (f"{side}_model", f"scores_{side}")
    }
    turned = table.rename(ends).select(table.columns)
    rows = [
        part
        for vote in range(3)
        for part in (
            table.filter(vote < agreed),
            turned.filter((agreed <= vote) & (vote < weight)),
        )
    ]
    counted = ranks(table.with_columns(label=agreed / weight, weight=weight), 50)
    single, plain = ranks(pl.concat(rows), 50), ranks(table, 50)
    for name in RANKS:
        assert counted[name].estimates == pytest.approx(single[name].estimates, abs=1e-6)
        assert counted[name].draws == pytest.approx(single[name].draws, abs=1e-6, nan_ok=True)
    pearson = [one["row-wise Pearson of win rates"].estimates[0] for one in (counted, plain)]
    assert abs(pearson[0] - pearson[1]) > 0.05


def test_models_may_have_numbers_or_no_names() -> None:
    table = votes(SKILL, REWARDED)
    models = pl.col("chosen_model", "rejected_model")
    numbered = table.with_columns(models.replace_strict([*SKILL], range(4)))
    mixed = numbered.with_columns(pl.col("chosen_model").cast(pl.String))
    expected, *others = (score_suite("ppe-human", one, 20) for one in (table, numbered, mixed))
    assert all(one.equals(expected) for one in others)
    nameless = score_suite("ppe-human", table.with_columns(chosen_model=None), 20)
    assert set(nameless.drop_nulls("estimate")["score"]).isdisjoint(RANKS)


def test_correlations_are_scipys() -> None:
    table = votes(SKILL, REWARDED)
    human, reward = matrices(table)
    found = ranks(table, 20)
    theirs, ours = fitted(human), fitted(reward)
    rows = []
    for row in range(4):
        others = [column for column in range(4) if column != row]
        rates = [one[row, others] / (one + one.T)[row, others] for one in (human, reward)]
        rows.append(pearsonr(*rates).statistic)
    expected = {
        "Spearman of ratings": spearmanr(theirs, ours).statistic,
        "Kendall of ratings": kendalltau(theirs, ours).statistic,
        "row-wise Pearson of win rates": np.mean(rows),
    }
    assert -1 < expected["Spearman of ratings"] < 1
    for name, value in expected.items():
        assert found[name].estimates[0] == pytest.approx(value)
        assert found[name].prompts == 60


def test_rewards_that_agree_with_every_vote_correlate_1_and_inverted_ones_minus_1() -> None:
    sure = {"a": 3.0, "b": 0.0, "c": -3.0}
    table = votes(sure, sure, 400).with_columns(scores_chosen=pl.lit(1.0))
    same = ranks(table, 100)
    opposite = ranks(table.with_columns(scores_chosen=pl.lit(0.0)), 100)
    for name in RANKS[:3]:
        assert same[name].estimates[0] == pytest.approx(1)
        assert opposite[name].estimates[0] == pytest.approx(-1)
    ends = [[found[name].estimates[0] for name in RANKS[3:]] for found in (same, opposite)]
    assert ends[0] == pytest.approx([1, 1, 0], abs=1e-6)
    assert ends[1] == pytest.approx([1, -1, 1], abs=1e-6)


def test_constant_rewards_separate_no_models() -> None:
    table = votes(SKILL, REWARDED).with_columns(scores_chosen=pl.lit(0.5))
    found = {name: one.estimates[0] for name, one in ranks(table, 50).items()}
    assert np.isnan([found[name] for name in RANKS[:3]]).all()
    assert [found[name] for name in RANKS[3:]] == pytest.approx([0, 0, 0.25])


def test_a_brier_score_by_hand() -> None:
    """Two models are rated alike and a third far below: one pair of three is undecided."""
    table = votes({"a": 4.0, "b": 0.0, "c": -4.0}, dict.fromkeys("abc", 0.0), 300)
    pair = (pl.col("chosen_model") != "c") & (pl.col("rejected_model") != "c")
    margin = pl.when(pair).then(0.5).when(pl.col("rejected_model") == "c").then(1.0).otherwise(0.0)
    found = ranks(table.with_columns(scores_chosen=margin), 100)
    assert found["Brier score of ranks"].estimates[0] == pytest.approx(1 / 12, abs=1e-3)
    assert found["separability"].estimates[0] == pytest.approx(2 / 3)


def test_ppe_human_has_accuracy_and_ranks_with_intervals_where_they_are_defined() -> None:
    found = score_suite("ppe-human", votes(SKILL, REWARDED), 100)
    rows = {row["score"]: row for row in found.iter_rows(named=True)}
    assert set(RANKS) < set(rows)
    spearman = rows["Spearman of ratings"]
    assert spearman["low"] <= spearman["estimate"] <= spearman["high"]
    assert rows["separability"]["low"] is None
    unnamed = score_suite("ppe-human", votes(SKILL, REWARDED).drop("chosen_model"), 20)
    assert unnamed.filter(score="Spearman of ratings")["estimate"].to_list() == [None]


@pytest.mark.parametrize("suite", SUITES)
def test_only_ppe_best_of_k_has_ppe_metrics_among_its_main_scores(suite: str) -> None:
    known = {*RANKS, *(f"{metric}, mean of subsets" for metric in METRICS)}
    shown = SUITES[suite].main
    if suite == "ppe-best-of-k":
        assert set(shown) < known
    else:
        assert not set(shown) & known
