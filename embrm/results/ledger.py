"""Read the results of a sweep or a fine-tune from its folder."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from embrm.cache.reader import Cache, open_cache
from embrm.core.errors import UserError, nearest
from embrm.core.text import listed
from embrm.data.scenarios import SCENARIOS
from embrm.sweeps.ledger import GEOMETRY_SCHEMA, read_table
from embrm.sweeps.spec import SweepSpec


@dataclass(frozen=True)
class Results:
    """The results of a sweep or a fine-tune. `embrm.sweeps.ledger` documents the columns of its
    tables, which are read when they are first used."""

    folder: Path
    spec: SweepSpec
    cache_id: str
    cache: str
    """Path of the cache at the time the sweep ran."""
    finetuned: bool
    """Whether these are results of `embrm finetune`, whose weights are those of whole models."""
    leaked: dict[str, list[str]]
    """Evaluation split → ids of its prompts that also occur in the train splits."""
    environment: dict[str, Any]
    ledger: pl.DataFrame

    @property
    def evaluated(self) -> list[str]:
        """The evaluation splits, in the order of the spec."""
        return [*(self.spec.evaluate or self.prompts["split"].unique().sort())]

    @property
    def scenarios(self) -> list[str]:
        """The evaluation splits that the spec's `scenarios` made of groups, the nearest to training
        first."""
        evaluated = self.evaluated if self.spec.scenarios else []
        return [name for name in SCENARIOS if name in evaluated]

    @property
    def overlaps(self) -> dict[str, float]:
        """Evaluation split → `Scenarios.overlap`, for the splits that scenarios made."""
        rule = self.spec.scenarios
        return {name: rule.overlap(name) for name in self.scenarios} if rule else {}

    @property
    def redivided(self) -> list[str]:
        """The evaluation splits whose prompts and responses differ between the data seeds."""
        return self.scenarios if len(self.spec.data_seeds) > 1 else []

    @cached_property
    def curves(self) -> pl.DataFrame:
        """Learning curves: one row per run and epoch."""
        return read_table(self.folder / "curves.parquet")

    @cached_property
    def prompts(self) -> pl.DataFrame:
        """One row per split, subset and prompt of the evaluation splits."""
        return read_table(self.folder / "prompts.parquet")

    @cached_property
    def outcomes(self) -> pl.DataFrame:
        """One row per run and evaluation split; its lists have one entry per row of `prompts` of
        that split."""
        return read_table(self.folder / "outcomes.parquet")

    @cached_property
    def geometry(self) -> pl.DataFrame:
        """One row per run and split, where the training responses count as a split; empty for
        sweeps of versions that did not measure it."""
        path = self.folder / "geometry.parquet"
        return read_table(path) if path.exists() else GEOMETRY_SCHEMA.to_frame()

    @cached_property
    def timings(self) -> pl.DataFrame:
        """Seconds that training, scoring and evaluating each run took."""
        return read_table(self.folder / "timings.parquet")

    def find(self, run: str) -> dict[str, Any]:
        """Find the ledger row of a run by its id, the beginning of its id, or its name.

        The name is CONFIGURATION@SEED, or CONFIGURATION@SEED/DATASEED for a data seed other than 0.

        Raises: UserError when no run or several runs match.
        """
        ledger = with_data_seed(self.ledger).sort("data_seed", "seed", maintain_order=True)
        names = pl.Series([run_name(row) for row in ledger.iter_rows(named=True)], dtype=pl.String)
        found = ledger["run_id"].str.starts_with(run) & (run != "") | (names == run)
        rows = self.ledger.filter(pl.col("run_id").is_in(ledger["run_id"].filter(found).implode()))
        if rows.height == 1:
            return rows.row(0, named=True)
        if rows.height:
            remedy = f"{rows.height} run ids begin with it, give more of the id"
        else:
            remedy = self._nearest_run(run)
        raise UserError(f"no run {run!r} in {self.folder}: {remedy}")

    def _nearest_run(self, run: str) -> str:
        """The remedy clause for the name of a run that does not exist."""
        ledger = with_data_seed(self.ledger).sort("config", "data_seed", "seed")
        names: dict[str, list[str]] = {}
        for row in ledger.select("config", "seed", "data_seed").iter_rows(named=True):
            names.setdefault(row["config"], []).append(run_name(row))
        if run in names:
            return f"it is a configuration, add a seed: {', '.join(names[run])}"
        config, at, seed = run.rpartition("@")
        config = config if at else run
        if config in names:
            known = (name.rpartition("@")[2] for name in names[config])
            return f"seeds of {config}: {', '.join(known)}"
        of_grid = [name for name in names if name.startswith(f"{config}[")]
        if of_grid:
            return f"configurations of {config}: {listed(of_grid)}; add @SEED"
        close = difflib.get_close_matches(config, names, n=1, cutoff=0.5)
        if close:
            own = names[close[0]]
            wanted = f"{close[0]}@{seed}"
            return f"did you mean '{wanted if at and wanted in own else own[0]}'?"
        return f"name a run id or CONFIGURATION@SEED, such as '{next(iter(names.values()))[0]}'"


def run_name(row: Mapping[str, Any]) -> str:
    """CONFIGURATION@SEED of a row of a ledger, with /DATASEED unless the data seed is 0."""
    data_seed = row.get("data_seed") or 0
    return f"{row['config']}@{row['seed']}" + (f"/{data_seed}" if data_seed else "")


def with_data_seed(ledger: pl.DataFrame) -> pl.DataFrame:
    """Add the column data_seed where a ledger lacks it, because all its runs have data seed 0."""
    if "data_seed" in ledger.columns:
        return ledger
    return ledger.with_columns(data_seed=pl.lit(0, pl.Int64))


def open_results(folder: Path) -> Results:
    """Open the results in `folder`. Tables other than the ledger are read when first used.

    Raises: UserError when the folder has no results, or a file is damaged.
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
        raise UserError(_no_results(folder)) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'sweep.json'} is damaged: run the sweep again, finished runs are kept"
        ) from None


