"""Run the parts of `embrm bench sweep`, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embrm.bench.growth import measure_growth
from embrm.bench.heads import measure_heads
from embrm.bench.memory import measure_memory
from embrm.bench.reference import measure_reference
from embrm.bench.whole import measure_whole
from embrm.core.errors import UserError, nearest


def measure_sweep(
    parts: Sequence[str], folder: Path, cache: Path | None = None, runs: int = 240
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Measure `parts`, or all if empty; yields each part's name and rows once it is measured.

    folder: where temporary caches go.
    cache: cache that the part "reference" is trained on; None for synthetic pairs.
    runs: runs of the part "whole"; five in six have a linear head.
    Raises: UserError for a part that does not exist.
    """
    known: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        "heads": measure_heads,
        "reference": partial(measure_reference, cache=cache),
        "growth": measure_growth,
        "whole": partial(measure_whole, runs=runs),
        "memory": measure_memory,
    }
    for part in parts:
        if part not in known:
            raise UserError(f"part {part!r} does not exist: {nearest(part, known)}")
    for part in parts or known:
        yield part, known[part](folder)
