"""Metrics of a split against hand counts, scikit-learn and scipy."""

import pickle
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import kendalltau
from sklearn.metrics import brier_score_loss, log_loss

from embrm.core.errors import UserError
from embrm.metrics.accuracy import OUTCOMES, PROMPTS, EvaluationSplit

PAIRS = {
    "chosen": pl.Int32,
    "rejected": pl.Int32,
    "prompt_id": pl.String,
    "subset": pl.String,
    "label": pl.Float64,
    "weight": pl.Float64,
}
MEMBERS = {
    "response": pl.Int32,
    "prompt_id": pl.String,
    "subset": pl.String,
    "gold": pl.Float64,
}
NO_PAIRS = pl.DataFrame(schema=PAIRS)
NO_MEMBERS = pl.DataFrame(schema=MEMBERS)


def pair_rows(rows: Sequence[tuple[int, int, str, str | None]]) -> pl.DataFrame:
    return pl.DataFrame([(*row, 1.0, 1.0) for row in rows], schema=PAIRS, orient="row")


def evaluate(
    pairs: pl.DataFrame,
    members: pl.DataFrame,
    lengths: np.ndarray,
    rewards: np.ndarray,
    temperature: float,
) -> tuple[dict[str, float], pl.DataFrame]:
    """Metrics, and one table of the prompts with their outcomes. rewards: of all responses."""
    split = EvaluationSplit.of(pairs, members, lengths)
    metrics, outcomes = split.evaluate(rewards[split.rows], temperature)
    assert tuple(outcomes) == OUTCOMES
    return metrics, split.prompts.with_columns(pl.Series(k, v) for k, v in outcomes.items())


def random_split(seed: int, count: int = 400) -> tuple[pl.DataFrame, pl.DataFrame, np.ndarray]:
    generator = np.random.default_rng(seed)
    responses = 300
    pairs = pl.DataFrame(
        {
            "chosen": generator.integers(0, responses, count),
            "rejected": generator.integers(0, responses, count),
            "prompt_id": [f"p{number}" for number in generator.integers(0, 30, count)],
            "subset": [["a", "b", None][number] for number in generator.integers(0, 3, count)],
            "label": 1.0,
            "weight": 1.0,
        },
        schema=PAIRS,
    )
    members = pl.DataFrame(
        {
            "response": generator.permutation(responses)[:200],
            "prompt_id": [f"p{number}" for number in generator.integers(0, 40, 200)],
            "subset": None,
            "gold": generator.normal(size=200),
        },
        schema=MEMBERS,
    )
    # few distinct rewards, so that ties occur
    rewards = (generator.integers(-6, 7, responses) / 4).astype(np.float32)
    return pairs, members, rewards


LENGTHS = np.array([10, 20, 30, 20], dtype=np.int32)


