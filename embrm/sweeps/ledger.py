"""Results of a sweep on disk: part files as packs finish, tables compacted from them at the end.

    sweep.json                   spec, cache, leaked prompts, environment
    parts/<id>/*.parquet         tables of one finished pack; ledger.parquet is written last, and
                                 a folder without it counts for nothing
    ledger.parquet               one row a run of the current spec, sorted by run_id
    curves.parquet               one row a run and epoch
    prompts.parquet              one row a split, subset and prompt: what no run changes, sums over
                                 its pairs of weights and of "longer is better"
    outcomes.parquet             one row a run and split: lists of wins, ties, nll, brier (sums over
                                 a prompt's pairs) and tau, float32, in the order of the split's
                                 rows of prompts.parquet; tau is NaN where it is undefined
    geometry.parquet             one row a run and split, the training responses as one more split,
                                 called `training_name`: responses measured, `geometry.MEASURES`;
                                 no row of a run that an older embrm finished
    timings.parquet              the only file that differs between two executions
    weights/<run_id>.safetensors

Ledger columns: run_id, config_id, config, seed, cache_id, status ("ok" or "diverged"),
diverged_epoch, state, head, loss, spec (canonical JSON), bsr_effective (λ·B_ref), train_pairs,
validation_pairs, epochs (run), best_epoch, train_loss, validation_nll, validation_accuracy,
temperature, weights_sha256, numerics; then `metric@split` for each evaluation split, such as
`accuracy@ood/hhh`, and of ensembles `disagreement@split` and `disagreement_auroc@split`. Undefined
numbers are null there, never NaN: the temperature too, where none fits.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import torch

from embrm.cache.reader import Cache, open_cache
from embrm.core.errors import UserError, nearest
from embrm.core.files import write_atomic, write_bytes
from embrm.core.specs import canonical_json
from embrm.data.scenarios import SCENARIOS
from embrm.metrics.accuracy import OUTCOMES
from embrm.metrics.geometry import MEASURES
from embrm.sweeps.spec import Run, RunSpec, SweepSpec
from embrm.training.ensembles import Combination, Reference
from embrm.training.heads import REWARDS, Parameters, Preprocess

FORMAT = "embrm-head 1"
"""Of a weights file that holds a head."""

REWARDS_FORMAT = "embrm-rewards 1"
"""Of one that holds rewards of the cache's responses, for want of weights."""

MODEL_FORMAT = "embrm-model 1"
"""Of one that holds a fine-tuned model."""

TABLES = ("curves", "outcomes", "geometry", "timings", "ledger")
"""Tables of a part, in the order they are written."""

OUTCOMES_SCHEMA = pl.Schema(
    {
        "run_id": pl.String(),
        "split": pl.String(),
        **dict.fromkeys(OUTCOMES, pl.List(pl.Float32())),
    }
)

GEOMETRY_SCHEMA = pl.Schema(
    {
        "run_id": pl.String(),
        "split": pl.String(),
        "responses": pl.Int64(),
        **dict.fromkeys(MEASURES, pl.Float64()),
    }
)

_SORT = {
    "curves": ["run_id", "epoch"],
    "geometry": ["run_id", "split"],
    "timings": ["run_id"],
    "ledger": ["run_id"],
}
_CELLS = 1 << 22
"""Runs times prompts whose outcomes are compacted at once: 80 MiB."""

_PREPROCESS = "preprocess."
_REFERENCE = "reference."


