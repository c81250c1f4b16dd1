"""Tests of rows: each state gets its prompt, model and gold score; mismatches are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from embrm.adoption.arrays import StateArray, open_states
from embrm.adoption.rows import Order, Rows, from_grid, from_table
from embrm.core.errors import UserError


def states(folder: Path, shape: tuple[int, ...]) -> StateArray:
    np.save(folder / "states.npy", np.zeros(shape, np.float32))
    return open_states(folder / "states.npy")


def grid(array: StateArray, gold: np.ndarray, order: Order | None = None) -> Rows:
    return from_grid(array, gold, "digest", split="train", order=order, models=None)


GOLD = np.arange(12.0).reshape(4, 3)  # prompt n, response k: 3n + k


@pytest.mark.parametrize("order", [None, "prompts"])
@pytest.mark.parametrize("gold", [GOLD, GOLD[..., None], GOLD.T, GOLD.T[..., None]])
def test_prompts_may_be_the_first_axis(
    tmp_path: Path, gold: np.ndarray, order: Order | None
) -> None:
    rows = grid(states(tmp_path, (4, 3, 5)), gold, order)
    assert rows.grid == (4, 3)
    assert rows.order == "prompts"
    assert rows.table["row"].to_list() == [*range(12)]
    assert rows.table["prompt"].to_list() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rows.table["gold"].to_list() == [*range(12)]
    said = [(one.check, one.done) for one in rows.findings]
    inferred = [("axis order", "reported")] if order is None else []
    turned = [("axis order", "fixed")] if gold.shape[0] == 3 else []
    assert said == inferred + turned


@pytest.mark.parametrize("order", [None, "responses"])
@pytest.mark.parametrize("gold", [GOLD, GOLD.T, GOLD.T[..., None]])
def test_responses_may_be_the_first_axis(
    tmp_path: Path, gold: np.ndarray, order: Order | None
) -> None:
    rows = grid(states(tmp_path, (3, 4, 5)), gold, order)
    assert rows.grid == (4, 3)
    assert rows.order == "responses"
    assert rows.table["row"].to_list() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert rows.table["gold"].to_list() == [*range(12)]


def test_a_given_order_overrides_the_longer_axis(tmp_path: Path) -> None:
    rows = grid(states(tmp_path, (3, 4, 5)), GOLD.T, "prompts")
    assert rows.grid == (3, 4)
    assert rows.findings == ()


def test_equally_long_axes_need_the_order(tmp_path: Path) -> None:
    array, gold = states(tmp_path, (2, 2, 5)), np.array([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(UserError, match="set order = prompts or order = responses") as caught:
        grid(array, gold)
    assert "\n" not in str(caught.value)
    assert grid(array, gold, "prompts").table["gold"].to_list() == [1, 2, 3, 4]
    by_response = grid(array, gold, "responses").table
    assert by_response["gold"].to_list() == [1, 3, 2, 4]
    assert by_response["row"].to_list() == [0, 2, 1, 3]


@pytest.mark.parametrize("shape", [(4, 2), (12,), (4, 3, 2), (3, 4, 5), (1, 4, 3)])
def test_gold_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"its gold scores .* must have shape \(4, 3\) or \(3, 4\)"):
        grid(states(tmp_path, (4, 3, 5)), np.zeros(shape))


def test_models_belong_to_the_axis_of_responses(tmp_path: Path) -> None:
    array = states(tmp_path, (3, 4, 5))

    def named(models: list[str]) -> Rows:
        return from_grid(array, GOLD, "digest", split="x", order=None, models=models)

    assert named(["a", "b", "c"]).table["model"].to_list() == ["a", "b", "c"] * 4
    assert named(["a", "b", "c"]).sha256 != named(["a", "c", "b"]).sha256
    with pytest.raises(UserError, match="3 responses per prompt, but models has 4 lines"):
        named(["a", "b", "c", "d"])


def listed(folder: Path, table: dict[str, list[Any]], suffix: str, **options: Any) -> Rows:
    frame = pl.DataFrame(table, strict=False)
    path = folder / f"rows{suffix}"
    write = {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}
    write[suffix](path)
    array = states(folder, (options.pop("count", frame.height), 5))
    settings = {"columns": {}, "gold": None, "split": None} | options
    return from_table(array, path, **settings)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
def test_a_table_describes_the_rows(tmp_path: Path, suffix: str) -> None:
    rows = listed(
        tmp_path,
        {
            "prompt": ["hi", "hi", "ho", None],
            "model": ["m", None, "n", "m"],
            "gold": [1.5, float("nan"), 2.0, 3.0],
            "split": ["train", "train", "id", "id"],
            "domain": ["maths", None, "maths", "maths"],
        },
        suffix,
    )
    expected = [(0, "train", "maths", 0, "m", 1.5), (2, "id", "maths", 1, "n", 2.0)]
    assert rows.table.rows() == expected
    assert rows.prompts == ["hi", "ho"]
    assert rows.grid is None
    lost = rows.exclusions.select("row", "split", "reason").rows()
    assert lost in (
        [(1, "train", "nan_gold"), (3, "id", "missing_value")],
        [(1, "train", "missing_value"), (3, "id", "missing_value")],  # JSON has no NaN
    )
    assert [(one.done, one.count) for one in rows.findings] == [("excluded", 1)] * 2


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    table = {"prompt_id": [7, 7], "helpful": [1, 2], "split": ["a", "b"]}
    rows = listed(tmp_path, table, ".parquet", columns={"gold": "helpful"})
    assert rows.table.select("split", "gold").rows() == [("a", 1.0), ("b", 2.0)]
    assert rows.prompts == ["7"]
    rows = listed(
        tmp_path, table, ".parquet", columns={"gold": "helpful", "split": ""}, split="ood"
    )
    assert rows.table["split"].to_list() == ["ood", "ood"]
    rows = listed(tmp_path, table, ".parquet", columns={"gold": "helpful", "split": ""})
    assert rows.table["split"].to_list() == ["states", "states"]  # the array's file


def test_gold_may_be_an_array_beside_the_table(tmp_path: Path) -> None:
    table = {"prompt": ["a", "a", "b"], "gold": [9.0, 9.0, 9.0]}
    for shape in ((3,), (3, 1)):
        gold = np.array([1.0, np.nan, 3.0]).reshape(shape), "digest"
        rows = listed(tmp_path, table, ".csv", gold=gold)
        assert rows.table["gold"].to_list() == [1.0, 3.0]
        assert rows.exclusions["reason"].to_list() == ["nan_gold"]
    with pytest.raises(
        UserError, match=r"gold scores have shape \(2,\): the scores must have shape \(3,\)"
    ):
        listed(tmp_path, table, ".csv", gold=(np.zeros(2), "digest"))


def test_prompts_may_be_messages(tmp_path: Path) -> None:
    first, second = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "gold": 1}) + "\n" for p in (first, second, first))
    )
    rows = from_table(states(tmp_path, (3, 5)), tmp_path / "rows.jsonl", {}, None, split="train")
    assert rows.table["prompt"].to_list() == [0, 1, 0]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            {"prompt": ["a"], "gold": [1]},
            {"count": 2},
            "has 2 rows, but .* has 1: write one row per state",
        ),
        ({"prompt": ["a"]}, {}, r"no column gold \('prompt'\)"),
        ({"text": ["a"], "gold": [1]}, {}, "no column prompt or prompt_id"),
        ({"prompt": ["a"], "gold": [1], "split": ["x"]}, {"split": "y"}, "has a column split"),
        ({"prompt": ["a"], "gold": [1]}, {"columns": {"gold": "golden"}}, "did you mean 'gold'"),
        ({"prompt": ["a"], "gold": [1]}, {"columns": {"golden": "gold"}}, "no field 'golden'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path, table: dict[str, list[Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        listed(tmp_path, table, ".parquet", **options)
    assert "\n" not in str(caught.value)


def test_the_digest_depends_on_the_content_not_on_the_file_type(tmp_path: Path) -> None:
    table = {"prompt": ["a", "a", "b"], "gold": [1.0, 2.0, 3.0]}
    digests = {listed(tmp_path, table, suffix).sha256 for suffix in (".csv", ".parquet", ".jsonl")}
    assert len(digests) == 1
    other = {"prompt": ["a", "a", "c"], "gold": [1.0, 2.0, 3.0]}
    assert listed(tmp_path, other, ".csv").sha256 not in digests
    gold = np.array([1.0, 2.0, 3.5]), "digest"
    assert listed(tmp_path, table, ".csv", gold=gold).sha256 not in digests
