"""The evaluation benchmark at tiny sizes: it runs to the end, and its figures agree."""

import pytest

from embrm.bench.evaluation import measure_evaluation


@pytest.mark.slow
def test_both_parts_are_compared_with_their_limits() -> None:
    parts = dict(
        measure_evaluation(
            prompts=20, responses=16, ns=(1, 4, 16), runs=10, splits=2, split_prompts=30,
            replicates=50,
        )
    )  # fmt: skip
    assert {name: [row["way"] for row in rows] for name, rows in parts.items()} == {
        "best of n": ["limit: the order", "best of n", "best of n, rewards of one decimal"],
        "bootstrap": ["limit: the products", "bootstrap"],
    }
    for limit, *ways in parts.values():
        assert limit["times the limit"] == 1
        for row in ways:
            ratio = row["seconds"] / limit["seconds"]
            assert row["times the limit"] == pytest.approx(ratio)
            assert row["core seconds"] > 0
            assert row["peak RSS MB"] > 20
