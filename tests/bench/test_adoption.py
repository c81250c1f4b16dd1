"""The adoption benchmark leaves no files behind, and its figures agree."""

from pathlib import Path

import pytest

from embrm.bench.adoption import measure_adoption


def test_adoption_is_compared_with_a_copy(tmp_path: Path) -> None:
    rows = measure_adoption(tmp_path, prompts=50, responses=3, width=64, rounds=1)
    copy, adopted = rows
    assert copy["share of the copy's speed"] == 1
    assert adopted["share of the copy's speed"] == pytest.approx(
        copy["seconds"] / adopted["seconds"]
    )
    for row in rows:
        assert row["array MB"] == pytest.approx(50 * 3 * 64 * 4 / 1e6, abs=1e-3)
        assert row["MB/s"] == pytest.approx(row["array MB"] / row["seconds"])
        assert row["peak RSS MB"] > 10
    assert not [*tmp_path.iterdir()]
