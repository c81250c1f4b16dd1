"""Adoption: checks arrays of states that another program computed and writes them as a cache."""

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from embrm.adoption.arrays import Scan, StateArray, open_states, read_numbers, scan
from embrm.adoption.ids import Ids, combined_ids, hex_ids, text_ids
from embrm.adoption.lint import Linted, lint
from embrm.adoption.rows import Rows, from_grid, from_table
from embrm.adoption.spec import AdoptSpec, ArraySource
from embrm.cache.schema import ShardRows
from embrm.cache.tensors import to_stored
from embrm.cache.writer import open_writer
from embrm.core.errors import UserError
from embrm.core.progress import progress
from embrm.core.provenance import provenance
from embrm.data.collector import MEMBERS, PAIRS, RESPONSES
from embrm.data.dataset import Dataset
from embrm.data.groups import PairRule, derive_pairs, every_pair
from embrm.data.leaks import leaks
from embrm.data.splits import holdout

SHARD_BYTES = 64 << 20
"""Approximate bytes of states per shard. Peak memory is a few times this, whatever the arrays."""

_WRITERS = 2
"""Threads that write shards: while one waits for the disk, the other computes its digest."""

VIEW = "last"
"""The view (kind of state) that adopted states are stored as: the default `state` of a run."""

_RULES = 1
"""Version of the rules for excluding and shuffling rows; part of the cache's identity."""


