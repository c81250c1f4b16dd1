"""Train runs in the calling process, without the workers and the results folder of a sweep: what
`embrm.train` and notebooks use."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from embrm.cache.reader import Cache
from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.results.weights import SavedRun, load_run
from embrm.sweeps.material import laid_out
from embrm.sweeps.pack_trainer import Trainer
from embrm.sweeps.packs import packs
from embrm.sweeps.prepare import check_sweep, pin
from embrm.sweeps.spec import Run, Selection, SweepSpec, configurations
from embrm.training.numerics import Numerics, begin_here, on_cpu


@dataclass(frozen=True)
class TrainedHere:
    """One trained run.

    row: the row that it would have in a sweep's ledger. curve: one row per epoch. saved: its
    weights, None where it diverged. selection: which pairs it was trained and validated on.
    """

    run: Run
    row: dict[str, Any]
    curve: pl.DataFrame
    saved: SavedRun | None
    selection: Selection


def train_here(
    cache: Cache,
    specs: Sequence[Mapping[str, Any]],
    *,
    train: Sequence[str] = ("train",),
    validation: float = 0.1,
    numerics: Numerics = "native",
) -> list[TrainedHere]:
    """Train and evaluate runs in this process, and return them in the order of `specs`.

    specs: one mapping per run, with keys of `RunSpec`, optionally with seed, data_seed (0 by
    default) and name. Runs are trained and measured by the same code as in a sweep's workers, so
    they have the same ids and the same bits, provided that this process can use the same numerics:
    see `begin_here`.
    train, validation: as in `SweepSpec`, the train splits and the share of their prompts that is
    held out for validation.

    Raises: UserError for an invalid key or value, and where the cache lacks what a run needs.
    """
    runs: list[Run] = []
    selection = None
    pairs = 0
    for index, values in enumerate(specs):
        prepared = _prepared(cache, index, dict(values), train, validation, numerics)
        runs += prepared.runs
        selection, pairs = prepared.selection, prepared.training_pairs
    if selection is None:
        raise UserError("specs is empty: give the keys of at least one run, such as {'loss': 'bt'}")
    distinct = {run.run_id: run for run in runs}
    gpu = not on_cpu(numerics)
    with (
        begin_here(numerics),
        tempfile.TemporaryDirectory() as name,
        laid_out(cache, selection, [*distinct.values()], Path(name)) as material,
    ):
        folder = Path(name)
        trainer = Trainer(material, numerics)
        for pack in packs([*distinct.values()], jobs=1, training_pairs=pairs, gpu=gpu):
            for file, content in trainer.run(pack).items():
                write_bytes(folder / file, content)
        rows = _rows(folder, "ledger")
        curves = _rows(folder, "curves")
        found = {
            run_id: _result(folder, run, rows, curves, selection)
            for run_id, run in distinct.items()
        }
    return [replace(found[run.run_id], run=run) for run in runs]


def _prepared(
    cache: Cache,
    index: int,
    values: dict[str, Any],
    train: Sequence[str],
    validation: float,
    numerics: Numerics,
) -> Any:
    where = f"specs[{index}]"
    if "grid" in values:
        raise UserError(
            f"{where}: grid = {values['grid']!r}: give the keys of one run, or use embrm.sweep"
        )
    if "match" in values:
        raise UserError(
            f"{where}: match = {values['match']!r}: a learning rate is chosen by embrm.sweep: use "
            "it, or give lr"
        )
    seed, data_seed = values.pop("seed", 0), values.pop("data_seed", 0)
    values.setdefault("name", f"run {index}")
    spec = SweepSpec.parse(
        {
            "baseline": values["name"],
            "runs": [values],
            "train": train,
            "validation": validation,
            "seeds": [seed],
            "data_seeds": [data_seed],
            "numerics": numerics,
        },
        where,
    )
    return check_sweep(spec, pin(configurations(spec, where), where), cache, where)


def _rows(folder: Path, table: str) -> pl.DataFrame:
    paths = sorted(folder.glob(f"parts/*/{table}.parquet"))
    return pl.concat([pl.read_parquet(path) for path in paths], how="diagonal")


def _result(
    folder: Path, run: Run, rows: pl.DataFrame, curves: pl.DataFrame, selection: Selection
) -> TrainedHere:
    own = pl.col("run_id") == run.run_id
    row = rows.filter(own).row(0, named=True)
    saved = load_run(folder, run.run_id) if row["status"] == "ok" else None
    drawn = selection.drawn(run.spec.data_seed)
    return TrainedHere(run, row, curves.filter(own).drop("run_id"), saved, drawn)
