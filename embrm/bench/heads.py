"""Measure sweeps against training loops, scikit-learn and the machine's limits, for each head."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from embrm.bench.caches import synthetic
from embrm.bench.footprint import Footprint
from embrm.bench.limits import limits
from embrm.bench.loops import BATCH, SKLEARN_EPOCHS, logistic, tight_loop
from embrm.bench.processes import measure
from embrm.bench.sweeps import Swept, cores, swept
from embrm.core.progress import progress
from embrm.training.heads import HeadSpec

_VALIDATION = 0.1
_SPLITS = 6
_LOOP_RUNS = 2


@dataclass(frozen=True)
class Case:
    """A sweep of `runs` runs with this head, `epochs` epochs each."""

    head: HeadSpec
    runs: int
    epochs: int


CASES = (
    Case(HeadSpec(), 256, 20),
    Case(HeadSpec(kind="mlp", widths=(64,)), 32, 3),
    Case(HeadSpec(kind="mlp", widths=(256,)), 8, 2),
    Case(HeadSpec(kind="mlp", widths=(1024, 512)), 4, 1),
)


def measure_heads(
    folder: Path,
    *,
    cases: Sequence[Case] = CASES,
    pairs: int = 45_000,
    evaluation_pairs: int = 1_000,
    width: int = 2048,
    side: int = 2048,
    copied: int = 256 << 20,
) -> list[dict[str, Any]]:
    """Rows with the machine's limits, then one row for each head and way of training it.

    pairs: approximate number of training pairs; a tenth as many are used for validation, and each
    of six evaluation splits has `evaluation_pairs`.
    width: components of a state.
    side: of the square matrices, and copied: bytes, that the limits are measured with.

    "heads*pairs/s": training pairs times the heads trained on them, per second. "GFLOP/s" counts
    only `useful_operations`. Only the row "sweep, whole" includes reading the cache, validation,
    evaluation and writing results.
    """
    count = cores()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        splits = {"train": round(pairs / (1 - _VALIDATION))}
        splits |= {f"ood/{index}": evaluation_pairs for index in range(_SPLITS)}
        cache = synthetic(Path(name) / "cache", splits, width)
        # Limits are measured before and after the sweeps, and the better ones count, because other
        # programs may have used the machine during one of the measurements.
        best = limits(count, side, copied)
        rows: list[dict[str, Any]] = []
        for index, case in enumerate(cases):
            rows += _case(case, cache, Path(name) / f"sweep-{index}", count, width)
        best = best.best(limits(count, side, copied))
    for row in rows:
        if row["GFLOP/s"]:
            row["share of peak"] = row["GFLOP/s"] / best.product_all
    peaks = [
        _row("limit", "float32 product, one thread", gflops=best.product),
        _row("limit", f"float32 product, {count} cores", gflops=best.product_all),
        _row("limit", "copy, one thread", gigabytes=best.copy),
        _row("limit", f"copy, {count} cores", gigabytes=best.copy_all),
    ]
    return peaks + rows


def _case(case: Case, cache: Path, out: Path, count: int, width: int) -> list[dict[str, Any]]:
    done = swept(_spec(case), cache, out)
    pairs = done.results.ledger["train_pairs"][0]
    work = case.runs * case.epochs * pairs
    operations = useful_operations(case.head, width)
    loops = {}
    with progress(f"{case.head}: loops", 2, "ways") as bar:
        for way, processes, threads in (
            (f"loop, {count} threads", 1, count),
            (f"loop, {count} at once", count, 1),
        ):
            arguments = cache, _VALIDATION, case.head, _LOOP_RUNS
            loops[way] = measure(tight_loop, *arguments, processes=processes, threads=threads)
            bar.advance()
    speeds = {
        way: len(loop.values) * _LOOP_RUNS * pairs / loop.seconds for way, loop in loops.items()
    }
    fastest = max(speeds.values())

    def row(
        way: str, heads: int, seconds: float, speed: float, memory: Footprint | None = None
    ) -> dict[str, Any]:
        return _row(
            str(case.head), way, heads=heads, seconds=seconds, speed=speed,
            ratio=speed / fastest, gflops=speed * operations / 1e9, memory=memory,
        )  # fmt: skip

    rows = [
        row(way, _LOOP_RUNS * len(loop.values), loop.seconds, speeds[way], loop.memory)
        for way, loop in loops.items()
    ]
    rows.append(row("sweep, whole", case.runs, done.seconds, work / done.seconds, done.memory))
    training = float(done.results.timings["train_seconds"].sum()) / count
    rows.append(row("sweep, its training alone", case.runs, training, work / training))
    if case.head.kind == "linear":
        validated = 2 * done.results.ledger["validation_pairs"][0]
        seconds = _products_seconds(done, count, width, pairs, validated) * case.epochs
        rows.append(row("its bare products", case.runs, seconds, work / seconds))
        fit = measure(logistic, cache, _VALIDATION, threads=count)
        speed = SKLEARN_EPOCHS * pairs / fit.seconds
        way = f"scikit-learn, a fit as {SKLEARN_EPOCHS} epochs"
        rows.append(row(way, 1, fit.seconds, speed, fit.memory) | {"GFLOP/s": None})
    return rows


def _spec(case: Case) -> str:
    head = f'{{ kind = "{case.head.kind}", widths = {[*case.head.widths]} }}'
    rates = [1e-3 * 1.01**index for index in range(case.runs)]
    return f"""
