"""Read the results of a sweep or a fine-tune from its folder."""

import difflib
import json
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
        """Find the ledger row of a run by its id, the beginning of its id, or CONFIGURATION@SEED.

        Raises: UserError when no run or several runs match.
        """
        named = pl.concat_str("config", pl.lit("@"), "seed") == run
        rows = self.ledger.filter((pl.col("run_id").str.starts_with(run) & (run != "")) | named)
        if rows.height == 1:
            return rows.row(0, named=True)
        if rows.height:
            remedy = f"{rows.height} run ids begin with it, give more of the id"
        else:
            remedy = self._nearest_run(run)
        raise UserError(f"no run {run!r} in {self.folder}: {remedy}")

    def _nearest_run(self, run: str) -> str:
        """The remedy clause for the name of a run that does not exist."""
        seeds: dict[str, list[int]] = {}
        for config, seed in self.ledger.select("config", "seed").sort("config", "seed").rows():
            seeds.setdefault(config, []).append(seed)
        if run in seeds:
            named = ", ".join(f"{run}@{seed}" for seed in seeds[run])
            return f"it is a configuration, add a seed: {named}"
        config, at, seed = run.rpartition("@")
        config = config if at else run
        if config in seeds:
            return f"seeds of {config}: {', '.join(map(str, seeds[config]))}"
        of_grid = [name for name in seeds if name.startswith(f"{config}[")]
        if of_grid:
            return f"configurations of {config}: {listed(of_grid)}; add @SEED"
        close = difflib.get_close_matches(config, seeds, n=1, cutoff=0.5)
        if close:
            own = seeds[close[0]]
            number = seed if at and seed in map(str, own) else own[0]
            return f"did you mean '{close[0]}@{number}'?"
        config, (first, *_) = next(iter(seeds.items()))
        return f"name a run id or CONFIGURATION@SEED, such as '{config}@{first}'"


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

    The runs have the columns run_id, name (the configuration) and seed, and are sorted by name and
    seed. The baseline is that of the spec unless given. The notes say how many runs are left out.

    Raises: UserError when no run finished, or none of the baseline.
    """
    ledger = results.ledger.rename({"config": "name"})
    runs = ledger.filter(status="ok").select("run_id", "name", "seed").sort("name", "seed")
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
