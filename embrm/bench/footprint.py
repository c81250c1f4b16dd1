"""How much memory a family of processes takes, sampled while it works."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_RSS_SECONDS = 0.1
_PSS_EVERY = 10
"""The kernel walks all pages of a process to tell its PSS, which takes milliseconds a gigabyte."""


@dataclass
class Footprint:
    """Highest sums over all processes of a family at one time, in bytes.

    rss: resident pages, those of a shared file counted once a process that maps it; every 0.1 s.
    pss: every page counted once, shared ones in parts; every second. Both stay 0 off Linux.
    """

    rss: int = 0
    pss: int = 0


@contextmanager
def watched(roots: Sequence[int]) -> Iterator[Footprint]:
    """Watch the processes `roots` and all they start until the block is left."""
    peak = Footprint()
    over = threading.Event()

    def watch() -> None:
        count = 0
        while not over.wait(_RSS_SECONDS):
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


def _family(roots: Sequence[int]) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in _PROC.glob("[0-9]*/stat"):
        # The name, in parentheses, may hold anything; after it: state, parent.
        fields = _read(stat).rpartition(")")[2].split()
        if fields:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [*roots]
    for process in found:
        found += children.get(process, [])
    return found


def _rss(process: int) -> int:
    fields = _read(_PROC / str(process) / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _pss(process: int) -> int:
    for line in _read(_PROC / str(process) / "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: Path) -> str:
    """ "" for a process that has ended meanwhile, and off Linux."""
    try:
        return path.read_text()
    except OSError:
        return ""
