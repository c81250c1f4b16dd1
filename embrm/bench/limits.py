"""What this machine can do at best: float32 products, and copies of memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from embrm.bench.processes import measure

_REPEATS = 4
_ROUNDS = 3


@dataclass(frozen=True)
class Limits:
    """product: GFLOP/s, copy: GB/s read and written into an existing buffer; each on one thread
    and on all cores, there by one process per core or by threads, whichever is faster."""

    product: float
    product_all: float
    copy: float
    copy_all: float

    def best(self, other: "Limits") -> "Limits":
        """The higher of two measurements."""
        return Limits(*map(max, *(vars(one).values() for one in (self, other))))


def limits(cores: int, side: int, copied: int) -> Limits:
    """Measure them. side: of the square matrices; copied: bytes."""
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
