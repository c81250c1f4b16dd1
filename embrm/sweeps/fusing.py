"""Which runs are trained together, and in which order. Results depend on neither."""

from collections.abc import Sequence
from typing import Any

from embrm.sweeps.pack import Pack
from embrm.sweeps.spec import Run

_LINEAR = 128
"""Linear heads in a pack: so many that moving the states costs little beside multiplying them."""

_COLUMNS = 512
"""Columns of the first product of a pack of MLPs or adapters, for the same reason."""

_FIRST = 8
"""Runs of the first pack: small, so that something is finished soon."""

_MOVING = 64
"""Columns of a product that cost as much as moving a minibatch's states."""

_REGULARIZED = 6
"""Times as much as its reward costs a run whose regularizer reads token rows, about."""

_GPU = 8
"""Times as wide are the packs of a GPU."""


def packs(todo: Sequence[Run], *, jobs: int, training_pairs: int, gpu: bool) -> list[Pack]:
    """Runs that can share a pack: in a long sweep a small one first, then the largest.

    No pack is so wide that a worker would be left without one.
    """
    groups: dict[Any, list[Run]] = {}
    for run in todo:
        spec = run.spec
        groups.setdefault((spec.data_key(), spec.members, spec.pack_key()), []).append(run)

    def cost(pack: Pack, runs: int | None = None) -> float:
        """Of its first `runs`, or of all, in columns, pairs and epochs."""
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
