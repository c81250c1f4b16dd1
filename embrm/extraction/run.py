"""Runs an extraction: makes the cache that a spec describes, or resumes an interrupted run."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from embrm.cache.schema import ShardRows, Stored, TokenRows
from embrm.cache.tensors import to_stored
from embrm.cache.writer import open_writer
from embrm.core.progress import progress
from embrm.core.provenance import provenance
from embrm.extraction.choice import load_engine_for, with_engine
from embrm.extraction.engine import Batch, Engine
from embrm.extraction.parts import Share
from embrm.extraction.reading import check_batch_tokens, read_shards
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts

SHARD_ROWS = 2048
"""Responses per shard."""


def extract(
    spec: ExtractSpec,
    out: Path,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    tensor_parallel: int = 1,
    compiled: bool = False,
    shard_rows: int = SHARD_ROWS,
    share: Share | None = None,
) -> Path:
    """Make the cache of `spec` at `out`, or resume it, and return its folder.

    An extraction that was interrupted at any moment and is run again keeps its finished shards and
    ends with the same bytes as one that was never interrupted (on the same machine, with the same
    `batch_tokens` and `compiled`; otherwise it agrees within the dtype's tolerance).

    device: auto, cpu, cuda, cuda:1 or mps. batch_tokens: token budget of a batch, padding included;
    None: the engine's default. tensor_parallel: GPUs that share the model. compiled: use
    torch.compile. share: make only this process's part of the cache, in a folder beside `out`,
    which is returned; `merge` joins the parts into the cache that a single process writes.

    Raises: UserError for an invalid spec, model, data or device, and for a folder with anything but
    an earlier run of this extraction.
    """
    check_batch_tokens(batch_tokens)
    out = share.folder(out) if share else out
    prepared = prepare_texts(with_engine(spec, device, out))
    engine = load_engine_for(prepared, device, tensor_parallel, compiled=compiled)
    budget = engine.batch_tokens if batch_tokens is None else batch_tokens
    fill(prepared, engine, out, batch_tokens=budget, shard_rows=shard_rows, share=share)
    return out


def fill(
    prepared: PreparedTexts,
    engine: Engine,
    out: Path,
    *,
    batch_tokens: int,
    shard_rows: int = SHARD_ROWS,
    share: Share | None = None,
) -> float:
    """Make or resume the cache at `out`, or the share's part of it, with a loaded engine.

    Returns the seconds for which reading waited for the previous shard to be written.
    Raises: see `extract`.
    """
    lengths = prepared.lengths
    ranges = [
        range(first, min(first + shard_rows, len(lengths)))
        for first in range(0, len(lengths), shard_rows)
    ]
    tokens = [int(lengths[rows].sum()) for rows in ranges]
    part = share.part(tokens) if share else None
    shards = part.shards if part else range(len(ranges))
    with open_writer(
        out,
        identity=prepared.identity,
        environment=provenance() | engine.environment | {"batch_tokens": batch_tokens},
        extraction=prepared.spec.model_dump(mode="json"),
        data={
            "splits": prepared.dataset.split_counts(),
            "exclusions": prepared.dataset.reason_counts(),
            "rules": prepared.dataset.rules,
        },
        tables={
            "pairs": prepared.dataset.pairs,
            "members": prepared.dataset.members,
            "exclusions": prepared.dataset.exclusions,
            "leaks": prepared.leaks,
        },
        n_responses=len(lengths),
        shard_rows=shard_rows,
        lm_head=engine.head.tensors,
        part=part,
    ) as writer:
        whole, done = (sum(tokens[index] for index in some) for some in (shards, writer.done))
        with (
            progress("extract", whole, "tokens", done) as bar,
            ThreadPoolExecutor(1, "writer") as thread,
        ):
            # A shard is written while the next one is read; at most one waits, so memory is
            # bounded. Leaving the block, also by an error, waits for the shard being written.
            writing: Future[None] = thread.submit(lambda: None)
            waited = 0.0
            left = [index for index in shards if index not in writer.done]
            asked = (prepared.requests(ranges[index]) for index in left)
            answers = read_shards(engine, asked, batch_tokens, bar.advance)
            for index, (_, batch) in zip(left, answers, strict=True):
                start = time.perf_counter()
                writing.result()
                waited += time.perf_counter() - start
                shard = _shard(prepared, ranges[index], batch)
                writing = thread.submit(writer.write_shard, index, *shard)
            writing.result()
        writer.finish()
    return waited


def _shard(
    prepared: PreparedTexts, rows: range, batch: Batch
) -> tuple[ShardRows, TokenRows[Stored] | None]:
    encoded = [prepared.encoded[row] for row in rows]
    responses = prepared.dataset.responses[rows.start : rows.stop]
    shard = ShardRows(
        first=rows.start,
        response_id=responses["response_id"].to_list(),
        prompt_id=responses["prompt_id"].to_list(),
        n_prompt=np.array([entry.n_prompt for entry in encoded], dtype=np.int32),
        n_response=np.array([entry.n_response for entry in encoded], dtype=np.int32),
        truncated=np.array([entry.truncated for entry in encoded], dtype=np.bool_),
        final_position=np.array([entry.final_position for entry in encoded], dtype=np.int32),
        final_token=np.array([entry.final_token for entry in encoded], dtype=np.int32),
        S=batch.S,
        states={view: to_stored(states) for view, states in batch.states.items()},
        norms={view: norms.numpy() for view, norms in batch.norms.items()},
    )
    if not prepared.spec.token_rows:
        return shard, None
    return shard, replace(batch.tokens, response=batch.tokens.response + np.int32(rows.start))
