"""The files that the workers of a sweep share: states of each view, token rows, and tables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import torch

from embrm.cache.reader import Cache, open_cache
from embrm.core.errors import UserError
from embrm.core.files import TEMPORARY, disk_errors
from embrm.core.progress import progress
from embrm.metrics.accuracy import EvaluationSplit
from embrm.sweeps.mapped import MappedFile, TokenFiles, write_rows
from embrm.sweeps.selection import TRAINED_ON, evaluated_tables, select, splits_of, with_gold
from embrm.sweeps.spec import Run, RunSpec, Selection
from embrm.sweeps.tables import read_tables
from embrm.sweeps.training_pairs import with_rules
from embrm.sweeps.views import open_view
from embrm.training.learner_specs import LIBRARY_BYTES
from embrm.training.pairs import Pairs
from embrm.training.regularizers import FISHER_AT_ONCE
from embrm.training.row_store import WINDOW_BYTES

PROCESS_BYTES = 410_000_000
"""Memory that this process and each worker take besides states: Python, libraries, buffers."""

LEAST_RESIDENT = WINDOW_BYTES
"""Bytes of states that a worker must be able to keep in memory."""

_DRAWN = ("training", "validation", "gold")
"""Tables of pairs that are drawn with a data seed."""

_DIVIDED = ("pairs", "members")
"""Tables that depend on a data seed where scenarios divide groups."""

_TABLES = (*_DRAWN, *_DIVIDED, "responses")


@dataclass(frozen=True)
class Material:
    """Everything that a worker reads, as files, so that only names are sent to workers.

    states: view → file. tokens: the token rows, if a run has a regularizer or an adapter. tables:
    Arrow files, by name and data seed, of training and validation pairs (chosen, rejected, label,
    weight, margin, by pair id), of gold scores if a learner reads them, and of the pairs, members
    and responses (n_response, S) that runs are evaluated on. Those that do not depend on the data
    seed are stored once.
    """

    selection: Selection
    states: dict[str, MappedFile]
    tokens: TokenFiles | None
    tables: dict[tuple[str, int], Path]

    def pairs(self, side: Literal["training", "validation"], data_seed: int = 0) -> pl.DataFrame:
        """The pairs that `training.as_trained` or `training.as_validated` reads."""
        return pl.read_ipc(self.tables[side, data_seed])

    def gold(self, data_seed: int = 0) -> pl.DataFrame:
        """Gold scores to train on: see `with_gold`."""
        return pl.read_ipc(self.tables["gold", data_seed])

    def splits(self, data_seed: int = 0) -> dict[str, EvaluationSplit]:
        """Every split that is not trained on, by name."""
        pairs, members = (
            pl.read_ipc(self.tables[name, data_seed]) for name in ("pairs", "members")
        )
        return splits_of(pairs, members, self.responses(data_seed)["n_response"].to_numpy())

    def responses(self, data_seed: int = 0) -> pl.DataFrame:
        """Tokens (n_response) and log-probability (S) of every response."""
        return pl.read_ipc(self.tables["responses", data_seed])


def to_pairs(table: pl.DataFrame) -> Pairs:
    """A table of pairs as tensors."""

    def tensor(column: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(table[column].to_numpy(), dtype=dtype)

    return Pairs(
        chosen=tensor("chosen", torch.int64),
        rejected=tensor("rejected", torch.int64),
        label=tensor("label", torch.float32),
        weight=tensor("weight", torch.float32),
        margin=None if table["margin"].null_count() else tensor("margin", torch.float32),
    )


@contextmanager
def laid_out(
    cache: Cache,
    selection: Selection,
    runs: Sequence[Run],
    folder: Path,
    *,
    memory: int | None = None,
    jobs: int = 1,
) -> Iterator[Material]:
    """Write the files that `runs` read below `folder`; they are deleted when the block ends.

    memory: bytes that this process and `jobs` workers together may use, libraries included; files
    that do not fit are streamed. None: no limit.

    Raises: UserError when the disk is full, the cache is damaged or `memory` is too small.
    """
    views = [open_view(cache, name) for name in sorted({run.spec.state for run in runs})]
    with_tokens = _reads_tokens(cache, runs)
    token_bytes = TokenFiles.size(cache) if with_tokens else 0
    vocabulary = cache.vocabulary if with_tokens else 0
    read = max((_minibatch_bytes(cache, vocabulary, run) for run in runs), default=0)
    read = max(read, _learner_bytes(cache, selection, [run.spec for run in runs]))
    share = _share(
        sum(view.size for view in views) + token_bytes, memory, jobs, PROCESS_BYTES + read
    )
    data_seeds = sorted({run.spec.data_seed for run in runs}) or [selection.data_seed]
    stored_with = {
        (name, seed): _stored_with(name, seed, data_seeds, selection)
        for name in _TABLES
        for seed in data_seeds
    }
    table_paths = {
        (name, seed): folder / f"{TEMPORARY}{name}-{first}"
        for (name, seed), first in stored_with.items()
    }
    state_paths = {view.name: folder / f"{TEMPORARY}states-{i}" for i, view in enumerate(views)}
    token_paths = TokenFiles.paths(folder)
    shards = len(cache.manifest.shards)
    try:
        for seed in data_seeds:
            specs = [run.spec for run in runs if run.spec.data_seed == seed]
            for name, table in _tables(cache, selection.drawn(seed), specs):
                path = table_paths[name, seed]
                if stored_with[name, seed] == seed:
                    with disk_errors(path):
                        folder.mkdir(parents=True, exist_ok=True)
                        table.write_ipc(path, compression="uncompressed")
                del table
        states: dict[str, MappedFile] = {}
        tokens = None
        with progress("reading states", (len(views) + with_tokens) * shards, "shards") as bar:
            for view in views:
                path = state_paths[view.name]
                write_rows(path, view.shards(), bar)
                resident = None if share is None else int(share * view.size)
                states[view.name] = MappedFile(path, view.shape, view.dtype, resident)
            if with_tokens:
                tokens = TokenFiles.write(cache, folder, share, bar)
        yield Material(selection, states, tokens, table_paths)
    finally:
        for path in (*table_paths.values(), *state_paths.values(), *token_paths.values()):
            path.unlink(missing_ok=True)


def _stored_with(name: str, seed: int, data_seeds: Sequence[int], selection: Selection) -> int:
    """The data seed with whose tables a table is stored: the first where all have the same."""
    drawn = name in _DRAWN or (name in _DIVIDED and selection.scenarios is not None)
    return seed if drawn else data_seeds[0]


def _reads_tokens(cache: Cache, runs: Sequence[Run]) -> bool:
    """Whether any run reads token rows: for a regularizer, or for the geometry of an adapter.

    The geometry is measured wherever it can be, so that a run's numbers do not depend on which
    other runs remain to be trained.
    """
    if any(run.spec.active_regularizer for run in runs):
        return True
    adapters = any(run.spec.head.adapter for run in runs)
    return adapters and cache.layout.has_token_rows and cache.vocabulary > 0


def _tables(
    cache: Cache, selection: Selection, specs: Sequence[RunSpec]
) -> Iterator[tuple[str, pl.DataFrame]]:
    """The tables of `_TABLES` one by one, none of which is kept in memory."""
    cache = open_cache(cache.folder)
    training, validation = select(cache, selection)
    yield "training", with_rules(training, specs).drop("pair_id", "prompt_id")
    if selection.validation_labels == "noisy":
        validation = with_rules(validation, specs, "validation").drop("pair_id", "prompt_id")
    else:
        validation = validation.select(TRAINED_ON)
    yield "validation", validation
    del training, validation
    if any(spec.learner and spec.learner.reads_gold for spec in specs):
        yield "gold", with_gold(cache, selection)
    pairs, members = evaluated_tables(cache, selection)
    yield "pairs", pairs
    yield "members", members
    del pairs, members
    yield "responses", cache.responses.select("n_response", "S")
    read_tables.cache_clear()


def _minibatch_bytes(cache: Cache, vocabulary: int, run: Run) -> int:
    """Upper bound of the memory that a minibatch's token rows need.

    It is dominated by the float32 vectors of its candidates and tails; what is computed from them
    needs about a quarter more.
    """
    regularizer, layout = run.spec.active_regularizer, cache.layout
    if regularizer is None or not layout.has_token_rows:
        return 0
    rows, top_k = regularizer.sampling.rows, regularizer.sampling.top_k
    responses = min(2 * run.spec.batch_pairs, cache.manifest.n_responses)
    if not regularizer.moves_states:
        responses, rows = FISHER_AT_ONCE, None
    positions = responses * (int(cache.n_token_rows.max()) if rows is None else rows)
    if top_k == "all":
        return 5 * (vocabulary * cache.width + positions * (cache.width + 6 * vocabulary))
    candidates = positions * (2 + ((layout.top_k or 0) if top_k is None else top_k))
    return 5 * cache.width * (min(vocabulary, candidates) + 2 * positions)


def _learner_bytes(cache: Cache, selection: Selection, specs: Sequence[RunSpec]) -> int:
    """Upper bound of the memory of scikit-learn's fits, which hold all rows in float64."""
    learning = [spec for spec in specs if spec.learner]
    if not learning:
        return 0
    training, _ = select(cache, selection)
    ends = pl.concat([training["chosen"], training["rejected"]])
    soft = any(spec.labels for spec in learning) or not training["label"].is_in([0.0, 1.0]).all()
    gold = any(spec.learner.reads_gold for spec in learning if spec.learner)
    rows = {
        "logistic": len(training) * (1 + soft),
        "ridge": len(with_gold(cache, selection)) if gold else 0,
        "gradient_boosting": 2 * ends.n_unique(),
    }
    return LIBRARY_BYTES + max(
        spec.learner.room(rows[spec.learner.kind], open_view(cache, spec.state).shape[1])
        for spec in learning
        if spec.learner
    )


def _share(size: int, memory: int | None, jobs: int, needed: int) -> float | None:
    """The fraction of the `size` bytes of mapped files that each worker may keep; None: all.

    needed: bytes that a worker needs besides them.
    """
    if memory is None:
        return None
    left = memory - PROCESS_BYTES - jobs * needed
    if left < jobs * LEAST_RESIDENT:
        least = (PROCESS_BYTES + jobs * (needed + LEAST_RESIDENT)) / 1e9
        raise UserError(
            f"memory = {memory / 1e9:.2f} GB: {jobs} workers need at least {least:.2f} GB: "
            "raise it, or lower jobs (--jobs)"
        )
    return None if size <= left else left / jobs / size
