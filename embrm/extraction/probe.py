"""Probe: checks that a cache agrees with its model, for several batch sizes and any engine.

A sample of its responses is extracted again, one at a time and in batches of several sizes, and
compared with what is stored.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from embrm.cache.reader import Cache, open_cache
from embrm.cache.schema import widened
from embrm.core.errors import UserError, nearest
from embrm.core.sampling import evenly_spaced
from embrm.extraction.choice import load_engine_for, made_by, with_engine
from embrm.extraction.engine import TOLERANCE
from embrm.extraction.engines import engine_names
from embrm.extraction.reading import read
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import PreparedTexts, prepare_texts

BATCH_TOKENS = (1, 1024, 8192)
"""Token budgets to try; with a budget of 1, every response is read alone."""


@dataclass(frozen=True)
class Deviation:
    """How one quantity of the sample deviates from the cache under one batch size.

    quantity: a view's name, S, or the logsumexp of the token rows. absolute: the largest
    |new - stored| of any component. relative: the largest ‖new - stored‖ / ‖stored‖ over the
    responses (for a number, |new - stored| / |stored|). orders_changed: number of pairs in the
    sample whose two responses swap ranks, by S or, for a view, by a fixed random linear readout;
    None for the logsumexp, which is not a property of a response.
    """

    quantity: str
    batch_tokens: int
    absolute: float
    relative: float
    orders_changed: int | None


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe. A sound cache is within the tolerance."""

    responses: int
    pairs: int
    engine: str
    """The engine that read the sample again; `made_by` is the engine that made the cache."""
    made_by: str
    dtype: str
    tolerance: float
    """Largest relative deviation allowed: float32 1e-4, float16 1e-2, bfloat16 5e-2."""
    deviations: tuple[Deviation, ...]

    @property
    def within_tolerance(self) -> bool:
        """Whether every relative deviation is within the tolerance."""
        return all(entry.relative <= self.tolerance for entry in self.deviations)


def probe(
    folder: Path,
    *,
    sample: int = 64,
    batch_tokens: Sequence[int] = BATCH_TOKENS,
    device: str = "auto",
    engine: str | None = None,
) -> ProbeResult:
    """Extract about `sample` responses of the cache at `folder` again and compare.

    Model and data are read from the paths or hub ids that the extraction used. engine: the engine
    to use; None: the one that made the cache.

    Raises: UserError when the cache cannot be opened, or when model, tokenizer or data are no
    longer those it was made from.
    """
    if engine is not None and engine not in engine_names():
        raise UserError(f"engine = {engine!r}: {nearest(engine, engine_names())}")
    cache = open_cache(folder)
    if "model" not in cache.manifest.extraction:
        raise UserError(
            f"{folder} was adopted from arrays, so there is no model to extract its states again "
            "with: check its bytes with embrm cache verify"
        )
    maker = made_by(cache.manifest)
    recorded = cache.manifest.extraction | {"engine": engine or maker}
    spec = ExtractSpec.parse(recorded, str(folder / "manifest.json"))
    prepared = prepare_texts(with_engine(spec, device))
    refuse_other(cache, prepared)
    rows, pairs = _sample(cache, sample)
    reader = load_engine_for(prepared, device)
    requests = prepared.requests(rows)
    stored = {view: _states(cache, view, rows) for view in cache.views}
    stored["S"] = cache.responses["S"].to_numpy()[rows][:, None]
    if prepared.spec.token_rows:
        parts = [shard.logsumexp[np.isin(shard.response, rows)] for shard in cache.token_shards()]
        stored["logsumexp"] = np.concatenate(parts).astype(np.float64)[:, None]
    deviations = []
    for budget in batch_tokens:
        batch = read(reader, requests, budget)
        found = {view: batch.states[view].double().numpy() for view in cache.views}
        found["S"] = batch.S[:, None]
        found["logsumexp"] = batch.tokens.logsumexp.astype(np.float64)[:, None]
        deviations += [
            _deviation(quantity, budget, stored[quantity], found[quantity], pairs)
            for quantity in stored
        ]
    return ProbeResult(
        len(rows),
        len(pairs),
        prepared.spec.engine,
        maker,
        cache.dtype,
        TOLERANCE[cache.dtype],
        (*deviations,),
    )


def refuse_other(
    cache: Cache, prepared: PreparedTexts, parts: Collection[str] | None = None
) -> None:
    """Raise UserError unless the cache was made from these texts and this model.

    parts: keys of the identity to compare; None: all but the engine.
    """
    for part, expected in cache.manifest.identity.items():
        wanted = part != "engine" if parts is None else part in parts
        if wanted and prepared.identity.get(part) != expected:
            raise UserError(
                f"{cache.folder}: the {part} named in its spec has changed since the cache was "
                "made: restore it, or extract again into a new folder"
            )


def _sample(cache: Cache, size: int) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Choose the sample: its rows, sorted, and its pairs as indices into them, int64 [pairs, 2].

    The sample consists of both responses of evenly spaced pairs or, in a cache without pairs, of
    evenly spaced responses.
    """
    ends = cache.pairs.select("chosen", "rejected").to_numpy().astype(np.int64)
    ends = ends[evenly_spaced(len(ends), max(size // 2, 1))]
    rows = np.unique(ends) if len(ends) else evenly_spaced(cache.manifest.n_responses, max(size, 1))
    return rows.tolist(), np.searchsorted(rows, ends)


def _states(cache: Cache, view: str, rows: list[int]) -> npt.NDArray[np.float64]:
    """The stored states of these rows, [rows, width], read one shard at a time."""
    shard, within = np.divmod(rows, cache.manifest.shard_rows)
    parts = [states[within[shard == i]] for i, states in enumerate(cache.stored_shards(view))]
    return widened(np.concatenate(parts)).astype(np.float64)


def _deviation(
    quantity: str,
    budget: int,
    stored: npt.NDArray[np.float64],
    found: npt.NDArray[np.float64],
    pairs: npt.NDArray[np.int64],
) -> Deviation:
    """Compare stored and found, float64 [rows, width]. pairs: int64 [pairs, 2], rows of both."""
    difference = found - stored
    scale = np.maximum(np.linalg.norm(stored, axis=1), np.finfo(np.float32).tiny)
    orders_changed = None
    if quantity != "logsumexp":
        readout = np.ones(1) if quantity == "S" else _readout(stored.shape[1])
        before, after = ((values @ readout)[pairs] for values in (stored, found))
        changed = np.sign(before[:, 0] - before[:, 1]) != np.sign(after[:, 0] - after[:, 1])
        orders_changed = int(changed.sum())
    return Deviation(
        quantity,
        budget,
        float(np.abs(difference).max()),
        float((np.linalg.norm(difference, axis=1) / scale).max()),
        orders_changed,
    )


def _readout(width: int) -> npt.NDArray[np.float64]:
    generator = torch.Generator().manual_seed(0)
    weights: npt.NDArray[np.float64] = torch.randn(
        width, dtype=torch.float64, generator=generator
    ).numpy()
    return weights