@dataclass(frozen=True)
class Results:
    """What a sweep has found. Tables as this module's documentation says."""

    folder: Path
    spec: SweepSpec
    cache_id: str
    cache: str
    """Where the cache was when the sweep ran."""
    finetuned: bool
    """Whether its weights are whole models, of embrm finetune."""
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
        """Those of them that groups were divided into, the nearest to training first."""
        evaluated = self.evaluated if self.spec.scenarios else []
        return [name for name in SCENARIOS if name in evaluated]

    # Read when asked for: outcomes grow with runs times prompts, and few callers want them.

    @cached_property
    def curves(self) -> pl.DataFrame:
        """One row a run and epoch."""
        return _read(self.folder / "curves.parquet")

    @cached_property
    def prompts(self) -> pl.DataFrame:
        """One row a split, subset and prompt of the evaluation splits."""
        return _read(self.folder / "prompts.parquet")

    @cached_property
    def outcomes(self) -> pl.DataFrame:
        """One row a run and evaluation split, with lists in the order of `prompts`."""
        return _read(self.folder / "outcomes.parquet")

    @cached_property
    def geometry(self) -> pl.DataFrame:
        """One row a run and split, the training responses among them; none of an older sweep."""
        path = self.folder / "geometry.parquet"
        return _read(path) if path.exists() else GEOMETRY_SCHEMA.to_frame()

    @cached_property
    def timings(self) -> pl.DataFrame:
        """Seconds of every run."""
        return _read(self.folder / "timings.parquet")

    def find(self, run: str) -> dict[str, Any]:
        """The ledger row of a run: by its id, the beginning of one, or CONFIGURATION@SEED.

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
    """Read a sweep's results. Raises: UserError when there are none, or a file is damaged; the
    tables beside the ledger when they are first asked for."""
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
            ledger=_read(folder / "ledger.parquet"),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no sweep results in {folder}: run embrm sweep first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder / 'sweep.json'} is damaged: run the sweep again, finished runs are kept"
        ) from None


def cache_of(results: Results, moved: Path | None) -> Cache:
    """The cache a sweep was made on: where it was then, or at `moved`.

    Raises: UserError when it is not there, or is another one.
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
    """run_id, name (the configuration) and seed of the runs that have weights, sorted by the two;
    the baseline, the spec's unless given; and a note on the runs that have none.

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


@dataclass(frozen=True)
class SavedRun:
    """A stored head, or several, or the rewards of what has no weights: score states with
    `embrm.training.heads.score`, and make one reward of theirs with `combination`."""

    run_id: str
    spec: RunSpec
    cache_id: str
    parameters: Parameters
    preprocess: Preprocess
    combination: Combination


def load_run(folder: Path, run_id: str) -> SavedRun:
    """Read a run's weights. Raises: UserError when they are missing, damaged or diverged."""
    path = folder / "weights" / f"{run_id}.safetensors"
    if not path.is_file():
        row = open_results(folder).find(run_id)
        raise UserError(
            f"run {run_id!r} ({row['status']}) has no weights in {folder}: take another"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["embrm"])
            # Before tensors are read: they may be a whole model's.
            if header["format"] not in (FORMAT, REWARDS_FORMAT):
                raise UserError(
                    f"{path} has format {header['format']!r}, not that of a sweep's head: of a "
                    "fine-tuned model rewards come from embrm score"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is damaged: delete it and its sweep's parts folder, and run the sweep again"
        ) from None
    mean, scale = (tensors.pop(_PREPROCESS + name, None) for name in ("mean", "scale"))
    means, sds = (tensors.pop(_REFERENCE + name, None) for name in ("mean", "sd"))
    reference = None if means is None or sds is None else Reference(means, sds)
    spec = RunSpec.parse(header["run"], str(path))
    return SavedRun(
        run_id=run_id,
        spec=spec,
        cache_id=header["cache_id"],
        parameters=tensors,
        preprocess=Preprocess(mean, scale),
        combination=Combination(spec.combine, spec.penalty, reference),
    )


def weights_file(
    run: Run,
    cache_id: str,
    parameters: Parameters,
    preprocess: Preprocess,
    reference: Reference | None = None,
) -> tuple[bytes, str]:
    """The bytes of a run's safetensors file, and the digest of its tensors, header excluded.

    reference: of members that are not simply averaged.
    """
    tensors = dict(parameters)
    if preprocess.mean is not None and preprocess.scale is not None:
        tensors[_PREPROCESS + "mean"] = preprocess.mean
        tensors[_PREPROCESS + "scale"] = preprocess.scale
    if reference is not None:
        tensors[_REFERENCE + "mean"] = reference.mean
        tensors[_REFERENCE + "sd"] = reference.sd
    kind = REWARDS_FORMAT if REWARDS in parameters else FORMAT
    header = {"format": kind, "cache_id": cache_id, "run": run.spec.model_dump(mode="json")}
    # One key: the library writes metadata in no fixed order.
    content = safetensors.torch.save(tensors, metadata={"embrm": canonical_json(header)})
    return content, tensors_digest(tensors)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous().numpy()
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def parquet(table: pl.DataFrame) -> bytes:
    """`table` as Parquet; equal tables give equal bytes."""
    stream = io.BytesIO()
    table.rechunk().write_parquet(stream, compression="zstd", row_group_size=1 << 18)
    return stream.getvalue()


def training_name(splits: Sequence[str]) -> str:
    """What geometry.parquet calls the responses that are trained on: no evaluated split's name."""
    return " + ".join(sorted(splits))


def finished(folder: Path) -> dict[str, Path]:
    """Every finished run, whatever spec it was made for: run_id → its part folder.

    A run that ended well but whose weights are gone is not finished.
    """
    stored = {path.stem for path in folder.glob("weights/*.safetensors")}
    return {
        run_id: path.parent
        for path in sorted(folder.glob("parts/*/ledger.parquet"))
        for run_id, status in _read(path, ["run_id", "status"]).rows()
        if status != "ok" or run_id in stored
    }


