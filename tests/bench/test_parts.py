"""Parts of `embrm bench sweep` at tiny sizes: they run to the end, and their figures agree."""

from pathlib import Path

import pytest

from embrm.bench.caches import synthetic
from embrm.bench.growth import measure_growth
from embrm.bench.memory import measure_memory
from embrm.bench.reference import measure_reference
from embrm.bench.run import measure_sweep
from embrm.bench.whole import measure_whole
from embrm.core.errors import UserError


@pytest.mark.slow
def test_the_reference_and_the_sweeps_learn_the_same_preferences(tmp_path: Path) -> None:
    rows = measure_reference(
        tmp_path, pairs=3000, width=16, epochs=6, protocol_seeds=1, heads=("linear", "mlp 64")
    )
    assert [row["runs"] for row in rows] == [1, 256, 8]
    protocol = rows[0]
    for row in rows:
        assert 0.55 < row["held-out accuracy"] < 0.9
        ratio = protocol["seconds a run"] / row["seconds a run"]
        assert row["times faster"] == pytest.approx(ratio)
        reached = row["held-out accuracy"] >= protocol["held-out accuracy"]
        assert row["reaches the protocol"] == reached
    assert 0 < protocol["to its best epoch"] <= protocol["seconds a run"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_reference_accepts_a_cache(tmp_path: Path) -> None:
    cache = synthetic(tmp_path / "cache", {"train": 400, "id": 10}, 8)
    rows = measure_reference(tmp_path, cache, epochs=1, protocol_seeds=1, heads=())
    assert [0 < row["held-out accuracy"] <= 1 for row in rows] == [True]
    assert [*tmp_path.iterdir()] == [cache]


@pytest.mark.slow
def test_growth_has_one_row_for_each_size(tmp_path: Path) -> None:
    rows = measure_growth(
        tmp_path, runs=(1, 2), mlp_runs=(1,), pairs=(50, 200), widths=(8,), middle=(2, 100, 8)
    )
    assert [(row["grows"], row["runs"], row["pairs"]) for row in rows] == [
        ("runs", 1, 100),
        ("runs", 2, 100),
        ("runs", 1, 100),
        ("pairs", 2, 50),
        ("pairs", 2, 200),
        ("width", 2, 100),
    ]
    for row in rows:
        speed = row["runs"] * row["pairs"] / row["seconds"]
        assert row["heads*pairs/s"] == pytest.approx(speed, rel=1e-3)
        assert row["peak RSS MB"] > 50


@pytest.mark.slow
def test_a_whole_sweep_writes_its_first_pack_before_it_ends(tmp_path: Path) -> None:
    [row] = measure_whole(
        tmp_path, runs=30, pairs=300, evaluation_pairs=(20, 30), width=8, epochs=2
    )
    assert row["runs"] == 30
    assert 0 < row["training"] < row["seconds"]
    assert row["overhead ms a run"] > 0
    assert 0 < row["before training"] < row["to the first pack"] < row["seconds"]
    assert row["waiting"] >= 0
    assert row["results MB"] > 0
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_memory_is_measured_with_and_without_the_limit(tmp_path: Path) -> None:
    free, limited = measure_memory(
        tmp_path, pairs=15_000, width=8192, runs=3, epochs=1, memory=1_500_000_000
    )
    assert (free["memory"], limited["memory"]) == ("no limit", "1.5 GB")
    assert free["cache MB"] == limited["cache MB"] > 2 * 15_000 * 8192 * 2 / 1e6
    assert limited["times in memory"] == pytest.approx(limited["seconds"] / free["seconds"])
    assert limited["peak RSS MB"] < free["peak RSS MB"]


def test_a_part_that_does_not_exist_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="part 'head' does not exist: did you mean 'heads'"):
        next(measure_sweep(["growth", "head"], tmp_path))