def test_four_pairs_by_hand() -> None:
    rewards = np.array([1.0, 0.0, 3.0, 1.0], dtype=np.float32)
    pairs = pair_rows([(0, 1, "x", "s"), (1, 2, "x", "s"), (0, 3, "y", None), (2, 0, "y", None)])
    metrics, prompts = evaluate(pairs, NO_MEMBERS, LENGTHS, rewards, 2.0)
    margins = np.array([1.0, -3.0, 0.0, 2.0])
    assert metrics["pairs"] == 4
    assert metrics["prompts"] == 2
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["ties"] == 0.25
    assert metrics["nll"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    assert metrics["nll_calibrated"] == pytest.approx(np.log1p(np.exp(-margins / 2)).mean())
    assert metrics["brier"] == pytest.approx(np.square(1 - expit(margins)).mean())
    assert metrics["brier_calibrated"] == pytest.approx(np.square(1 - expit(margins / 2)).mean())
    # every confidence has a bin of its own; the tie has confidence ½ and counts half
    correct = np.array([1, 0, 0.5, 1])
    for name, scale in (("ece", 1), ("ece_calibrated", 2)):
        gaps = correct - expit(np.abs(margins) / scale)
        assert metrics[name] == pytest.approx(np.abs(gaps).mean())
    assert metrics["margin"] == 0.0
    # lengths: 10-20 loses, 20-30 loses, 10-20 loses, 30-10 wins
    assert metrics["length_accuracy"] == 0.25
    assert metrics["reward_mean"] == pytest.approx(1.25)
    assert metrics["reward_sd"] == pytest.approx(np.std([1, 0, 3, 1]))
    assert np.isnan(metrics["tau"])
    assert prompts["subset"].to_list() == ["s", None]
    assert prompts["wins"].to_list() == [1, 1]
    assert prompts["ties"].to_list() == [0, 1]
    assert prompts["tau"].is_nan().all()


def test_equals_scikit_learn() -> None:
    pairs, members, rewards = random_split(0)
    metrics, _ = evaluate(pairs, members, np.ones(300, np.int32), rewards, 1.0)
    margins = rewards[pairs["chosen"]].astype(float) - rewards[pairs["rejected"]]
    probability, sure = expit(margins), np.ones(len(margins))
    assert metrics["nll"] == pytest.approx(log_loss(sure, probability, labels=[0, 1]))
    assert metrics["brier"] == pytest.approx(brier_score_loss(sure, probability, pos_label=1))
    decided = margins != 0
    assert metrics["ties"] == pytest.approx(1 - decided.mean())
    assert metrics["accuracy"] == pytest.approx((margins[decided] > 0).mean())
    assert np.isnan(metrics["length_accuracy"])  # all lengths are equal


def test_prompt_sums_add_up_to_the_metrics() -> None:
    pairs, members, rewards = random_split(1)
    lengths = np.random.default_rng(1).integers(1, 9, 300).astype(np.int32)
    metrics, prompts = evaluate(pairs, members, lengths, rewards, 1.5)
    assert prompts.schema == pl.Schema(PROMPTS | dict.fromkeys(OUTCOMES, pl.Float32()))
    total = prompts.sum().row(0, named=True)
    assert total["pairs"] == metrics["pairs"] == pairs.height
    decided = total["pairs"] - total["ties"]
    assert metrics["accuracy"] == pytest.approx(total["wins"] / decided)
    for name in ("nll", "brier", "ties"):
        assert metrics[name] == pytest.approx(total[name] / total["pairs"])
    assert metrics["length_accuracy"] == pytest.approx(
        total["length_wins"] / (total["pairs"] - total["length_ties"])
    )
    one = prompts.filter(pl.col("subset") == "a", pl.col("prompt_id") == "p3")
    alone, _ = evaluate(pairs.filter(subset="a", prompt_id="p3"), NO_MEMBERS, lengths, rewards, 1.5)
    assert one["nll"].item() / one["pairs"].item() == pytest.approx(alone["nll"], rel=1e-6)
    keys = prompts.select("subset", "prompt_id")
    assert keys.equals(keys.unique().sort("subset", "prompt_id", nulls_last=True))


def test_tau_equals_scipy_prompt_by_prompt() -> None:
    pairs, members, rewards = random_split(2)
    metrics, prompts = evaluate(pairs, members, np.ones(300, np.int32), rewards, 1.0)
    taus = []
    for (prompt_id,), group in members.group_by("prompt_id"):
        with np.errstate(all="ignore"):
            oracle = kendalltau(rewards[group["response"]], group["gold"]).statistic
        found = prompts.filter(pl.col("subset").is_null(), pl.col("prompt_id") == prompt_id)
        if np.isnan(oracle):
            assert np.isnan(found["tau"].item())
        else:
            assert found["tau"].item() == pytest.approx(oracle, rel=1e-6)
            taus.append(oracle)
    assert metrics["tau"] == pytest.approx(np.mean(taus))
    assert len(taus) < members["prompt_id"].n_unique()  # the undefined case did occur


def test_a_split_of_groups_without_pairs() -> None:
    members = pl.DataFrame(
        [(0, "x", None, 1.0), (1, "x", None, 2.0), (2, "y", None, 3.0)], MEMBERS, orient="row"
    )
    rewards = np.array([0.0, 1.0, 5.0, np.nan], dtype=np.float32)
    metrics, prompts = evaluate(NO_PAIRS, members, LENGTHS, rewards, 1.0)
    assert metrics["pairs"] == 0
    assert metrics["prompts"] == 2
    assert metrics["tau"] == 1.0
    assert all(np.isnan(metrics[name]) for name in ("accuracy", "ties", "nll", "ece", "margin"))
    assert metrics["reward_mean"] == 2.0  # the response outside the split does not count
    assert str(prompts["tau"].to_list()) == "[1.0, nan]"
    assert prompts["pairs"].to_list() == [0.0, 0.0]


def test_an_empty_split() -> None:
    metrics, prompts = evaluate(NO_PAIRS, NO_MEMBERS, LENGTHS, np.zeros(4, np.float32), 1.0)
    assert metrics.pop("pairs") == metrics.pop("prompts") == 0
    assert np.isnan([*metrics.values()]).all()
    assert prompts.height == 0


def test_all_ties_are_neither_right_nor_wrong() -> None:
    metrics, prompts = evaluate(
        pair_rows([(0, 1, "x", None), (2, 3, "y", None)]),
        NO_MEMBERS,
        LENGTHS,
        np.zeros(4, np.float32),
        1.0,
    )
    assert np.isnan(metrics["accuracy"])
    assert metrics["ties"] == 1.0
    assert metrics["nll"] == pytest.approx(np.log(2))
    assert metrics["brier"] == 0.25
    assert metrics["ece"] == 0.0
    assert prompts["wins"].sum() == 0


def test_a_very_wrong_reward_has_a_finite_loss() -> None:
    rewards = np.array([-1e30, 1e30, 0, 0], dtype=np.float32)
    pairs = pair_rows([(0, 1, "x", None)])
    metrics, _ = evaluate(pairs, NO_MEMBERS, LENGTHS, rewards, 1.0)
    assert metrics["nll"] == pytest.approx(2e30, rel=1e-6)
    assert metrics["brier"] == 1.0


def test_rewards_that_are_not_finite_are_refused() -> None:
    rewards = np.array([np.inf, 0, np.nan, 0], dtype=np.float32)
    with pytest.raises(UserError, match="1 of 2 rewards are not finite"):
        evaluate(pair_rows([(0, 1, "x", None)]), NO_MEMBERS, LENGTHS, rewards, 1.0)


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_a_soft_label_is_two_weighted_pairs(seed: int, label: float) -> None:
    pairs, members, rewards = random_split(seed, count=40)
    lengths = np.random.default_rng(seed).integers(1, 5, 300).astype(np.int32)
    soft = pairs.with_columns(label=pl.lit(label))
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    hard = pl.concat(
        [
            pairs.with_columns(weight=pl.lit(label)),
            pairs.rename(swapped).select(pairs.columns).with_columns(weight=pl.lit(1 - label)),
        ]
    )
    found, found_prompts = evaluate(soft, members, lengths, rewards, 1.7)
    expected, expected_prompts = evaluate(hard, members, lengths, rewards, 1.7)
    for name in found:
        assert found[name] == pytest.approx(expected[name], nan_ok=True, abs=1e-9), name
    for name in found_prompts.columns:
        left, right = found_prompts[name], expected_prompts[name]
        if left.dtype.is_float():
            np.testing.assert_allclose(left.to_numpy(), right.to_numpy(), rtol=1e-6, atol=1e-7)
        else:
            assert left.equals(right)


def test_weights_count_like_copies() -> None:
    pairs, members, rewards = random_split(3, count=30)
    lengths = np.arange(300, dtype=np.int32) % 7
    weighted = pairs.with_columns(weight=pl.Series([1.0, 2.0, 3.0] * 10))
    copies = pairs.select(pl.all().repeat_by(pl.Series([1, 2, 3] * 10)).explode())
    found, _ = evaluate(weighted, members, lengths, rewards, 1.7)
    expected, _ = evaluate(copies, members, lengths, rewards, 1.7)
    for name in found:
        assert found[name] == pytest.approx(expected[name]), name


def test_scaling_rewards_and_temperature_together_changes_no_calibrated_metric() -> None:
    pairs, members, rewards = random_split(4)
    lengths = np.ones(300, np.int32)
    once, _ = evaluate(pairs, members, lengths, rewards, 1.5)
    scaled, _ = evaluate(pairs, members, lengths, 8 * rewards, 12.0)
    for name in ("accuracy", "ties", "tau", "nll_calibrated", "brier_calibrated", "ece_calibrated"):
        assert once[name] == scaled[name]
    assert scaled["reward_sd"] == pytest.approx(8 * once["reward_sd"])


def test_without_a_temperature_only_the_calibrated_metrics_are_nan() -> None:
    pairs, members, rewards = random_split(4)
    lengths = np.arange(300, dtype=np.int32)
    known, prompts = evaluate(pairs, members, lengths, rewards, 1.5)
    found, same = evaluate(pairs, members, lengths, rewards, float("nan"))
    assert same.equals(prompts, null_equal=True)
    gone = {name for name in known if name.endswith("_calibrated")}
    assert {name for name, value in found.items() if np.isnan(value)} == gone
    assert all(found[name] == known[name] for name in known.keys() - gone)


def test_the_same_input_gives_the_same_bits_and_row_order_changes_rounding_only() -> None:
    pairs, members, rewards = random_split(5)
    lengths = np.ones(300, np.int32)
    first, first_prompts = evaluate(pairs, members, lengths, rewards, 1.5)
    again, again_prompts = evaluate(pairs, members, lengths, rewards, 1.5)
    np.testing.assert_array_equal([*first.values()], [*again.values()])
    assert first_prompts.equals(again_prompts)
    shuffled, shuffled_prompts = evaluate(
        pairs.sample(fraction=1, shuffle=True, seed=1),
        members.sample(fraction=1, shuffle=True, seed=1),
        lengths,
        rewards,
        1.5,
    )
    np.testing.assert_allclose([*first.values()], [*shuffled.values()], rtol=1e-12)
    assert shuffled_prompts["prompt_id"].equals(first_prompts["prompt_id"])


def textbook(
    pairs: pl.DataFrame, lengths: np.ndarray, rewards: np.ndarray, temperature: float
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Every formula as documented, in float64: the metrics, and the terms of every pair."""
    margins = rewards[pairs["chosen"]].astype(float) - rewards[pairs["rejected"]]
    longer = lengths[pairs["chosen"]].astype(float) - lengths[pairs["rejected"]]
    q, weight = pairs["label"].to_numpy(), pairs["weight"].to_numpy()
    total = weight.sum()

    def wins(values: np.ndarray) -> np.ndarray:
        return weight * (q * (values > 0) + (1 - q) * (values < 0))

    def nll(values: np.ndarray) -> np.ndarray:
        return weight * (q * np.logaddexp(0, -values) + (1 - q) * np.logaddexp(0, values))

    def brier(values: np.ndarray) -> np.ndarray:
        return weight * (q * expit(-values) ** 2 + (1 - q) * expit(values) ** 2)

    def ece(values: np.ndarray) -> float:
        """Every pair counts twice, once with each label; a tie is half right."""
        both = np.concatenate([values, -values])
        confidence = expit(np.abs(both))
        right = np.where(both == 0, 0.5, both > 0)
        share = np.concatenate([weight * q, weight * (1 - q)]) / total
        edges = np.linspace(0.5, 1, 16)
        edges[-1] = 2
        inside = [(low <= confidence) & (confidence < high) for low, high in pairwise(edges)]
        return sum(abs((share * (right - confidence))[own].sum()) for own in inside)

    terms = {
        "wins": wins(margins),
        "ties": weight * (margins == 0),
        "nll": nll(margins),
        "brier": brier(margins),
    }
    length_ties = (weight * (longer == 0)).sum()
    metrics = {
        "pairs": total,
        "accuracy": terms["wins"].sum() / (total - terms["ties"].sum()),
        "ties": terms["ties"].sum() / total,
        "nll": terms["nll"].sum() / total,
        "brier": terms["brier"].sum() / total,
        "ece": ece(margins),
        "nll_calibrated": nll(margins / temperature).sum() / total,
        "brier_calibrated": brier(margins / temperature).sum() / total,
        "ece_calibrated": ece(margins / temperature),
        "margin": (weight * (2 * q - 1) * margins).sum() / total,
        "length_accuracy": wins(longer).sum() / (total - length_ties),
    }
    return metrics, terms


@given(st.integers(0, 1000), st.sampled_from([0.3, 4.0, 900.0, 1e7]))
@settings(max_examples=60, deadline=None)
def test_equals_the_textbook(seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    pairs, members, rewards = random_split(seed, count=120)
    count = pairs.height
    pairs = pairs.with_columns(
        label=np.where(generator.random(count) < 0.5, generator.random(count), 1.0),
        weight=generator.choice([0.0, 0.1, 1.0, 2.7], count),
    )
    # ties among them; irrational, so that no confidence lies on the edge of a bin
    rewards = (rewards * scale * np.sqrt(2)).astype(np.float32)
    lengths = generator.integers(1, 9, 300).astype(np.int32)
    metrics, prompts = evaluate(pairs, members, lengths, rewards, 1.7)
    expected, terms = textbook(pairs, lengths, rewards, 1.7)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-11, abs=1e-13), name
    by_prompt = (
        pairs.select("subset", "prompt_id", *(pl.Series(k, v) for k, v in terms.items()))
        .group_by("subset", "prompt_id")
        .agg(pl.all().sum())
    )
    both = prompts.join(by_prompt, on=["subset", "prompt_id"], nulls_equal=True, suffix="_expected")
    for name in terms:
        np.testing.assert_allclose(both[name], both[f"{name}_expected"], rtol=1e-6, atol=1e-12)


def test_bits_of_a_run_do_not_depend_on_other_runs_or_on_pickling() -> None:
    pairs, members, rewards = random_split(6)
    lengths = np.arange(300, dtype=np.int32)
    split = EvaluationSplit.of(pairs, members, lengths)
    other = np.random.default_rng(6).normal(size=len(split.rows)).astype(np.float32)

    def bits(ready: EvaluationSplit) -> list[bytes]:
        metrics, outcomes = ready.evaluate(rewards[split.rows], 1.5)
        return [np.array([*metrics.values()]).tobytes(), *(v.tobytes() for v in outcomes.values())]

    alone = bits(split)
    split.evaluate(other, 0.2)
    split.evaluate(10 * other, float("nan"))
    assert bits(split) == alone
    assert bits(pickle.loads(pickle.dumps(split))) == alone  # workers receive it pickled


def test_only_the_rewards_of_rows_are_needed() -> None:
    pairs, members, rewards = random_split(7, count=40)
    lengths = np.arange(300, dtype=np.int32) % 11
    split = EvaluationSplit.of(pairs, members, lengths)
    used = {*pairs["chosen"], *pairs["rejected"], *members["response"]}
    assert split.rows.tolist() == sorted(used)
    assert len(used) < 300
    # the same split over the used responses alone, renumbered
    place = {row: number for number, row in enumerate(sorted(used))}
    whole = EvaluationSplit.of(
        pairs.with_columns(pl.col("chosen", "rejected").replace_strict(place)),
        members.with_columns(pl.col("response").replace_strict(place)),
        lengths[split.rows],
    )
    assert whole.rows.tolist() == list(range(len(used)))
    assert whole.prompts.equals(split.prompts)
    own, other = (ready.evaluate(rewards[split.rows], 1.5) for ready in (split, whole))
    np.testing.assert_array_equal([*own[0].values()], [*other[0].values()])
    for name in OUTCOMES:
        np.testing.assert_array_equal(own[1][name], other[1][name])
