"""The training benchmark: every way of training, with the figures that can be checked."""

import torch

from embrm.sweep.bench import _products, measure_training
from embrm.train.heads import HeadSpec


def test_every_way_is_measured_and_compared_with_its_loop() -> None:
    threads = torch.get_num_threads()
    rows = {row["what"]: row for row in measure_training(runs=4, mlp_runs=2, pairs=600, width=16)}
    assert torch.get_num_threads() == threads
    assert all(row["GFLOP/s"] > 0 for what, row in rows.items() if what.startswith("limit"))
    for head, count in (("linear", 4), ("mlp 64", 2), ("mlp 256", 2)):
        loop, bank = rows[f"{head}: loop of single runs"], rows[f"{head}: bank of {count}"]
        assert loop["times the loop"] == 1
        ratio = bank["heads*pairs/s"] / loop["heads*pairs/s"]
        assert abs(bank["times the loop"] - ratio) < 0.02
    assert rows["mlp 1024-512: published protocol"]["heads*pairs/s"] > 0


def test_operations_of_a_linear_head_are_those_of_its_products() -> None:
    # Two responses, a multiplication and an addition each, forward and the weights' gradient.
    assert _products(HeadSpec(), 10) == 2 * 2 * 2 * 10
    # 10 -> 4 -> 1: both layers forward and for the weights, the second for its input too.
    assert _products(HeadSpec(kind="mlp", widths=(4,)), 10) == 2 * 2 * (2 * 44 + 4)
