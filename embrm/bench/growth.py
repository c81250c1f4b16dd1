"""Measure how time and memory of one worker grow with runs, pairs and the width of states."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embrm.bench.processes import measure
from embrm.core.progress import progress
from embrm.training.bank import train
from embrm.training.data import TrainingData
from embrm.training.heads import HeadSpec
from embrm.training.numerics import begin, settings
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore
from embrm.training.spec import TrainSpec

_LINEAR, _MLP = HeadSpec(), HeadSpec(kind="mlp", widths=(64,))
_BLOCK = 4096


def measure_growth(
    _folder: Path,
    *,
    runs: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    mlp_runs: Sequence[int] = (1, 4, 16),
    pairs: Sequence[int] = (5_000, 15_000, 45_000, 135_000, 400_000),
    widths: Sequence[int] = (256, 512, 1024, 2048, 4096),
    middle: tuple[int, int, int] = (64, 45_000, 2048),
) -> list[dict[str, Any]]:
    """One row per size: one pack trained on one thread, in a process set up like a sweep's worker.

    runs, mlp_runs: numbers of runs with linear heads and with MLPs of 64.
    middle: runs, pairs and width that are kept where another one grows.
    "seconds" are those of one epoch.
    """
    own_runs, own_pairs, own_width = middle
    cases = [
        *(("runs", _LINEAR, count, own_pairs, own_width) for count in runs),
        *(("runs", _MLP, count, own_pairs, own_width) for count in mlp_runs),
        *(("pairs", _LINEAR, own_runs, count, own_width) for count in pairs),
        *(("width", _LINEAR, own_runs, own_pairs, width) for width in widths),
    ]
    rows = []
    with progress("growth", len(cases), "sizes") as bar:
        for grows, head, *size in cases:
            count, given, width = size
            # Few pairs are trained for several epochs, to take long enough to be timed.
            epochs = max(1, own_pairs // given)
            done = measure(_pack, head, *size, epochs, settings=settings("native"))
            seconds = done.seconds / epochs
            rows.append(
                {
                    "grows": grows,
                    "head": str(head),
                    "runs": count,
                    "pairs": given,
                    "width": width,
                    "seconds": seconds,
                    "heads*pairs/s": round(count * given / seconds),
                    "peak RSS MB": done.memory.rss / 1e6,
                }
            )
            bar.advance()
    return rows


def _pack(head: HeadSpec, runs: int, pairs: int, width: int, epochs: int) -> Callable[[], Any]:
    begin("native")
    random = torch.Generator().manual_seed(0)
    block = torch.randn(min(_BLOCK, 2 * pairs), width, generator=random).bfloat16()
    # Values do not change the time of training, and drawing so many would take long.
    states = RowStore(block.repeat(-(-2 * pairs // len(block)), 1)[: 2 * pairs])
    chosen, ones = torch.arange(0, 2 * pairs, 2), torch.ones(pairs)
    none = torch.zeros(0)
    data = TrainingData(
        states,
        Pairs(chosen, chosen + 1, ones, ones, None),
        Pairs(none.long(), none.long(), none, none, None),
    )
    specs = [TrainSpec(head=head, lr=1e-3 * 1.001**i, epochs=epochs) for i in range(runs)]
    return partial(train, specs, data)
