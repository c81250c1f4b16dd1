"""Tests of lint: each fault is found and handled, and none is found in sound arrays."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embrm.adoption.arrays import open_states, scan
from embrm.adoption.findings import Finding
from embrm.adoption.lint import Linted, lint
from embrm.adoption.rows import ROWS, Order, Rows, from_grid
from embrm.core.errors import UserError

N, K, D = 30, 5, 12


def good(prompts: int = N, responses: int = K, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sound arrays: states [prompts, responses, D], similar within a prompt, and gold scores."""
    random = np.random.default_rng(seed)
    states = random.standard_normal((prompts, 1, D)) * 2
    states = states + random.standard_normal((prompts, responses, D))
    return states.astype(np.float32), random.standard_normal((prompts, responses))


def linted(
    folder: Path, states: np.ndarray, gold: np.ndarray, order: Order | None = None
) -> Linted:
    np.save(folder / "states.npy", states)
    array = open_states(folder / "states.npy")
    rows = from_grid(array, gold, "", split="train", order=order, models=None)
    return lint(rows, array, scan(array))


def found(result: Linted, check: str) -> Finding:
    [finding] = [one for one in result.findings if one.check == check]
    assert finding.split in ("train", "")
    return finding


def test_sound_arrays_are_kept_as_they_are(tmp_path: Path) -> None:
    for seed in range(5):
        states, gold = good(seed=seed)
        result = linted(tmp_path, states, gold, "prompts")
        assert result.findings == ()
        assert result.exclusions.is_empty()
        assert result.rows["row"].to_list() == [*range(N * K)]
        assert result.rows["gold"].to_list() == gold.flatten().tolist()


def test_unusable_vectors_are_excluded_and_listed(tmp_path: Path) -> None:
    states, gold = good()
    states[0, 1, 3], states[0, 2, 0], states[1, 0] = np.nan, -np.inf, 1e25
    states[3, 3], states[4, 0], states[5, 1] = 0, 0, -0.25
    states[2, 4] = states[2, 1]
    gold[2, 4] = gold[2, 1]
    states[6, [1, 3]] = states[6, 0]
    result = linted(tmp_path, states, gold, "prompts")
    lost = dict(result.exclusions.select("row", "reason").rows())
    assert lost == {
        1: "nan_state", 2: "nan_state", 5: "nan_state", 18: "zero_vector", 20: "zero_vector",
        26: "constant_vector", 14: "duplicate", 31: "duplicate", 33: "duplicate",
    }  # fmt: skip
    assert {*result.rows["row"]} == {*range(N * K)} - {*lost}
    assert result.exclusions.filter(row=14)["detail"].item() == "equal to row 11 of the same prompt"
    counts = {one.check: (one.done, one.count) for one in result.findings}
    assert counts == {
        "NaN or infinite": ("excluded", 3),
        "zero vectors": ("excluded", 2),
        "constant vectors": ("excluded", 1),
        "duplicate vectors": ("excluded", 3),
    }
    assert "2 of them with other gold" in found(result, "duplicate vectors").detail


def test_different_rows_of_equal_norm_and_mark_are_kept(tmp_path: Path) -> None:
    states, gold = good()
    states[2, 4] = states[2, 1][[1, 0, *range(2, D)]]  # the same values in another order
    assert linted(tmp_path, states, gold, "prompts").findings == ()


def test_rows_without_finite_gold_are_excluded(tmp_path: Path) -> None:
    states, gold = good()
    gold[0, 0], gold[3, 1], gold[3, 2] = np.nan, np.inf, 1e39
    result = linted(tmp_path, states, gold, "prompts")
    assert result.exclusions.select("row", "reason").rows() == [
        (0, "nan_gold"), (16, "nan_gold"), (17, "nan_gold"),
    ]  # fmt: skip
    assert found(result, "gold scores").count == 3
    assert found(result, "gold scores").done == "excluded"


