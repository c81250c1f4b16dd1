"""Work in fresh processes has its own threads, environment, time, memory and errors."""

import os
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children

import pytest
import torch

from embrm.bench.processes import measure
from embrm.core.errors import UserError

_BYTES = 200_000_000


def _facts() -> Callable[[], tuple[int, str, str | None]]:
    return lambda: (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ.get("ODD"))


def _prepare_longer() -> Callable[[], float]:
    time.sleep(2)
    prepared = time.monotonic()  # the same clock in every process
    return lambda: prepared


def _fill(size: int) -> Callable[[], None]:
    def work() -> None:
        held = torch.zeros(size, dtype=torch.uint8).add_(1)
        time.sleep(1.5)
        del held

    return work


def _refuse() -> Callable[[], None]:
    def work() -> None:
        raise UserError("no")

    return work


def _die() -> Callable[[], None]:
    return lambda: os._exit(1)


def test_processes_have_the_requested_threads_and_environment() -> None:
    before = dict(os.environ)
    done = measure(_facts, processes=2, threads=3, settings={"ODD": "yes"})
    assert done.values == [(3, "3", "yes")] * 2
    assert dict(os.environ) == before


def test_preparation_is_not_timed() -> None:
    done = measure(_prepare_longer)
    assert 0 < done.seconds <= time.monotonic() - max(done.values)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports PSS")
def test_memory_is_summed_over_processes() -> None:
    none, one, two = (
        measure(_fill, size, processes=count).memory
        for size, count in ((1, 1), (_BYTES, 1), (_BYTES, 2))
    )
    for kind in ("rss", "pss"):
        small, large, both = (getattr(memory, kind) for memory in (none, one, two))
        assert large - small > 0.9 * _BYTES
        assert both - large > 0.9 * _BYTES


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_errors_reach_the_caller_and_no_process_is_left_behind(processes: int) -> None:
    with pytest.raises(UserError, match="no"):
        measure(_refuse, processes=processes)
    with pytest.raises(UserError, match="killed"):
        measure(_die, processes=processes)
    assert not active_children()
