"""Peak memory of a group of processes, sampled with psutil while they work."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

_SAMPLE_SECONDS = 0.1
_PSS_EVERY = 10
"""PSS is read in every tenth sample only: the kernel walks all pages of a process to compute it,
which takes milliseconds per gigabyte."""


@dataclass
class Footprint:
    """Highest sum over all processes of the group at one time, in bytes.

    rss: resident memory, sampled every 0.1 s. A page that several processes map counts once for
    each of them.
    pss: proportional set size, sampled every second: a page that n processes map counts 1/n for
    each. 0 on systems other than Linux, which do not report it.
    """

    rss: int = 0
    pss: int = 0


@contextmanager
def watched(roots: Sequence[int]) -> Iterator[Footprint]:
    """Sample the processes with the ids `roots` and all their descendants until the block ends.

    A last sample is taken as the block ends, so even work shorter than the interval has one.
    """
    peak = Footprint()
    over = threading.Event()

    def watch() -> None:
        count = 0
        while not over.wait(_SAMPLE_SECONDS):
            count += 1
            _sample(roots, peak, pss=count % _PSS_EVERY == 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        _sample(roots, peak, pss=True)


def _sample(roots: Sequence[int], peak: Footprint, *, pss: bool) -> None:
    family = _family(roots)
    peak.rss = max(peak.rss, sum(map(_rss, family)))
    if pss:
        peak.pss = max(peak.pss, sum(map(_pss, family)))


def _family(roots: Sequence[int]) -> list[psutil.Process]:
    found = []
    for root in roots:
        try:
            process = psutil.Process(root)
            found += [process, *process.children(recursive=True)]
        except psutil.Error:  # it has ended
            continue
    return found


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _pss(process: psutil.Process) -> int:
    try:
        return int(getattr(process.memory_full_info(), "pss", 0))
    except psutil.Error:
        return 0