def _no_results(folder: Path) -> str:
    """What is at `folder` instead of results, and where they are."""
    own = folder.with_suffix("")
    if folder.suffix == ".toml" and (own / "sweep.json").exists():
        return f"{folder} is a spec; its results are in {own}: name that folder"
    if folder.suffix == ".toml" and folder.exists():
        return f"{folder} is a spec without results: run embrm sweep {folder} first"
    if (folder / "manifest.json").exists():
        return f"{folder} is a cache: name the results folder of a sweep on it, such as sweeps/NAME"
    return f"no sweep results in {folder}: run embrm sweep first"


def cache_of(results: Results, moved: Path | None) -> Cache:
    """Open the cache that a sweep was trained on, at its recorded path or at `moved`.

    Raises: UserError when there is no cache, or it has another id.
    """
    if moved is None and not Path(results.cache).is_dir():
        raise UserError(
            f"the sweep's cache is not at {results.cache}, its path when the sweep ran: "
            "pass its path as cache (--cache)"
        )
    cache = open_cache(moved or Path(results.cache))
    if cache.cache_id != results.cache_id:
        raise UserError(
            f"{cache.folder} is cache {cache.cache_id}, but the run was trained on "
            f"{results.cache_id}: pass the path of that cache as cache (--cache)"
        )
    return cache


def finished_runs(results: Results, baseline: str | None) -> tuple[pl.DataFrame, str, list[str]]:
    """Return the runs that have weights, the name of the baseline, and notes for the reader.

    The runs have the columns run_id, name (the configuration), data_seed and seed, and are sorted
    by the last three. The baseline is that of the spec unless given. The notes say how many runs
    are left out.

    Raises: UserError when no run finished, or none of the baseline.
    """
    ledger = with_data_seed(results.ledger).rename({"config": "name"})
    keys = ("name", "data_seed", "seed")
    runs = ledger.filter(status="ok").select("run_id", *keys).sort(keys)
    if runs.is_empty():
        raise UserError(f"all {ledger.height} runs of {results.folder} diverged: lower lr")
    reference = baseline or results.spec.baseline
    if reference not in runs["name"]:
        raise UserError(
            f"baseline = {reference!r} has no finished runs, choose another with baseline "
            "(--baseline): "
            f"{nearest(reference, set(runs['name']))}"
        )
    diverged = ledger.height - runs.height
    note = f"{diverged} of {ledger.height} runs diverged and are left out"
    return runs, reference, [note] if diverged else []
