"""Suite scores: every published formula worked by hand, and properties of all suites."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from embrm.cli import app
from embrm.core.errors import UserError
from embrm.suites.ppe_human import RANKS
from embrm.suites.registry import SUITES
from embrm.suites.reward_bench import SECTIONS as REWARD_BENCH
from embrm.suites.rm_bench import SECTIONS as RM_BENCH
from embrm.suites.rm_bench import STYLES
from embrm.suites.scoring import read_scores, replicate_suite, score_suite

Row = tuple[str, str, float, float]
"""subset, prompt, chosen reward, rejected reward"""


def frame(rows: list[Row], **columns: list[Any]) -> pl.DataFrame:
    names = ("subset", "prompt_id", "scores_chosen", "scores_rejected")
    return pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.Series(name, values) for name, values in columns.items()
    )


def values(suite: str, pairs: pl.DataFrame) -> dict[str, float]:
    found = score_suite(suite, pairs, 20)
    return dict(zip(found["score"], found["estimate"], strict=True))


def accurate(subset: str, right: int, wrong: int, tied: int = 0) -> list[Row]:
    margins = [1.0] * right + [-1.0] * wrong + [0.0] * tied
    return [(subset, f"{subset} {i}", margin, 0.0) for i, margin in enumerate(margins)]


# RewardBench.


def test_reward_bench_weights_subsets_by_its_table_not_by_their_pairs() -> None:
    pairs = frame(accurate("math-prm", 1, 3) + accurate("hep-cpp", 1, 0) + accurate("hep-go", 0, 1))
    assert values("reward-bench", pairs)["Reasoning"] == pytest.approx(
        (984 * 0.25 + 164 * 1 + 164 * 0) / (984 + 164 + 164)
    )


def test_reward_bench_names_the_overall_scores_of_papers_and_of_the_leaderboard_apart() -> None:
    rows = (
        accurate("alpacaeval-easy", 3, 1)  # Chat .75
        + accurate("llmbar-natural", 1, 1)  # Chat Hard .5
        + accurate("donotanswer", 1, 0)  # Safety 1
        + accurate("hep-js", 0, 1)  # Reasoning 0
        + accurate("shp", 1, 0)  # Prior Sets (1 + .5) / 2
        + accurate("summarize", 2, 2)
    )
    found = values("reward-bench", frame(rows))
    assert found["mean of four sections"] == pytest.approx((0.75 + 0.5 + 1 + 0) / 4)
    assert found["overall with prior sets (2:2:2:2:1)"] == pytest.approx(
        (2 * (0.75 + 0.5 + 1 + 0) + 0.75) / 9
    )
    assert found["Prior Sets"] == pytest.approx(0.75)
    without = values("reward-bench", frame(rows[:8]))
    assert without["mean of four sections"] == pytest.approx(2.25 / 4)
    assert without["overall with prior sets (2:2:2:2:1)"] is None


def test_math_prm_weighs_as_much_as_all_code_subsets() -> None:
    reasoning = REWARD_BENCH["Reasoning"]
    assert reasoning["math-prm"] == sum(reasoning.values()) - reasoning["math-prm"] == 984
    assert sum(sum(part.values()) for part in REWARD_BENCH.values()) - 4 - 984 + 447 == 2985


def test_a_tie_is_wrong_and_reported_separately() -> None:
    found = values("judge-bench", frame(accurate("Math", 2, 1, 1)))
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert found["accuracy of pairs, ties apart"] == pytest.approx(2 / 3)
    assert found["tied pairs"] == pytest.approx(1 / 4)


# RewardBench 2.


def items(subset: str, *rewards: tuple[list[float], list[float]], ids: list[str] | None = None):  # type: ignore[no-untyped-def]
    """Pairs as the layout gives them: every response of an item is in one of its pairs."""
    rows, row_of, models = [], [], []
    for number, (correct, wrong) in enumerate(rewards):
        for i in range(max(len(correct), len(wrong))):
            chosen, rejected = correct[i % len(correct)], wrong[i % len(wrong)]
            rows.append((subset, f"{subset} {number}", chosen, rejected))
            row_of.append(number)
            models.append(ids[number] if ids else None)
    return frame(rows, source=[subset] * len(rows), row=row_of).with_columns(
        pl.Series("chosen_model", models, dtype=pl.String)
    )


def test_reward_bench_2_credits_one_over_the_number_tied_at_the_top() -> None:
    pairs = items(
        "Math",
        ([3.0], [1.0, 2.0, 0.0]),  # 1
        ([2.0], [2.0, 1.0, 2.0]),  # three at the top: 1/3
        ([1.0], [1.0, 1.0, 1.0]),  # 1/4
        ([1.0], [2.0, 0.0, 0.0]),  # 0
        ([1.0], [2.0, 1.0, 0.0]),  # tied, but not at the top: 0
    )
    found = values("reward-bench-2", pairs)
    assert found["Math"] == pytest.approx((1 + 1 / 3 + 1 / 4) / 5)
    assert found["mean of six subsets"] is None


def test_reward_bench_2_ties_formula() -> None:
    pairs = items(
        "Ties",
        ([5.0], [3.0, 1.0]),  # ref 0: gap 2
        ([4.0, 3.5, 3.0], [2.0, 0.0, 1.0, 1.5]),  # tied 0: gap 1, spread 1
        ([1.0], [0.0]),  # ref 1: gap 1
        ([9.0, 8.0], [4.0]),  # tied 1: gap 4, spread 1
        ([0.0], [2.0]),  # ref 2: gap -2
        ([3.0, 1.0], [2.0]),  # tied 2: gap -1, spread 2
        ([7.0], [2.0]),  # ref 3: gap 5
        ([6.0, 6.0], [2.0]),  # tied 3: gap 4, spread 0
        ids=["ref:0", "tied:0", "ref:1", "tied:1", "ref:2", "tied:2", "ref:3", "tied:3"],
    )
    tied, ref = 3 / 4, 3 / 4
    above = (0 + 1 + 0 + 1) / 4  # 1 > 1 is not; 4 > 1; -1 > 2 is not; 4 > 0
    both = (0 + 0 + 0 + 1) / 4  # min(2, 1) > 1; min(1, 4) > 1; min(-2, -1) > 2; min(5, 4) > 0
    margin = (math.tanh(0) + math.tanh(0) + math.tanh(-2) + 1) / 4
    found = values("reward-bench-2", pairs)
    assert found["Ties"] == pytest.approx(
        0.3 * tied + 0.3 * ref + 0.2 * above + 0.2 * both + 0.01 * margin
    )
    assert found["Ties: margin"] == pytest.approx(margin)


def test_reward_bench_2_is_an_unweighted_mean_that_can_exceed_1() -> None:
    parts = [
        items(subset, ([1.0], [0.0, 0.0, 0.0]))
        for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    ]
    ties = items("Ties", ([2.0], [0.0]), ([2.0, 2.0], [0.0]), ids=["ref:7", "tied:7"])
    found = values("reward-bench-2", pl.concat([*parts, ties]))
    assert found["Ties"] == pytest.approx(1.01)
    assert found["mean of six subsets"] == pytest.approx((5 + 1.01) / 6)


# RM-Bench.


def matrix(domain: str, right: np.ndarray, prompt: str = "p") -> pl.DataFrame:
    rows, chosen, rejected = [], [], []
    for i, j in np.ndindex(3, 3):
        rows.append((domain, f"{domain} {prompt}", float(right[i, j]), 0.5))
        chosen.append(STYLES[i])
        rejected.append(STYLES[j])
    return frame(rows, chosen_model=chosen, rejected_model=rejected)


def test_rm_bench_levels_are_triangles_and_diagonal_of_the_style_matrix() -> None:
    one = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    two = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    found = values("rm-bench", pl.concat([matrix("chat", one), matrix("chat", two, "q")]))
    hard = ((1 + 0) / 2 + 0 + 0) / 3  # concise against detailed, against markdown; the last cell
    normal = (1 + 0.5 + 0.5) / 3
    easy = (1 + 0.5 + 1) / 3
    assert [found[f"chat {name}"] for name in ("hard", "normal", "easy")] == pytest.approx(
        [hard, normal, easy]
    )
    assert found["chat"] == pytest.approx((hard + normal + easy) / 3)
    assert found["mean of four sections"] is None
    assert found["hard, all items pooled"] == pytest.approx(hard)


def test_rm_bench_averages_sections_and_the_two_domains_of_safety() -> None:
    parts = [
        matrix("chat", np.eye(3)),
        *(matrix("code", np.zeros((3, 3)), str(i)) for i in range(3)),
        matrix("math", np.triu(np.ones((3, 3)), 1)),
        matrix("safety-refuse", np.ones((3, 3))),
        *(matrix("safety-response", np.zeros((3, 3)), str(i)) for i in range(2)),
    ]
    found = values("rm-bench", pl.concat(parts))
    assert found["safety hard"] == pytest.approx(0.5)
    assert found["hard, mean of four"] == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert found["normal, mean of four"] == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert found["mean of four sections"] == pytest.approx((1 / 3 + 0 + 1 / 3 + 0.5) / 4)
    assert found["hard, all items pooled"] == pytest.approx((1 + 1) / 8)  # math, safety-refuse


# Pooled suites.


def test_hhh_has_accuracy_over_all_pairs_and_the_mean_of_subsets() -> None:
    pairs = frame(accurate("harmless", 3, 1) + accurate("honest", 0, 1))
    assert values("hhh", pairs)["accuracy"] == pytest.approx(3 / 5)
    assert values("hhh", pairs)["mean of subsets"] == pytest.approx(0.75 / 2)
    assert "mean of subsets" not in values("judge-bench", pairs)


def test_mt_bench_counts_votes_not_pairs() -> None:
    pairs = frame(
        [("turn 1", "p", 1.0, 0.0), ("turn 1", "q", 0.0, 1.0), ("turn 2", "p", 1.0, 1.0)],
        label=[2 / 3, 1.0, 1.0],
        weight=[3.0, 1.0, 2.0],
    )
    found = values("mt-bench", pairs)
    assert found["turn 1"] == pytest.approx((2 + 0) / 4)
    assert found["accuracy"] == pytest.approx((2 + 0 + 0) / 6)
    assert found["accuracy of pairs, ties apart"] == pytest.approx(2 / 4)


# Properties of all suites.


def whole(suite: str, rewards: np.ndarray) -> pl.DataFrame:
    """A small but complete suite; rewards float64 [40], reused in turn."""
    chosen, rejected = (rewards[:20], rewards[20:])
    names = {
        "reward-bench": [name for part in REWARD_BENCH.values() for name in part],
        "rm-bench": [name for part in RM_BENCH.values() for name in part],
    }.get(suite, ["one", "two"])
    if suite == "ppe-best-of-k":
        count = len(rewards)
        return pl.DataFrame(
            {
                "subset": ["one"] * (count // 2) + ["two"] * (count // 2),
                "prompt_id": [str(number // 4) for number in range(count)],
                "source": "s",
                "row": [number // 4 for number in range(count)],
                # The first half of the rewards is of correct samples, the rest of wrong ones.
                "gold": [1.0, 0.0] * (count // 2),
                "score": np.stack([chosen, rejected], axis=1).ravel(),
            }
        )
    if suite == "reward-bench-2":
        plain = [
            items(name, *(([chosen[i]], list(rejected[3 * i : 3 * i + 3])) for i in range(3)))
            for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus")
        ]
        ties = items(
            "Ties",
            ([chosen[0]], [rejected[0], rejected[1]]),
            ([chosen[1], chosen[2]], [rejected[2]]),
            ids=["ref:1", "tied:1"],
        )
        return pl.concat([*plain, ties])
    if suite == "rm-bench":
        parts = [matrix(name, np.zeros((3, 3)), str(i)) for name in names for i in range(2)]
        table = pl.concat(parts)
    else:
        table = frame([(name, f"{name} {i}", 0.0, 0.0) for name in names for i in range(4)])
    count = table.height
    return table.with_columns(
        scores_chosen=np.resize(chosen, count),
        scores_rejected=np.resize(rejected, count),
        label=pl.lit(1.0),
        weight=pl.lit(1.0),
    )


@pytest.mark.parametrize("suite", SUITES)
def test_perfect_rewards_score_1_and_constant_rewards_tie(suite: str) -> None:
    perfect = values(suite, whole(suite, np.repeat([1.0, 0.0], 20)))
    constant = values(suite, whole(suite, np.zeros(40)))
    headline = SUITES[suite].main[0]
    if suite == "ppe-best-of-k":
        assert (perfect[headline], constant[headline]) == pytest.approx((1.0, 0.5))
        return
    if suite == "reward-bench-2":
        assert perfect[headline] == pytest.approx((5 + 1.01) / 6)
        # One of four at the top; Ties: no gap, and 0/0 counts as no margin.
        assert constant[headline] == pytest.approx(5 * 0.25 / 6)
    else:
        assert perfect[headline] == pytest.approx(1.0)
        assert constant[headline] == 0.0
    assert constant["tied pairs"] == 1.0
    assert constant["accuracy of pairs, ties apart"] is None


@pytest.mark.parametrize("suite", SUITES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shift=st.integers(-8, 8),
    scale=st.sampled_from([0.25, 2.0, 8.0]),  # exact: a gap that equals a spread stays equal
)
def test_scores_depend_only_on_the_order_of_rewards(
    suite: str, seed: int, shift: int, scale: float
) -> None:
    rewards = np.random.default_rng(seed).integers(0, 6, 40).astype(np.float64)
    plain = values(suite, whole(suite, rewards))
    linear = values(suite, whole(suite, scale * rewards + shift * scale))
    curved = values(suite, whole(suite, np.exp(rewards)))
    for name, value in plain.items():
        assert linear[name] == pytest.approx(value, abs=1e-6)
        # These scores depend on differences of rewards.
        if not any(word in name for word in ("Ties", "mean of six subsets", "ROC AUC")):
            assert curved[name] == pytest.approx(value, abs=1e-6)


def test_intervals_are_clustered_by_prompt() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7
    once = frame([("Math", str(i), float(ok), 0.5) for i, ok in enumerate(right)])
    ten = pl.concat([once] * 10)
    one, repeated = (score_suite("judge-bench", pairs).row(0, named=True) for pairs in (once, ten))
    assert one["low"] < one["estimate"] < one["high"]
    assert repeated["low"] == pytest.approx(one["low"])
    assert repeated["high"] == pytest.approx(one["high"])
    assert one["prompts"] == repeated["prompts"] == 40
    assert one["high"] - one["low"] == pytest.approx(
        2 * 1.96 * math.sqrt(one["estimate"] * (1 - one["estimate"]) / 40), rel=0.15
    )


def test_one_prompt_has_no_interval() -> None:
    row = score_suite("judge-bench", frame([("Math", "p", 1.0, 0.0)] * 3), 50).row(0, named=True)
    assert (row["estimate"], row["low"], row["high"]) == (1.0, None, None)


def test_the_length_baseline_uses_token_counts_as_rewards() -> None:
    pairs = matrix("chat", np.ones((3, 3))).with_columns(
        tokens_chosen=pl.col("chosen_model").replace_strict(STYLES, [1, 2, 3]),
        tokens_rejected=pl.col("rejected_model").replace_strict(STYLES, [1, 2, 3]),
    )
    found = score_suite("rm-bench", pairs, 20)
    longer = dict(zip(found["score"], found["longer"], strict=True))
    assert [longer[f"chat {name}"] for name in ("hard", "normal", "easy")] == [0.0, 0.0, 1.0]
    assert longer["tied pairs"] == pytest.approx(1 / 3)
    without = score_suite("rm-bench", matrix("chat", np.ones((3, 3))), 20)
    assert without["longer"].null_count() == without.height
    some = pairs.with_columns(tokens_chosen=pl.Series([None, *range(8)]))
    assert score_suite("rm-bench", some, 20).equals(without)


@pytest.mark.parametrize("suite", SUITES)
def test_scores_stay_within_their_bounds(suite: str) -> None:
    perfect, worst = (
        replicate_suite(suite, whole(suite, np.repeat(rewards, 20)), 20)
        for rewards in ([1.0, 0.0], [0.0, 1.0])
    )
    others = {
        "Ties": (-0.01, 1.01),
        "Ties: margin": (-1.0, 1.0),
        "mean of six subsets": (-0.01 / 6, (5 + 1.01) / 6),
    }
    for name, found in perfect.items():
        expected = (-1.0, 1.0) if name in RANKS else others.get(name, (0.0, 1.0))
        for value in (found.estimates[0], worst[name].estimates[0]):
            if not np.isnan(value):
                assert found.bounds == expected
                assert found.bounds[0] - 1e-9 <= value <= found.bounds[1] + 1e-9
    if suite == "reward-bench-2":
        assert perfect["Ties"].estimates[0] == pytest.approx(1.01)


# Errors, each of one line.


def refused(suite: str, pairs: pl.DataFrame) -> str:
    with pytest.raises(UserError) as caught:
        score_suite(suite, pairs, 20)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_scored_is_refused() -> None:
    good = frame(accurate("hep-go", 1, 1))
    assert "did you mean 'rm-bench'" in refused("rmbench", good)
    assert "needs a column 'subset'" in refused("hhh", good.drop("subset"))
    assert "needs a column 'row'" in refused("reward-bench-2", items("Math").drop("row"))
    assert "needs a column 'label'" in refused("mt-bench", good)
    groups = refused("ppe-best-of-k", good)
    assert "needs a column 'score'" in groups
    assert "NAME.members.parquet" in groups
    assert "'hep-go' is not one of its subsets" in refused(
        "reward-bench-2", with_item_columns(good)
    )
    assert "'Math' is not one of its subsets" in refused(
        "reward-bench", frame(accurate("Math", 1, 1))
    )
    assert "not finite" in refused(
        "reward-bench",
        frame(accurate("hep-go", 1, 1)[:1]).with_columns(scores_chosen=pl.lit(float("nan"))),
    )
    words = good.with_columns(scores_chosen=pl.lit("high"))
    assert "not finite" in refused("reward-bench", words)
    assert "no pairs" in refused("reward-bench", good.clear())
    styles = matrix("chat", np.eye(3)).with_columns(chosen_model=pl.lit("gpt-4"))
    assert "'gpt-4', not a style" in refused("rm-bench", styles)
    assert "not ref:N or tied:N" in refused("reward-bench-2", items("Ties", ([1.0], [0.0])))


def with_item_columns(pairs: pl.DataFrame) -> pl.DataFrame:
    return pairs.with_columns(source=pl.lit("s"), row=pl.lit(0), chosen_model=pl.lit("m"))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_scores_are_read_from_the_split_of_the_suite(tmp_path: Path, suffix: str) -> None:
    pairs = frame(
        [("Math", "p", 1.0, 0.0), ("Math", "q", 0.0, 1.0)], split=["ood/judge-bench", "id"]
    )
    path = tmp_path / f"scores{suffix}"
    write = {".parquet": "write_parquet", ".jsonl": "write_ndjson", ".csv": "write_csv"}[suffix]
    getattr(pairs, write)(path)
    assert read_scores(path, "judge-bench")["prompt_id"].to_list() == ["p"]
    assert read_scores(path, "judge-bench", "id")["prompt_id"].to_list() == ["q"]
    for suite, split in (("hhh", None), ("hhh", "di")):
        with pytest.raises(UserError, match="has no split"):
            read_scores(path, suite, split)
    if suffix == ".parquet":
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(UserError, match="not a whole"):
            read_scores(path, "hhh")


def test_the_command_prints_the_scores_of_a_file(tmp_path: Path) -> None:
    pairs = matrix("chat", np.triu(np.ones((3, 3)))).with_columns(split=pl.lit("test"))
    path = tmp_path / "scores.parquet"
    pairs.write_parquet(path)
    shown = CliRunner().invoke(app, ["suite", "rm-bench", str(path), "--json"])
    assert shown.exit_code == 0, shown.output
    rows = {row["score"]: row for row in json.loads(shown.stdout)}
    assert rows["chat"]["estimate"] == pytest.approx(2 / 3)
    assert rows["math"]["estimate"] is None
    table = CliRunner().invoke(app, ["suite", "rm-bench", str(path), "--split", "test"])
    assert "chat hard" in table.stdout
    assert "n/a" in table.stdout


def test_files_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must end in"):
        read_scores(tmp_path / "x.txt", "hhh")
    with pytest.raises(UserError, match="no scores at"):
        read_scores(tmp_path / "x.parquet", "hhh")