def write_results(
    folder: Path,
    spec: SweepSpec,
    found: Sequence[Run],
    evaluate: Sequence[str],
    header: dict[str, Any],
    prompts: pl.DataFrame,
) -> None:
    """Compact the parts into the tables of the runs `found`, and write sweep.json.

    prompts: split and the columns of `accuracy.PROMPTS`, those of a split in the order of
        `accuracy.EvaluationSplit`, in which the parts hold outcomes.
    Runs that are not finished are left out; so are finished runs the spec no longer has, whose
    parts stay on disk, and splits that are not in `evaluate`. With no finished run nothing is
    written. The bytes depend on the runs, not on the parts they came in.
    """
    parts = finished(folder)
    done = {run.run_id: run.name for run in found if run.run_id in parts}
    seeds = {run.run_id: run.spec.seed for run in found}
    if not done:
        return
    prompts = prompts.filter(pl.col("split").is_in(evaluate)).sort("split", maintain_order=True)
    write_bytes(folder / "prompts.parquet", parquet(prompts))
    # Runs of a pack share their seed: so ordered, few parts are read for more than one row group.
    part_of = {run_id: parts[run_id] for run_id in sorted(done, key=lambda run: (seeds[run], run))}
    runs_at_once = max(1, _CELLS // max(1, prompts.height))
    write_atomic(
        folder / "outcomes.parquet",
        lambda stream: _write_outcomes(stream, part_of, evaluate, runs_at_once),
    )
    for name, order in _SORT.items():
        table = _gather(part_of, name).sort(order)
        if name == "geometry":
            table = table.filter(pl.col("split").is_in([*evaluate, training_name(spec.train)]))
        if name == "ledger":
            fixed = [column for column in table.columns if "@" not in column]
            metrics = sorted(c for c in table.columns if c.partition("@")[2] in evaluate)
            names = pl.col("run_id").replace_strict(done, return_dtype=pl.String)
            table = table.select(*fixed, *metrics).with_columns(config=names)
        write_bytes(folder / f"{name}.parquet", parquet(table))
    content = canonical_json({**header, "spec": spec.model_dump(mode="json")})
    write_bytes(folder / "sweep.json", content.encode())


def _write_outcomes(
    stream: IO[bytes], part_of: Mapping[str, Path], evaluate: Sequence[str], runs_at_once: int
) -> None:
    """Runs in the order of `part_of`, so many a row group: a sweep's do not fit in memory.

    A part is read again for each row group that one of its runs is in.
    """
    lists = {name: f"{name}.list.element" for name in OUTCOMES}
    few = ("wins", "ties")  # of few values, where pairs have no weights; all others are spread
    schema = pa.schema(
        {
            "run_id": pa.string(),
            "split": pa.string(),
            **dict.fromkeys(OUTCOMES, pa.list_(pa.float32())),
        }
    )
    with pq.ParquetWriter(
        stream,
        schema,
        compression="zstd",
        use_dictionary=["run_id", "split", *(lists[name] for name in few)],
        use_byte_stream_split=[lists[name] for name in OUTCOMES if name not in few],
    ) as writer:
        run_ids = list(part_of)
        for start in range(0, len(run_ids), runs_at_once):
            own = {run_id: part_of[run_id] for run_id in run_ids[start : start + runs_at_once]}
            table = _gather(own, "outcomes").filter(pl.col("split").is_in(evaluate))
            arrow = table.sort("run_id", "split").rechunk().to_arrow()
            writer.write_table(arrow.cast(schema), row_group_size=max(1, len(arrow)))


def _gather(part_of: Mapping[str, Path], name: str) -> pl.DataFrame:
    """The rows of runs in the parts' tables of one name."""
    by_part: dict[Path, list[str]] = {}
    for run_id, part in part_of.items():
        by_part.setdefault(part, []).append(run_id)
    tables = [
        _read(part / f"{name}.parquet").filter(pl.col("run_id").is_in(own))
        for part, own in by_part.items()
        if name != "geometry" or (part / "geometry.parquet").exists()  # not so in older parts
    ]
    return pl.concat(tables, how="diagonal") if tables else GEOMETRY_SCHEMA.to_frame()


def _read(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=columns)
    except (pl.exceptions.PolarsError, OSError):
        part = path.parent.parent.name == "parts"
        remedy = f"delete the folder {path.parent} and " if part else ""
        raise UserError(f"{path} is damaged: {remedy}run the sweep again") from None
