"""The benchmark of sweeps by head measures every way of training, and its ratios agree."""

import pytest

from embrm.bench.heads import Case, measure_heads, useful_operations
from embrm.training.heads import HeadSpec

_MLP = HeadSpec(kind="mlp", widths=(4,))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return measure_heads(
        tmp_path_factory.mktemp("bench"),
        cases=(Case(HeadSpec(), 6, 2), Case(_MLP, 2, 2)),
        pairs=600,
        evaluation_pairs=20,
        width=16,
        side=64,
        copied=1 << 16,
    )


@pytest.mark.slow
def test_every_way_is_measured(rows: list[dict]) -> None:
    limits = [row for row in rows if row["head"] == "limit"]
    assert len(limits) == 4
    assert all((row["GFLOP/s"] or row["GB/s"]) > 0 for row in limits)
    ways = [[row["way"] for row in rows if row["head"] == head] for head in ("linear", "mlp 4")]
    assert ways[0][:4] == ways[1]
    assert len(ways[0]) == 6


@pytest.mark.slow
def test_ratios_are_to_the_faster_loop_and_to_the_peak_of_all_cores(
    rows: list[dict],
) -> None:
    [peak] = [row["GFLOP/s"] for row in rows if row["way"].endswith("cores") and row["GFLOP/s"]]
    for head, spec in (("linear", HeadSpec()), ("mlp 4", _MLP)):
        own = [row for row in rows if row["head"] == head]
        loop = max(row["heads*pairs/s"] for row in own if row["way"].startswith("loop"))
        for row in own:
            assert row["times the loop"] == pytest.approx(row["heads*pairs/s"] / loop, rel=1e-2)
            if row["GFLOP/s"]:
                operations = row["heads*pairs/s"] * useful_operations(spec, 16) / 1e9
                assert row["GFLOP/s"] == pytest.approx(operations, rel=1e-2)
                assert row["share of peak"] == pytest.approx(row["GFLOP/s"] / peak)
        whole, training = (row for row in own if row["way"].startswith("sweep"))
        assert whole["seconds"] > training["seconds"] > 0


@pytest.mark.slow
def test_memory_is_at_least_that_of_torch(rows: list[dict]) -> None:
    for row in rows:
        if row["peak RSS MB"] is not None:
            assert row["peak RSS MB"] >= row["peak PSS MB"] > 50  # torch alone takes more


def test_useful_operations_count_the_products_of_training() -> None:
    # One difference of states: forward and the gradient of the weights, each product with a
    # multiplication and an addition per weight.
    assert useful_operations(HeadSpec(), 10) == 2 * 2 * 10
    # 10 -> 4 -> 1 for two responses: forward and the gradient of the weights in both layers, and
    # the gradient of the input in the last layer only.
    assert useful_operations(_MLP, 10) == 2 * 2 * (2 * 44 + 4)
