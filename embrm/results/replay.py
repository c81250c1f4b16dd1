"""Replay: verify that results are reproducible by training stored runs again, one at a time, and
comparing weights and metrics with those that the sweep stored."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from embrm.core.errors import UserError
from embrm.core.interrupts import raised_interrupts
from embrm.core.progress import progress
from embrm.core.provenance import provenance
from embrm.core.sampling import evenly_spaced
from embrm.results.ledger import Results, cache_of, open_results
from embrm.results.weights import load_run
from embrm.sweeps.material import laid_out
from embrm.sweeps.packs import Pack
from embrm.sweeps.spec import Run, RunSpec
from embrm.sweeps.workers import modules_of, worker_count, workers
from embrm.training.extensions import check_recorded
from embrm.training.numerics import Numerics, settings, why_unavailable

TOLERANCE = 0.01
"""Largest acceptable difference of the metrics in `REPORTED` where the bits differ."""

REPORTED = ("accuracy", "nll", "nll_calibrated", "brier", "tau")
"""Metrics that `TOLERANCE` applies to. Weights are not among them, because an MLP trained with
another floating-point arithmetic reaches other weights of the same quality; nor is the mean reward,
because only differences of rewards are meaningful."""


@dataclass(frozen=True)
class Replayed:
    """The comparison of a stored run with its replay."""

    run_id: str
    config: str
    seed: int
    same_bits: bool
    """Whether the weights and every number of the ledger's row are equal to the last bit."""
    weights: float
    """‖new - stored‖/‖stored‖ over all weights; 0 where neither run has weights (both diverged)."""
    metric: str
    """The metric of `REPORTED` that differs most, as `name@split`; "" if none differs."""
    difference: float
    """The absolute difference of that metric; infinite where only one of the two has a value."""

    @property
    def within_tolerance(self) -> bool:
        """Whether every metric of `REPORTED` agrees within `TOLERANCE`."""
        return self.difference <= TOLERANCE


@dataclass(frozen=True)
class Replay:
    """The result of a replay.

    environment: settings and versions that differ from those of the sweep: name → (then, now).
    """

    runs: tuple[Replayed, ...]
    environment: dict[str, tuple[Any, Any]]


def replay(
    folder: Path,
    *,
    run: str | None = None,
    sample: int | None = None,
    cache: Path | None = None,
    jobs: int | None = None,
    memory: int | None = None,
) -> Replay:
    """Train runs of the sweep at `folder` again and compare them with the stored ones.

    Each run is trained alone, while a sweep trains several heads at once in a pack. The sweep's
    numerics are used, or "native" where this machine does not support them. Nothing in `folder`
    changes.

    run: replay only this run. sample: replay this many runs, evenly spaced in the ledger. By
        default all are replayed.
    cache: where the cache is now, if it has moved.
    jobs, memory: as for a sweep.

    Raises: UserError for an unknown run, another cache, or a run that fails now.
    """
    results = open_results(folder)
    rows = _chosen(results, run, sample)
    source = cache_of(results, cache)
    selection = results.spec.selection(results.cache_id)
    runs = [_run(row) for row in rows]
    packs = [Pack((run,)) for run in runs]
    wanted = results.spec.numerics
    mode = "native" if why_unavailable(wanted) else wanted
    jobs = worker_count(jobs, mode)
    with (
        raised_interrupts(),  # the temporary copy of the states is then removed
        workers(min(jobs, len(packs)), mode, modules_of(runs)) as running,
        tempfile.TemporaryDirectory() as name,
        laid_out(source, selection, runs, Path(name), memory=memory, jobs=jobs) as material,
        progress("replay", len(packs), "runs") as bar,
    ):
        out = Path(name)
        failures = running.run(material, packs, out=out, bar=bar)
        if failures:
            first, why = next(iter(failures.items()))
            raise UserError(f"{len(failures)} runs failed in the replay, first {first}: {why}")
        replayed = tuple(
            _compared(folder, out, row, _again(out, pack))
            for row, pack in zip(rows, packs, strict=True)
        )
    return Replay(replayed, _changes(results.environment, mode))


def _chosen(results: Results, run: str | None, sample: int | None) -> list[dict[str, Any]]:
    if run is not None:
        return [results.find(run)]
    ledger = results.ledger
    if sample is not None:
        if sample < 1:
            raise UserError(f"sample = {sample}: it must be at least 1")
        ledger = ledger[evenly_spaced(ledger.height, sample, nearest=True).tolist()]
    return ledger.to_dicts()


def _run(row: dict[str, Any]) -> Run:
    spec = RunSpec.stored(json.loads(row["spec"]), f"run {row['run_id']}")
    if row.get("extensions"):
        check_recorded(json.loads(row["extensions"]), spec.extensions())
    return Run(row["config"], row["run_id"], row["config_id"], spec)


def _again(out: Path, pack: Pack) -> dict[str, Any]:
    """The new ledger row of the only run in a pack."""
    table = pl.read_parquet(out / "parts" / pack.pack_id / "ledger.parquet")
    return table.row(0, named=True)


def _compared(folder: Path, out: Path, stored: dict[str, Any], now: dict[str, Any]) -> Replayed:
    # Not compared are the column `numerics`, which is a setting, and `data_seed`, which `spec` has
    # too and only some ledgers have. `now` has no metrics where the run diverged.
    compared = [key for key in stored if key not in ("numerics", "data_seed")]
    same = all(now.get(key) == stored[key] for key in compared)
    apart = {
        key: _apart(value, now.get(key))
        for key, value in stored.items()
        if key.partition("@")[0] in REPORTED
    }
    metric = max(apart, key=apart.__getitem__, default="")
    difference = apart.get(metric, 0.0)
    return Replayed(
        run_id=stored["run_id"],
        config=stored["config"],
        seed=stored["seed"],
        same_bits=same,
        weights=0.0 if same else _distance(folder, out, stored, now),
        metric=metric if difference else "",
        difference=difference,
    )


def _apart(stored: float | None, now: float | None) -> float:
    if stored is None or now is None:
        return 0.0 if stored is now else float("inf")
    return abs(stored - now)


def _distance(folder: Path, out: Path, stored: dict[str, Any], now: dict[str, Any]) -> float:
    if stored["weights_sha256"] is None or now["weights_sha256"] is None:
        return 0.0 if stored["weights_sha256"] is now["weights_sha256"] else float("inf")
    before, after = (
        torch.cat(
            [tensor.flatten() for tensor in load_run(where, stored["run_id"]).parameters.values()]
        )
        for where in (folder, out)
    )
    return float((after - before).norm() / before.norm())


def _changes(then: dict[str, Any], mode: Numerics) -> dict[str, tuple[Any, Any]]:
    before = _flat(then)
    after = _flat({**provenance(), "numerics": {"mode": mode, **settings(mode)}})
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{inner}" if inner else name: leaf for inner, leaf in nested}
    return flat
