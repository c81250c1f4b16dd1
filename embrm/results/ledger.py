"""Results of a sweep or a fine-tune, as they are read from its folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from embrm.cache.reader import Cache, open_cache
from embrm.core.errors import UserError, nearest
from embrm.data.scenarios import SCENARIOS
from embrm.sweeps.ledger import GEOMETRY_SCHEMA, read_table
from embrm.sweeps.spec import SweepSpec


@dataclass(frozen=True)
class Results:
    """The results of a sweep or a fine-tune. `embrm.sweeps.ledger` documents the tables."""

    folder: Path
    spec: SweepSpec
    cache_id: str
    cache: str
    """Path of the cache when the sweep ran."""
    finetuned: bool
    """Whether these are results of embrm finetune, whose weights are whole models."""
    leaked: dict[str, list[str]]
    """Evaluation split → ids of its prompts that also occur in the train splits."""
    environment: dict[str, Any]
    ledger: pl.DataFrame

    @property
    def evaluated(self) -> list[str]:
        """Evaluation splits, in the spec's order."""
        return [*(self.spec.evaluate or self.prompts["split"].unique().sort())]

    @property
    def scenarios(self) -> list[str]:
        """The evaluation splits that scenarios made of groups, the nearest to training first."""
        evaluated = self.evaluated if self.spec.scenarios else []
        return [name for name in SCENARIOS if name in evaluated]

    # Read on first use: outcomes grow with runs times prompts, and few callers need them.

    @cached_property
    def curves(self) -> pl.DataFrame:
        """One row per run and epoch."""
        return read_table(self.folder / "curves.parquet")

    @cached_property
    def prompts(self) -> pl.DataFrame:
        """One row per split, subset and prompt of the evaluation splits."""
        return read_table(self.folder / "prompts.parquet")

    @cached_property
    def outcomes(self) -> pl.DataFrame:
        """One row per run and evaluation split, with lists in the order of `prompts`."""
        return read_table(self.folder / "outcomes.parquet")

    @cached_property
    def geometry(self) -> pl.DataFrame:
        """One row per run and split, the training responses among the splits; empty for sweeps
        of old versions."""
        path = self.folder / "geometry.parquet"
        return read_table(path) if path.exists() else GEOMETRY_SCHEMA.to_frame()

    @cached_property
    def timings(self) -> pl.DataFrame:
        """Training, scoring and evaluation time of every run in seconds."""
        return read_table(self.folder / "timings.parquet")

    def find(self, run: str) -> dict[str, Any]:
        """Find a run's ledger row by its id, the beginning of its id, or CONFIGURATION@SEED.

        Raises: UserError when this sweep has no such run, or several.
        """
        named = pl.concat_str("config", pl.lit("@"), "seed") == run
        rows = self.ledger.filter((pl.col("run_id").str.starts_with(run) & (run != "")) | named)
        if rows.height == 1:
            return rows.row(0, named=True)
        seeds = self.ledger.filter(pl.col("config") == run)["seed"].sort().to_list()
        if rows.height:
            remedy = f"{rows.height} runs begin so: give more of the id"
        elif seeds:
            remedy = f"it is a configuration, add a seed: {', '.join(f'{run}@{s}' for s in seeds)}"
        else:
            config, seed = self.ledger.row(0, named=True)["config"], self.ledger["seed"][0]
            remedy = f"name a run id or CONFIGURATION@SEED, such as '{config}@{seed}'"
        raise UserError(f"no run {run!r} in {self.folder}: {remedy}")


def open_results(folder: Path) -> Results:
    """Open the results in `folder`. Tables other than the ledger are read when first used.

    Raises: UserError when there are no results, or a file is damaged.
    """
    try:
        header = json.loads((folder / "sweep.json").read_bytes())
        spec = SweepSpec.parse(header["spec"], str(folder / "sweep.json"))
        return Results(
            folder=folder,
            spec=spec,
            cache_id=header["cache_id"],
            cache=header["cache"],
            finetuned="finetune" in header,
            leaked=header["leaked"],
            environment=header["environment"],
            ledger=read_table(folder / "ledger.parquet"),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no sweep results in {folder}: run embrm sweep first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'sweep.json'} is damaged: run the sweep again, finished runs are kept"
        ) from None


def cache_of(results: Results, moved: Path | None) -> Cache:
    """Open the cache that a sweep was trained on, at its recorded path or at `moved`.

    Raises: UserError when there is none, or a cache with another id.
    """
    if moved is None and not Path(results.cache).is_dir():
        raise UserError(
            f"the sweep's cache was at {results.cache}, as seen from where it ran, and is not "
            "there: pass --cache"
        )
    cache = open_cache(moved or Path(results.cache))
    if cache.cache_id != results.cache_id:
        raise UserError(
            f"{cache.folder} is cache {cache.cache_id}, but the run was trained on "
            f"{results.cache_id}: pass its cache with --cache"
        )
    return cache


def finished_runs(results: Results, baseline: str | None) -> tuple[pl.DataFrame, str, list[str]]:
    """The runs that have weights: run_id, name (the configuration) and seed, sorted by name and
    seed.

    Also returns the name of the baseline (the spec's unless given), and notes on runs left out.

    Raises: UserError when no run finished, or none of the baseline.
    """
    ledger = results.ledger.rename({"config": "name"})
    runs = ledger.filter(status="ok").select("run_id", "name", "seed").sort("name", "seed")
    if runs.is_empty():
        raise UserError(f"all {ledger.height} runs of {results.folder} diverged: lower lr")
    reference = baseline or results.spec.baseline
    if reference not in runs["name"]:
        raise UserError(
            f"baseline = {reference!r} has no finished runs, name another with --baseline: "
            f"{nearest(reference, set(runs['name']))}"
        )
    diverged = ledger.height - runs.height
    note = f"{diverged} of {ledger.height} runs diverged and are left out"
    return runs, reference, [note] if diverged else []
