"""Ids are told apart, and are the same everywhere."""

import numpy as np

from embrm.adoption.ids import hexadecimal, mixed, named


def test_ids_are_those_of_always() -> None:
    assert hexadecimal(named(["", "a"])).to_list() == ["e4a6a0577479b2b4", "40f89e395b66422f"]
    assert hexadecimal(np.array([1, 2**64 - 1], np.uint64)).to_list() == ["0" * 15 + "1", "f" * 16]


def test_mixing_is_splitmix64() -> None:
    # Its first outputs from seed 0: states are multiples of its constant.
    known = ["e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"]
    assert hexadecimal(mixed(np.zeros(3, np.uint64), np.arange(1, 4))).to_list() == known


def test_order_and_every_number_count() -> None:
    ids, others = np.meshgrid(named(map(str, range(300))), np.arange(300))
    assert len(np.unique(mixed(ids.flatten(), others.flatten()))) == 90_000
    a, b = named(["a"]), named(["b"])
    assert mixed(a, b) != mixed(b, a)
