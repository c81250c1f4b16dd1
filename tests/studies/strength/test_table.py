"""The report of preference strengths by decile: intervals, table, figure and Markdown page."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from embrm.studies.strength.measure import deciles
from embrm.studies.strength.table import (
    deciles_with_intervals,
    strength_figure,
    strength_report,
    strength_table,
)

MADE = {
    "rule": "strength in sample",
    "digest": "0123",
    "cache_id": "abc",
    "parameters": {"run_ids": ["a", "b"]},
}


def strengths(pairs: int = 1000, per_prompt: int = 1) -> pl.DataFrame:
    """Rows of a strengths table in which the share of right labels rises with strength from 0.4 to
    1."""
    random = np.random.default_rng(0)
    share = np.arange(pairs) / pairs
    right = random.random(pairs) < np.minimum(1, 0.4 + 0.7 * share)
    return pl.DataFrame(
        {
            "pair_id": [f"{pair:05}" for pair in range(pairs)],
            "prompt_id": [f"prompt {pair // per_prompt}" for pair in range(pairs)],
            "label": 1.0,
            "strength": share - 0.3,
            "spread": 0.1,
            "gold": np.where(right, 1.0, -1.0),
        }
    )


def test_intervals_of_agreement_match_those_of_a_binomial_share() -> None:
    found = deciles_with_intervals(strengths())
    assert found.drop("right_low", "right_high").equals(deciles(strengths()))
    known = found.drop_nulls("right_low")
    share = known["right"].to_numpy()
    half = 1.96 * np.sqrt(share * (1 - share) / 100)
    for end, wanted in (("right_low", share - half), ("right_high", share + half)):
        assert known[end].to_numpy() == pytest.approx(wanted, abs=0.035)
    # All labels of the strongest decile agree, so there is no interval.
    last = found.row(-1, named=True)
    assert (last["right"], last["right_low"]) == (1.0, None)


def test_intervals_are_wider_if_the_pairs_of_a_prompt_agree_with_each_other() -> None:
    found = deciles_with_intervals(strengths())
    independent = found["right_high"] - found["right_low"]
    table = strengths().with_columns(
        gold=pl.when(pl.int_range(1000) // 10 % 2 == 0).then(1.0).otherwise(-1.0),
        prompt_id=pl.format("prompt {}", pl.int_range(1000) // 10),
    )
    clustered = deciles_with_intervals(table)
    assert (clustered["right"] == 0.5).all()
    width = clustered["right_high"] - clustered["right_low"]
    assert width.min() > 2 * independent.drop_nulls().max()


def test_the_figure_shows_the_values_of_the_table() -> None:
    summary = deciles_with_intervals(strengths())
    agreement, strength = strength_figure(summary)().axes
    table = strength_table(summary)
    for axis, column, scale in ((agreement, 6, 1), (strength, 2, 1)):
        x, y = axis.lines[-1].get_data()
        assert x.tolist() == list(range(1, 11))
        cells = [float(row[column].split(" ")[0]) for row in table.rows]
        assert (scale * y).tolist() == pytest.approx(cells, abs=0.051)


@pytest.mark.parametrize("gold", [None, 0.0])
def test_without_gold_differences_only_strength_is_shown(gold: float | None) -> None:
    table = strengths(40).with_columns(gold=pl.lit(gold, dtype=pl.Float64))
    summary = deciles_with_intervals(table)
    assert [axis.get_title() for axis in strength_figure(summary)().axes] == [
        "Strength (reward difference)"
    ]
    assert {row[6] for row in strength_table(summary).rows} == {"n/a"}


def test_the_page_escapes_names_and_repeats_its_bytes(tmp_path: Path) -> None:
    names = ("strength.md", "figures/strength.png", "figures/strength.svg")
    for out in (tmp_path / "a", tmp_path / "b"):
        files = strength_report("a|b_$x$", strengths(50), MADE, out)
        assert files == tuple(out / name for name in names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    text = (tmp_path / "a" / "strength.md").read_text()
    assert text.startswith("# a\\|b\\_\\$x\\$\n")
    assert "strength in sample: 50 pairs, evaluated by the heads of 2 runs on cache abc;" in text
    assert "digest of the label table: 0123." in text
    assert "(figures/strength.png)" in text