@pytest.mark.parametrize("responses", [2, 3, K])
@pytest.mark.parametrize("direction", ["ascending", "descending"])
def test_sorted_responses_are_shuffled(tmp_path: Path, responses: int, direction: str) -> None:
    states, gold = good(200, responses)
    order = np.argsort(gold if direction == "ascending" else -gold, axis=1)
    order[0] = order[0, ::-1]  # one prompt in the opposite order
    states = np.take_along_axis(states, order[..., None], 1)
    gold = np.take_along_axis(gold, order, 1)
    result = linted(tmp_path, states, gold, "prompts")
    finding = found(result, "sorted by gold")
    assert finding.done == "fixed"
    assert finding.count == 199
    assert direction in finding.detail
    assert "shuffled" in finding.detail
    row = result.rows["row"].to_numpy()
    assert np.array_equal(row // responses, np.repeat(np.arange(200), responses))
    assert sorted(row) == [*range(200 * responses)]  # a permutation inside prompts
    assert result.rows["gold"].to_list() == gold.flatten()[row].tolist()
    best = result.rows["gold"].to_numpy().reshape(200, responses).argmax(1)
    share = np.bincount(best, minlength=responses) / 200
    assert np.abs(share - 1 / responses).max() < 0.15  # the position no longer tells which is best
    assert linted(tmp_path, states, gold, "prompts").rows.equals(result.rows)


def test_gold_with_a_period_is_reported(tmp_path: Path) -> None:
    states, gold = good()
    for period in (2, K, 2 * K):
        recurring = np.tile(gold.flatten()[:period], N * K)[: N * K].reshape(N, K)
        finding = found(linted(tmp_path, states, recurring, "prompts"), "periodic gold")
        assert finding.done == "reported"
        assert f"every {period} rows, {K} responses" in finding.detail


def test_ratings_of_few_values_have_no_period(tmp_path: Path) -> None:
    states, _ = good(200)
    gold = np.random.default_rng(1).integers(0, 3, (200, K)).astype(float)
    checks = {one.check for one in linted(tmp_path, states, gold, "prompts").findings}
    assert checks <= {"constant gold"}


def test_a_wrong_axis_order_is_detected_by_distances(tmp_path: Path) -> None:
    states, gold = good()
    for wrong, order in ((states, "responses"), (states.transpose(1, 0, 2).copy(), "prompts")):
        result = linted(tmp_path, wrong, gold, order)  # type: ignore[arg-type]
        finding = [one for one in result.findings if "far apart" in one.detail]
        assert [one.done for one in finding] == ["reported"]
    sound = linted(tmp_path, states.transpose(1, 0, 2).copy(), gold.T, "responses")
    assert sound.findings == ()


def test_a_vector_shared_by_many_prompts_is_reported(tmp_path: Path) -> None:
    states, gold = good()
    states[:7, 4] = states[0, 4]
    result = linted(tmp_path, states, gold, "prompts")
    finding = found(result, "repeated vectors")
    assert (finding.done, finding.count) == ("reported", 7)
    assert "row 4 7 of 30" in finding.detail
    assert result.rows.height == N * K
    states[2:7, 4] += (
        1 + np.arange(5)[:, None]
    )  # two prompts still share it, which is too few to report
    assert linted(tmp_path, states, gold, "prompts").findings == ()


def test_a_width_below_the_number_of_responses_is_reported(tmp_path: Path) -> None:
    states, gold = good()
    finding = found(linted(tmp_path, states[..., :4].copy(), gold, "prompts"), "width")
    assert finding.done == "reported"
    assert "width 4 is less than 5 responses" in finding.detail


def test_prompts_without_pairs_are_counted(tmp_path: Path) -> None:
    states, gold = good()
    states[0, 1:], gold[1:3] = 0, 0.5
    result = linted(tmp_path, states, gold, "prompts")
    assert found(result, "one response").count == 1
    assert found(result, "constant gold").count == 2
    assert found(result, "constant gold").done == "reported"
    one = linted(tmp_path, states[4:5], gold[4:5], "prompts")
    assert found(one, "one prompt").done == "reported"


def test_conversion_of_float64_is_reported(tmp_path: Path) -> None:
    states, gold = good()
    result = linted(tmp_path, states.astype(np.float64), gold, "prompts")
    assert found(result, "dtype").done == "fixed"


@pytest.mark.parametrize("what", ["constant gold", "one response", "all zero", "nan_gold"])
def test_arrays_without_any_pair_are_refused(tmp_path: Path, what: str) -> None:
    states, gold = good()
    if what == "constant gold":
        gold = np.repeat(gold[:, :1], K, 1)
    elif what == "one response":
        states, gold = states[:, :1], gold[:, :1]
    elif what == "all zero":
        states[:] = 0
    else:
        gold[:] = np.nan
    with pytest.raises(UserError, match="no prompt has two responses of different gold") as caught:
        linted(tmp_path, states, gold, "prompts")
    assert "\n" not in str(caught.value)
    known = {"constant gold": "30 of 30 prompts whose gold", "one response": "30 of 30 prompts",
             "all zero": "150 rows: all zero", "nan_gold": "150 nan_gold"}  # fmt: skip
    assert known[what] in str(caught.value)


def test_rows_of_a_table_are_grouped_by_split_and_prompt(tmp_path: Path) -> None:
    """Rows of a prompt need not be adjacent, and a prompt in two splits is two groups."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "list.npy", random.standard_normal((8, D)).astype(np.float32))
    array = open_states(tmp_path / "list.npy")
    table = pl.DataFrame(
        {
            "row": range(8),
            "split": ["train", "id", "train", "id", "train", "train", "id", "train"],
            "subset": [None] * 8,
            "prompt": [0, 0, 1, 0, 0, 1, 2, 0],
            "model": [None] * 8,
            "gold": [1.0, 2.0, 0.5, 1.5, 3.0, 0.25, 4.0, 2.0],
        },
        schema=ROWS,
    )
    empty = pl.DataFrame(schema={"source": pl.String, "row": pl.Int64, "split": pl.String,
                                 "reason": pl.String, "detail": pl.String})  # fmt: skip
    rows = Rows(table, empty, ["a", "b", "c"], None, None, "")
    result = lint(rows, array, scan(array))
    row = result.rows["row"].to_list()
    assert row[:5] == [0, 4, 7, 2, 5]
    assert sorted(row[5:7]) == [
        1,
        3,
    ]  # the only prompt of "id" with a pair was sorted, so it is shuffled
    assert row[7] == 6
    sizes = result.rows.group_by("group", maintain_order=True).len()["len"].to_list()
    assert sizes == [3, 2, 2, 1]
    assert [(one.split, one.check, one.count) for one in result.findings] == [
        ("id", "sorted by gold", 1), ("id", "one response", 1),
    ]  # fmt: skip
    states = np.load(tmp_path / "list.npy")
    states[7] = states[0]
    states[1] = states[0]  # equal, but in another split
    np.save(tmp_path / "list.npy", states)
    result = lint(rows, array, scan(array))
    assert result.exclusions.select("row", "split", "reason").rows() == [(7, "train", "duplicate")]
