"""The results of a sweep on disk: parts, one per finished pack, and tables compacted from them.

    sweep.json                   spec, cache, leaked prompts, environment
    parts/<id>/*.parquet         tables of one finished pack; ledger.parquet is written last, and
                                 a folder without it is ignored
    ledger.parquet               one row per run of the current spec, sorted by run_id
    curves.parquet               one row per run and epoch
    prompts.parquet              one row per split, subset and prompt with what is the same for
                                 every run: sums over its pairs of weights and of "longer is better"
    outcomes.parquet             one row per run and split: lists of wins, ties, nll, brier (sums
                                 over a prompt's pairs) and tau, float32, in the order of the
                                 split's rows of prompts.parquet; tau is NaN where it is undefined
    geometry.parquet             one row per run and split: responses measured and
                                 `geometry.MEASURES`. The training responses are one more split,
                                 called `training_name`. Runs of older versions have no row
    timings.parquet              the only file that differs between two executions
    weights/<run_id>.safetensors

Ledger columns: run_id, config_id, config, seed, cache_id, status ("ok" or "diverged"),
diverged_epoch, state, head, loss, spec (canonical JSON), bsr_effective (λ·B_ref), train_pairs,
validation_pairs, epochs (run), best_epoch, train_loss, validation_nll, validation_accuracy,
temperature, weights_sha256, numerics; then `metric@split` for each evaluation split, such as
`accuracy@ood/hhh`, and of ensembles `disagreement@split` and `disagreement_auroc@split`. Undefined
numbers are null, never NaN; so is the temperature where none can be fitted.

Sweeps with data seeds have one more ledger column, data_seed. Where data seeds divide groups into
scenarios, prompts.parquet has it too, null for splits that are the same for all data seeds: a run
has outcomes on the rows of its own data seed only.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from embrm.core.errors import UserError
from embrm.core.files import write_atomic, write_bytes
from embrm.core.specs import canonical_json
from embrm.metrics.accuracy import OUTCOMES
from embrm.metrics.geometry import MEASURES
from embrm.sweeps.spec import Run, SweepSpec

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
"""Most outcomes (runs times prompts) that are compacted at once: 80 MiB."""


def parquet(table: pl.DataFrame) -> bytes:
    """A table as Parquet bytes; equal tables give equal bytes."""
    stream = io.BytesIO()
    table.rechunk().write_parquet(stream, compression="zstd", row_group_size=1 << 18)
    return stream.getvalue()


def training_name(splits: Sequence[str]) -> str:
    """The name of the training responses in geometry.parquet, which no evaluated split has."""
    return " + ".join(sorted(splits))


def finished(folder: Path) -> dict[str, Path]:
    """Find every finished run below `folder`, of any spec: run_id → the folder of its part.

    A run whose weights file is missing counts as finished only if it diverged.
    """
    stored = {path.stem for path in folder.glob("weights/*.safetensors")}
    return {
        run_id: path.parent
        for path in sorted(folder.glob("parts/*/ledger.parquet"))
        for run_id, status in read_table(path, ["run_id", "status"]).rows()
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

    prompts: split and the columns of `accuracy.PROMPTS`, with the prompts of a split in the order
        of `accuracy.EvaluationSplit`, which is that of the parts' outcomes.
    Left out are runs that are not finished, finished runs that the spec no longer has (their parts
    stay on disk), and splits that are not in `evaluate`. Without a finished run nothing is written.
    The bytes depend on the runs alone, not on the parts that they were trained in.
    """
    parts = finished(folder)
    done = {run.run_id: run.name for run in found if run.run_id in parts}
    seeds = {run.run_id: (run.spec.data_seed, run.spec.seed) for run in found}
    if not done:
        return
    prompts = prompts.filter(pl.col("split").is_in(evaluate)).sort("split", maintain_order=True)
    write_bytes(folder / "prompts.parquet", parquet(prompts))
    # Runs of a pack share their seed, so in this order few parts are read more than once.
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
            if "data_seed" in table.columns:
                table = table.with_columns(pl.col("data_seed").fill_null(0))
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
    """Write outcomes in row groups of `runs_at_once` runs, since a sweep's do not fit in memory.

    Runs are in the order of `part_of`. A part is read again for every row group with one of its
    runs.
    """
    lists = {name: f"{name}.list.element" for name in OUTCOMES}
    few = ("wins", "ties")  # Unless pairs have weights, the lists have few distinct values.
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
    """The rows of these runs in the parts' tables called `name`."""
    by_part: dict[Path, list[str]] = {}
    for run_id, part in part_of.items():
        by_part.setdefault(part, []).append(run_id)
    tables = [
        read_table(part / f"{name}.parquet").filter(pl.col("run_id").is_in(own))
        for part, own in by_part.items()
        if name != "geometry"
        or (part / "geometry.parquet").exists()  # Parts of older versions have none.
    ]
    return pl.concat(tables, how="diagonal") if tables else GEOMETRY_SCHEMA.to_frame()


def read_table(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """A Parquet table of results. Raises: UserError when it is damaged or missing."""
    try:
        return pl.read_parquet(path, columns=columns)
    except (pl.exceptions.PolarsError, OSError):
        part = path.parent.parent.name == "parts"
        remedy = f"delete the folder {path.parent} and " if part else ""
        raise UserError(f"{path} is damaged: {remedy}run the sweep again") from None
