"""Dry run: estimates what an extraction would write, and its duration, without writing anything."""

import time
from dataclasses import dataclass

import numpy as np
import polars as pl

from embrm.extraction.choice import load_engine_for, with_engine
from embrm.extraction.engine import Engine
from embrm.extraction.positions import predicting_positions
from embrm.extraction.reading import check_batch_tokens, read
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts

_SAMPLE_TOKENS = 1 << 16
"""Maximum tokens of the sample that is timed; it takes seconds on a GPU."""


@dataclass(frozen=True)
class DryRun:
    """The estimate for an extraction."""

    responses: int
    prompts: int
    splits: dict[str, dict[str, int]]
    """For each split, its numbers of pairs, prompts and responses."""
    tokens: int
    cache_bytes: dict[str, int]
    """Size of each part of the cache, and the total, without Parquet headers and small tables."""
    exclusions: dict[str, int]
    """For each reason, the number of rows that are left out."""
    first_exclusions: dict[str, str]
    """For each reason, the first row that is left out (counted from 0), and what is wrong with
    it."""
    leaks: pl.DataFrame
    tokens_per_second: float
    """Measured on a sample of the data. Data with many responses per prompt may run faster."""
    seconds: float


def dry_run(
    spec: ExtractSpec,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    tensor_parallel: int = 1,
    compiled: bool = False,
) -> DryRun:
    """Estimate what `extract` would do, from its speed on a sample of the responses.

    Raises: see `extract`.
    """
    check_batch_tokens(batch_tokens)
    prepared = prepare_texts(with_engine(spec, device))
    engine = load_engine_for(prepared, device, tensor_parallel, compiled=compiled)
    budget = engine.batch_tokens if batch_tokens is None else batch_tokens
    lengths = prepared.lengths
    # Every n-th response in order of length represents all of them; in total about one batch.
    share = max(1, int(lengths.sum() // min(budget, _SAMPLE_TOKENS)))
    share = min(share, len(lengths))  # a response longer than the budget is read alone
    sample = [int(row) for row in np.argsort(lengths, kind="stable")[share // 2 :: share]]
    read(engine, prepared.requests(sample[:1]), budget)  # the first call also allocates
    start = time.perf_counter()
    read(engine, prepared.requests(sample), budget)
    speed = float(lengths[sample].sum()) / (time.perf_counter() - start)
    return DryRun(
        responses=len(lengths),
        prompts=prepared.dataset.responses["prompt_id"].n_unique(),
        splits=prepared.dataset.split_counts(),
        tokens=int(lengths.sum()),
        cache_bytes=_cache_bytes(prepared, engine),
        exclusions=prepared.dataset.reason_counts(),
        first_exclusions=prepared.dataset.first_exclusions(),
        leaks=prepared.leaks,
        tokens_per_second=speed,
        seconds=float(lengths.sum()) / speed,
    )


def _cache_bytes(prepared: PreparedTexts, engine: Engine) -> dict[str, int]:
    """Bytes of all vectors and scalars, without Parquet headers and small tables."""
    spec, rows = prepared.spec, len(prepared.encoded)
    width = engine.width * engine.head.weight.element_size()
    sampled = sum(
        min(spec.token_rows, len(predicting_positions(entry.n_prompt, len(entry.ids))))
        for entry in prepared.encoded
    )
    parts = {
        "states": rows * len(spec.states) * width,
        "token_states": sampled * width,
        "top_logits": sampled * 8 * min(spec.top_k, len(engine.head.weight)),
        "tail_means": sampled * width if spec.tail_mean else 0,
        "lm_head": sum(tensor.nbytes for tensor in engine.head.tensors().values()),
        "scalars": rows * (4 * len(spec.states) + 61) + sampled * 20,
    }
    return parts | {"total": sum(parts.values())}
