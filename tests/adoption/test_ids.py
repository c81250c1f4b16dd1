"""Tests of ids: golden values, and no collisions."""

import numpy as np

from embrm.adoption.ids import combined_ids, hex_ids, text_ids


def test_ids_equal_golden_values() -> None:
    assert hex_ids(text_ids(["", "a"])).to_list() == ["e4a6a0577479b2b4", "40f89e395b66422f"]
    assert hex_ids(np.array([1, 2**64 - 1], np.uint64)).to_list() == ["0" * 15 + "1", "f" * 16]


def test_combined_ids_are_splitmix64() -> None:
    # The generator's first outputs from seed 0, whose states are multiples of its constant.
    known = ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]
    assert hex_ids(combined_ids(np.zeros(3, np.uint64), np.arange(1, 4))).to_list() == known


def test_combined_ids_are_distinct_and_not_symmetric() -> None:
    ids, others = np.meshgrid(text_ids(map(str, range(300))), np.arange(300))
    assert len(np.unique(combined_ids(ids.flatten(), others.flatten()))) == 90_000
    a, b = text_ids(["a"]), text_ids(["b"])
    assert combined_ids(a, b) != combined_ids(b, a)
