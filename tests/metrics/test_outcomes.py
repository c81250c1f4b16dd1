"""Stored outcomes of a split as matrices, in the order of the requested runs."""

import numpy as np
import polars as pl
import pytest

from embrm.core.errors import UserError
from embrm.metrics.accuracy import OUTCOMES, PROMPTS
from embrm.metrics.outcomes import Outcomes

PROMPT_TABLE = pl.DataFrame(
    [("s", "x", 4.0, 1.0, 2.0), ("s", "y", 2.0, 2.0, 0.0), (None, "x", 0.0, 0.0, 0.0)],
    schema=PROMPTS,
    orient="row",
)


def stored(**runs: list[float]) -> pl.DataFrame:
    """Runs whose wins are given; the other lists follow from them."""
    nan = float("nan")
    rows = [
        {
            "run_id": name,
            "wins": wins,
            "ties": [1.0, 0.0, 0.0],
            "nll": [2 * value for value in wins],
            "brier": [3 * value for value in wins],
            "tau": [nan, nan, wins[0] / 8],
        }
        for name, wins in runs.items()
    ]
    return pl.DataFrame(
        rows, schema={"run_id": pl.String} | dict.fromkeys(OUTCOMES, pl.List(pl.Float32))
    )


TWO = stored(b=[1.0, 2.0, 0.0], a=[3.0, 0.0, 0.0])


def test_ratios_by_hand() -> None:
    found = Outcomes.of(PROMPT_TABLE, TWO, ["a", "b"])
    expected = {
        "accuracy": ([[3, 1], [0, 2], [0, 0]], [[3, 3], [2, 2], [0, 0]]),
        "nll": ([[6, 2], [0, 4], [0, 0]], [[4], [2], [0]]),
        "brier": ([[9, 3], [0, 6], [0, 0]], [[4], [2], [0]]),
        "length_accuracy": ([[1], [2], [0]], [[2], [2], [0]]),
        "tau": ([[0, 0], [0, 0], [3 / 8, 1 / 8]], [[0, 0], [0, 0], [1, 1]]),
    }
    for metric, sides in expected.items():
        for side, numbers in zip(found.ratio(metric), sides, strict=True):
            assert side.dtype == np.float64
            np.testing.assert_array_equal(side, numbers)


def test_selecting_runs_and_prompts() -> None:
    found = Outcomes.of(PROMPT_TABLE, TWO, ["a", "b"])
    part = found.by([1]).on(PROMPT_TABLE["prompt_id"] == "x")
    assert part.prompts["subset"].to_list() == ["s", None]
    assert part.values["wins"].tolist() == [[1.0, 0.0]]
    assert found.values["wins"].shape == (2, 3)


@pytest.mark.parametrize("run_ids", [["a", "c"], ["short"]])
def test_tables_that_do_not_match_are_refused(run_ids: list[str]) -> None:
    outcomes = pl.concat([TWO, stored(short=[1.0, 1.0])])
    with pytest.raises(UserError, match="do not belong to the same sweep"):
        Outcomes.of(PROMPT_TABLE, outcomes, run_ids)
