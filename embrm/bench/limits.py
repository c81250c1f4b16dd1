"""Measure the peak rates of this machine: float32 matrix products and memory copies."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from embrm.bench.processes import measure

_REPEATS = 4
_ROUNDS = 3


@dataclass(frozen=True)
class Limits:
    """Peak rates on one thread and, in the fields that end with `_all`, on all cores.

    product: GFLOP/s of a float32 matrix product.
    copy: GB/s, bytes read plus bytes written, of copies into an existing buffer.
    All cores are used by one process per core or by one process with threads, whichever is faster.
    """

    product: float
    product_all: float
    copy: float
    copy_all: float

    def best(self, other: "Limits") -> "Limits":
        """The higher of two measurements, field by field."""
        return Limits(*map(max, *(vars(one).values() for one in (self, other))))


def limits(cores: int, side: int, copied: int) -> Limits:
    """Measure the limits. side: rows of the square matrices; copied: bytes of the buffer."""
    operations, moved = 2 * _REPEATS * side**3 / 1e9, 2 * _REPEATS * copied / 1e9

    def rate(prepare: Callable[[int], Callable[[], None]], size: int, work: float) -> list[float]:
        alone = measure(prepare, size, rounds=_ROUNDS).seconds
        each = measure(prepare, size, processes=cores, rounds=_ROUNDS).seconds
        threads = measure(prepare, size, threads=cores, rounds=_ROUNDS).seconds
        return [work / alone, max(cores * work / each, work / threads)]

    return Limits(*rate(_product, side, operations), *rate(_copy, copied, moved))


def _product(side: int) -> Callable[[], None]:
    a, b, out = torch.randn(side, side), torch.randn(side, side), torch.zeros(side, side)

    def work() -> None:
        for _ in range(_REPEATS):
            torch.mm(a, b, out=out)

    work()
    return work


def _copy(size: int) -> Callable[[], None]:
    here, there = torch.zeros(size // 4), torch.zeros(size // 4)

    def work() -> None:
        for _ in range(_REPEATS):
            there.copy_(here)

    work()
    return work
