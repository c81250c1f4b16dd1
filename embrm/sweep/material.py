"""What the workers of a sweep share: a file of states a view, the pairs, the evaluation splits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch

from embrm.cache.reader import Cache
from embrm.data.splits import holdout
from embrm.errors import UserError
from embrm.evaluate.accuracy import EvaluationSplit
from embrm.files import TEMPORARY, disk_errors
from embrm.progress import progress
from embrm.sweep.grid import Selection
from embrm.train.objectives import Pairs
from embrm.train.states import States

LEAST_MEMORY = 50_000_000
"""Bytes of states a worker must be allowed to keep."""

_TRAINED_ON = ("chosen", "rejected", "label", "weight", "margin")


@dataclass(frozen=True)
class StatesFile:
    """All states of one view as one flat file of rows, which every worker maps.

    resident: bytes of it that a worker may keep in memory; None: whatever the system lets it.
    """

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    resident: int | None

    def open(self, device: torch.device) -> States:
        """Map it; for a GPU, copy it there."""
        states = States.of_file(self.path, self.shape, self.dtype, resident=self.resident)
        return states if device.type == "cpu" else States(states.values.to(device))


@dataclass(frozen=True)
class Material:
    """Everything a worker reads. training, validation: chosen, rejected, label, weight, margin, by
    pair id; splits: all that are not trained on, by name."""

    selection: Selection
    states: dict[str, StatesFile]
    training: pl.DataFrame
    validation: pl.DataFrame
    splits: dict[str, EvaluationSplit]


def select(
    cache: Cache, selection: Selection, pairs_limit: int | None = None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training and validation pairs of `cache`, both sorted by pair id.

    The sides are split by prompt; the limit takes the first training pairs by pair id, a hash,
    and leaves the validation pairs alone.
    """
    pairs = cache.pairs.filter(pl.col("split").is_in(selection.train)).sort("pair_id")
    held = pl.Series(holdout(pairs["prompt_id"], selection.validation, 0))
    training = pairs.filter(~held)
    return training.head(pairs_limit or training.height), pairs.filter(held)


def to_pairs(table: pl.DataFrame) -> Pairs:
    """Pairs as tensors."""

    def tensor(column: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(table[column].to_numpy(), dtype=dtype)

    return Pairs(
        chosen=tensor("chosen", torch.int64),
        rejected=tensor("rejected", torch.int64),
        label=tensor("label", torch.float32),
        weight=tensor("weight", torch.float32),
        margin=None if table["margin"].null_count() else tensor("margin", torch.float32),
    )


def evaluation_splits(cache: Cache, selection: Selection) -> dict[str, EvaluationSplit]:
    """Every split that is not trained on, prepared for evaluation."""
    return {
        split: EvaluationSplit.of(
            cache.pairs.filter(pl.col("split") == split),
            cache.members.filter(pl.col("split") == split),
            cache.n_response,
        )
        for split in cache.splits
        if split not in selection.train
    }


def prompt_table(splits: Mapping[str, EvaluationSplit]) -> pl.DataFrame:
    """The prompts of all splits, with what no run changes: split, `accuracy.PROMPTS`."""
    return pl.concat(
        split.prompts.select(pl.lit(name).alias("split"), pl.all())
        for name, split in splits.items()
    )


@contextmanager
def laid_out(
    cache: Cache,
    selection: Selection,
    splits: dict[str, EvaluationSplit],
    views: Sequence[str],
    folder: Path,
    *,
    memory: int | None = None,
    jobs: int = 1,
) -> Iterator[Material]:
    """Prepare the material of a sweep; its states lie below `folder` until the block is left.

    memory: bytes of states that all `jobs` workers together may keep; where the views are larger,
    workers stream them. None: no limit of our own.

    Raises: UserError when the disk is full, the cache is damaged or `memory` is too small.
    """
    if memory is not None and memory < jobs * LEAST_MEMORY:
        raise UserError(
            f"memory = {memory / 1e6:,.0f} MB: {jobs} workers need at least "
            f"{jobs * LEAST_MEMORY / 1e6:,.0f} MB for states: raise it, or lower --jobs"
        )
    size = cache.states_bytes * len(views)
    resident = None if memory is None or size <= memory else memory // jobs
    files: dict[str, StatesFile] = {}
    training, validation = select(cache, selection)
    try:
        with progress("reading states", len(views) * len(cache.manifest.shards), "shards") as bar:
            for number, view in enumerate(views):
                path = folder / f"{TEMPORARY}states-{number}"
                files[view] = StatesFile(
                    path,
                    (cache.manifest.n_responses, cache.width),
                    cache.layout.torch_dtype,
                    resident,
                )
                with disk_errors(path):
                    folder.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        for part in cache.state_shards(view):
                            file.write(part.contiguous().view(torch.uint8).numpy().data)
                            bar.advance()
        yield Material(
            selection, files, training.select(_TRAINED_ON), validation.select(_TRAINED_ON), splits
        )
    finally:
        for states in files.values():
            states.path.unlink(missing_ok=True)
