"""Grouping runs into packs that are trained together. No result depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from embrm.core.specs import content_id
from embrm.sweeps.spec import Run

_LINEAR = 128
"""Most linear heads in a pack. With this many, reading the states takes much less time than the
products."""

_COLUMNS = 512
"""Most columns of the first product of a pack of MLPs or adapters, for the same reason."""

_FIRST = 8
"""Most runs in the first pack, which is small so that the first results come soon."""

_MOVING = 64
"""Number of columns whose product takes as long as reading a minibatch's states."""

_REGULARIZED = 6
"""Approximate cost of a run with a regularizer of token rows, in multiples of a run without."""

_GPU = 8
"""Factor by which packs are larger on a GPU."""


@dataclass(frozen=True)
class Pack:
    """Runs that are trained together, with equal state, pairs and `TrainSpec.pack_key`."""

    runs: tuple[Run, ...]

    @property
    def pack_id(self) -> str:
        """The name of the folder with its part of the results."""
        return content_id([run.run_id for run in self.runs])


def packs(todo: Sequence[Run], *, jobs: int, training_pairs: int, gpu: bool) -> list[Pack]:
    """Group runs into packs, the costliest first; in a long sweep a small pack comes before them.

    No pack is so large that a worker would have nothing to do.
    """
    groups: dict[Any, list[Run]] = {}
    for run in todo:
        spec = run.spec
        groups.setdefault((spec.data_key(), spec.members, spec.pack_key()), []).append(run)

    def cost(pack: Pack, runs: int | None = None) -> float:
        """Relative cost of a pack, or of its first `runs`: columns times pairs times epochs."""
        some = pack.runs[:runs]
        spec = some[0].spec
        if spec.learner:
            return spec.learner.passes * (spec.pairs_limit or training_pairs) * _MOVING
        columns = _columns(some[0]) * len(some)
        columns *= spec.members * (_REGULARIZED if spec.active_regularizer else 1)
        epochs = max(run.spec.epochs for run in some)
        return epochs * (spec.pairs_limit or training_pairs) * (_MOVING + columns)

    found: list[Pack] = []
    share = -(-len(todo) // jobs)
    for group in groups.values():
        width = max(1, min(_width(group[0]) * (_GPU if gpu else 1), share))
        found += [Pack(tuple(group[i : i + width])) for i in range(0, len(group), width)]
    if len(found) <= jobs:
        return sorted(found, key=cost, reverse=True)
    quick = min(found, key=lambda pack: cost(pack, _FIRST))
    found.remove(quick)
    first, rest = Pack(quick.runs[:_FIRST]), quick.runs[_FIRST:]
    found += [Pack(rest)] if rest else []
    return [first, *sorted(found, key=cost, reverse=True)]


def _columns(run: Run) -> int:
    """Columns that one run adds to the product with the states."""
    head = run.spec.head
    first = head.widths[0] if head.widths else 1
    return first + (head.adapter.width if head.adapter else 0)


def _width(run: Run) -> int:
    return max(1, _COLUMNS // _columns(run)) if _columns(run) > 1 else _LINEAR