baseline = "base"
seeds = [0]
validation = {_VALIDATION}
[defaults]
head = {head}
epochs = {case.epochs}
batch_pairs = {BATCH}
[[runs]]
name = "base"
lr = {rates[0]}
[[runs]]
name = "rate"
grid.l2 = {[1e-6 * (1 + index) for index in range(case.runs - 1)]}
"""


def _products_seconds(done: Swept, count: int, width: int, pairs: int, validated: int) -> float:
    """Seconds that the matrix products of one epoch of a linear sweep take, on all cores.

    They have the shapes of the sweep's packs: differences by weights, gradients by differences,
    and validation states by weights.
    """
    packs = done.results.timings.select("started", "pack_seconds", "pack_runs").unique()
    sizes = packs["pack_runs"].to_list()
    seconds = {
        size: measure(_products, size, width, pairs, validated, processes=count, rounds=2).seconds
        for size in set(sizes)
    }
    return sum(seconds[size] for size in sizes) / count


def _products(heads: int, width: int, pairs: int, validated: int) -> Callable[[], None]:
    D, W, G = torch.randn(BATCH, width), torch.randn(heads, width), torch.randn(heads, BATCH)
    rewards, gradient = torch.empty(BATCH, heads), torch.empty(heads, width)

    def work() -> None:
        for first in range(0, pairs, BATCH):
            size = min(BATCH, pairs - first)
            torch.mm(D[:size], W.T, out=rewards[:size])
            torch.mm(G[:, :size], D[:size], out=gradient)
        for first in range(0, validated, BATCH):
            size = min(BATCH, validated - first)
            torch.mm(D[:size], W.T, out=rewards[:size])

    work()
    return work


def useful_operations(head: HeadSpec, width: int) -> int:
    """Floating-point operations that training needs per pair and epoch.

    They are the forward products, the gradient of the weights, and the gradient of the input of
    every layer but the first. An MLP needs them for both responses, a linear head only once, for
    the difference of the two states.
    """
    layers = [a * b for a, b in pairwise([width, *head.widths, 1])]
    responses = 2 if head.widths else 1
    return responses * 2 * (2 * sum(layers) + sum(layers[1:]))


def _row(
    head: str,
    way: str,
    *,
    heads: int | None = None,
    seconds: float | None = None,
    speed: float | None = None,
    ratio: float | None = None,
    gflops: float | None = None,
    gigabytes: float | None = None,
    memory: Footprint | None = None,
) -> dict[str, Any]:
    return {
        "head": head,
        "way": way,
        "runs": heads,
        "seconds": seconds,
        "heads*pairs/s": speed and round(speed),
        "times the loop": ratio,
        "GFLOP/s": gflops,
        "share of peak": None,
        "GB/s": gigabytes,
        "peak RSS MB": memory and memory.rss / 1e6,
        "peak PSS MB": memory and memory.pss / 1e6,
    }