@dataclass(frozen=True)
class _Adopted:
    """One scanned and checked array; fields of array type have one entry per kept row, in order."""

    array: StateArray
    rows: Rows
    scan: Scan
    linted: Linted
    split: NDArray[np.object_]
    """The split of each row, after holdout."""
    prompt: Ids
    response: Ids

    @property
    def name(self) -> str:
        return self.array.file.name


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread.

    Its reductions are bound by memory bandwidth, and further threads would compete with those that
    compute digests and write shards.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def adopt(spec: AdoptSpec, out: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a cache of the arrays of `spec` at `out`, or complete a partial one; returns `out`.

    The arrays are read twice, one block at a time: once for their digests and the checks of
    `embrm.adoption.lint`, and once for writing. An interrupted run can be started again: it keeps
    the finished shards, and the cache ends up with the same bytes.

    Raises: UserError for invalid input, and for a cache of other content at `out`.
    """
    opened = [_open(source) for source in spec.arrays]
    _refuse_unlike([array for array, _ in opened])
    adopted = [
        _read(source, array, rows)
        for source, (array, rows) in zip(spec.arrays, opened, strict=True)
    ]
    _refuse_repeated(adopted)
    dataset = _dataset(spec, adopted)
    first = adopted[0].array
    shard_rows = max(1, shard_bytes // (first.width * first.dtype.itemsize))
    findings = [finding for one in adopted for finding in one.linted.findings]
    with open_writer(
        out,
        identity=_identity(spec, adopted),
        environment=provenance(),
        extraction=spec.model_dump(mode="json"),
        data={
            "splits": dataset.split_counts(),
            "exclusions": dataset.reason_counts(),
            "rules": dataset.rules,
            "lint": [dataclasses.asdict(finding) for finding in findings],
        },
        tables={
            "pairs": dataset.pairs,
            "members": dataset.members,
            "exclusions": dataset.exclusions,
            "leaks": leaks(dataset),
        },
        n_responses=dataset.responses.height,
        shard_rows=shard_rows,
        lm_head=dict,
    ) as writer:
        total = dataset.responses.height
        with (
            progress("adopt", total, "states", len(writer.done) * shard_rows) as bar,
            ThreadPoolExecutor(_WRITERS, "writer") as threads,
        ):

            def write(index: int) -> int:
                rows = range(index * shard_rows, min((index + 1) * shard_rows, total))
                writer.write_shard(index, _shard(adopted, dataset.responses, rows), None)
                return len(rows)

            # When the loop ends, even by an error, the executor drops pending shards and waits for
            # those being written.
            left = [index for index in range(writer.n_shards) if index not in writer.done]
            for count in threads.map(write, left):
                bar.advance(count)
        writer.finish()
    return out


def _open(source: ArraySource) -> tuple[StateArray, Rows]:
    """Open an array and determine its rows. Reads gold scores and table, but not yet the states."""
    array = open_states(Path(source.states), source.key)
    gold = read_numbers(Path(source.gold), source.gold_key) if source.gold else None
    if len(array.file.shape) == 2:
        for field in ("models", "order"):
            if getattr(source, field) is not None:
                raise UserError(f"{array.file.name} has two axes: leave {field} out, or reshape it")
        if source.rows is None:
            raise UserError(
                f"{array.file.name} has shape {array.file.shape}, (rows, width): name a table "
                "with one row per state by rows, or reshape it to (prompts, responses, width)"
            )
        return array, from_table(array, Path(source.rows), source.columns, gold, split=source.split)
    if gold is None or source.rows is not None:
        raise UserError(
            f"{array.file.name} has three axes: give gold, shaped like the first two, and no rows"
        )
    return array, from_grid(
        array,
        *gold,
        split=source.split or Path(source.states).stem,
        order=source.order,
        models=_names(Path(source.models)) if source.models else None,
    )


def _names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no file of models at {path}: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"models {path} is not UTF-8 text: write one name per line") from None


def _refuse_unlike(arrays: Sequence[StateArray]) -> None:
    first = arrays[0]
    for other in arrays[1:]:
        for field in ("width", "dtype"):
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise UserError(
                    f"{other.file.name} has {field} {theirs}, {first.file.name} has {ours}: adopt "
                    "them into separate caches"
                )


def _refuse_repeated(adopted: Sequence[_Adopted]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for one in adopted:
        for split in one.linted.rows["split"].unique():
            content = split, one.scan.sha256
            if content in seen:
                raise UserError(
                    f"{one.name} and {seen[content]} contain the same states, both for split "
                    f"{split!r}: leave one out"
                )
            seen[content] = one.name


def _read(source: ArraySource, array: StateArray, rows: Rows) -> _Adopted:
    """Scan and check an array, and compute the ids of its prompts and responses."""
    scanned = scan(array)
    linted = lint(rows, array, scanned)
    table = linted.rows
    if rows.prompts is None:
        assert rows.grid is not None  # rows without prompts are a grid's
        # Unnamed prompts get ids from the digest of the states, so that file names do not matter.
        seed = np.full(rows.grid[0], int(scanned.sha256[:16], 16), np.uint64)
        prompts = combined_ids(seed, np.arange(rows.grid[0]))
    else:
        prompts = text_ids(rows.prompts)
    prompt = prompts[table["prompt"].to_numpy()]
    splits = table["split"].unique(maintain_order=True)
    own = table["split"].replace_strict(splits, text_ids(splits), return_dtype=pl.UInt64)
    response = combined_ids(combined_ids(prompt, own.to_numpy()), table["row"].to_numpy())
    split = table["split"].to_numpy()
    if source.holdout:
        rule = source.holdout
        held_out = holdout(hex_ids(prompt), rule.fraction, rule.seed, "holdout")
        split = np.where(held_out, rule.split, split)
    return _Adopted(array, rows, scanned, linted, split, prompt, response)


def _dataset(spec: AdoptSpec, adopted: Sequence[_Adopted]) -> Dataset:
    """The canonical dataset. Unknown texts are "" for responses, and ids for prompts of a grid."""
    responses, pairs, members = [], [], []
    first = 0
    for source, one in zip(spec.arrays, adopted, strict=True):
        table = _named(one)
        prompts = table["prompt_id"]
        if one.rows.prompts is not None:
            prompts = pl.Series(one.rows.prompts, dtype=pl.String).gather(table["prompt"])
        responses.append(
            table.select("response_id", "prompt_id", kind=pl.lit("text"), response=pl.lit(""))
            .with_columns(prompts.alias("prompt"))
            .select(list(RESPONSES))
        )
        members.append(
            table.with_columns(response=pl.int_range(pl.len(), dtype=pl.Int32) + first).select(
                list(MEMBERS)
            )
        )
        pairs.append(_pairs(table, one, source.pairs, first))
        first += table.height
    return Dataset(
        responses=pl.concat(responses),
        pairs=pl.concat(pairs),
        members=pl.concat(members),
        exclusions=pl.concat([one.linted.exclusions for one in adopted]),
        rules={"sources": [_rules(*each) for each in zip(spec.arrays, adopted, strict=True)]},
    )


def _named(one: _Adopted) -> pl.DataFrame:
    """The kept rows, with columns for their ids and source."""
    return one.linted.rows.with_columns(
        hex_ids(one.response).alias("response_id"),
        hex_ids(one.prompt).alias("prompt_id"),
        pl.Series("split", one.split.tolist(), dtype=pl.String),
        pl.lit(one.name).alias("source"),
    )


def _pairs(table: pl.DataFrame, one: _Adopted, rule: PairRule, first: int) -> pl.DataFrame:
    """Derive the pairs of every prompt; `first` is the row of the cache where `table` begins.

    Raises: UserError when the rule leaves no pair, unless it has per_prompt = 0.
    """
    gold, group = table["gold"].to_numpy(), table["group"].to_numpy()
    if rule == PairRule(gap=rule.gap, seed=rule.seed):
        chosen, rejected = every_pair(gold, group, rule.gap)
    else:
        starts = np.flatnonzero(np.diff(group, prepend=-1)).tolist()
        prompt_ids = table["prompt_id"].gather(starts)
        found = []
        for start, end, prompt_id in zip(
            starts, [*starts[1:], len(group)], prompt_ids, strict=True
        ):
            lengths = [0] * (end - start)  # unknown
            positions = derive_pairs(gold[start:end].tolist(), lengths, rule, prompt_id)
            found.append(np.stack(positions) + start)
        chosen, rejected = np.concatenate(found, axis=1)
    if not len(chosen) and rule.per_prompt != 0:
        raise UserError(
            f"{one.name}: gap = {rule.gap:g}, but no two responses of a prompt differ by more in "
            "gold: lower gap"
        )
    better, worse = table[chosen], table[rejected]
    return pl.DataFrame(
        {
            "pair_id": hex_ids(combined_ids(one.response[chosen], one.response[rejected])),
            "split": better["split"],
            "subset": better["subset"],
            "prompt_id": better["prompt_id"],
            "chosen": chosen + first,
            "rejected": rejected + first,
            "margin": better["gold"] - worse["gold"],
            "label": np.ones(len(chosen)),
            "weight": np.ones(len(chosen)),
            "chosen_model": better["model"],
            "rejected_model": worse["model"],
            "source": better["source"],
            "row": better["row"],
        },
        schema=PAIRS,
    )


def _rules(source: ArraySource, one: _Adopted) -> dict[str, Any]:
    return {
        "source": one.name,
        "rows": one.array.rows,
        "shape": list(one.array.file.shape),
        "dtype": str(one.array.file.dtype).removeprefix("torch."),
        "order": one.rows.order,
        "columns": source.columns,
        "pairs": source.pairs.model_dump(),
        "holdout": source.holdout.model_dump() if source.holdout else None,
    }


def _identity(spec: AdoptSpec, adopted: Sequence[_Adopted]) -> dict[str, Any]:
    """Everything that determines the content of the cache; no file paths."""
    arrays = []
    for source, one in zip(spec.arrays, adopted, strict=True):
        rules = _rules(source, one)
        del rules["source"]
        splits = one.linted.rows["split"].unique().sort().to_list()
        digests = {"states": one.scan.sha256, "rows": one.rows.sha256}
        arrays.append({**rules, "splits": splits, "sha256": digests})
    return {"adopted": arrays, "view": VIEW, "rules": _RULES}


def _shard(adopted: Sequence[_Adopted], responses: pl.DataFrame, rows: range) -> ShardRows:
    """Read the given rows of the cache from the arrays; unknown token counts are stored as 0."""
    states, norms = [], []
    first = 0
    for one in adopted:
        table = one.linted.rows
        own = slice(max(rows.start - first, 0), max(rows.stop - first, 0))
        places = table["row"].to_numpy()[own]
        if len(places):
            states.append(one.array.take(places))
            norms.append(one.scan.norms[places])
        first += table.height
    count = len(rows)
    here = responses[rows.start : rows.stop]
    return ShardRows(
        first=rows.start,
        response_id=here["response_id"].to_list(),
        prompt_id=here["prompt_id"].to_list(),
        n_prompt=np.zeros(count, np.int32),
        n_response=np.zeros(count, np.int32),
        truncated=np.zeros(count, np.bool_),
        final_position=np.full(count, -1, np.int32),
        final_token=np.full(count, -1, np.int32),
        S=None,
        states={VIEW: to_stored(torch.cat(states) if len(states) > 1 else states[0])},
        norms={VIEW: np.concatenate(norms)},
    )
