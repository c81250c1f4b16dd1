"""Synthetic caches for benchmarks: random states and preferences, written by the cache writer."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from embrm.cache.reader import open_cache
from embrm.cache.schema import ShardRows, Stored, TokenRows
from embrm.cache.tensors import to_stored, to_tensor
from embrm.cache.writer import open_writer
from embrm.core.progress import progress
from embrm.core.specs import content_id
from embrm.data.splits import holdout

_SHARD_BYTES = 64 << 20
_MEMBERS = pl.Schema(
    {
        "split": pl.String(),
        "subset": pl.String(),
        "prompt_id": pl.String(),
        "response": pl.Int32(),
        "model": pl.String(),
        "gold": pl.Float64(),
    }
)
_LEAKS = pl.Schema(
    {
        "train_split": pl.String(),
        "eval_split": pl.String(),
        "prompt_ids": pl.List(pl.String()),
    }
)

HELD_OUT = "held-out"


@dataclass(frozen=True)
class Tokens:
    """Token rows of a synthetic cache, and the vocabulary of its LM head.

    rows: token rows of each response; top_k: logits kept for each; tail_mean: with tail means.
    Token ids follow the Zipf-Mandelbrot law of words: frequency 1/(2.7 + rank).
    """

    rows: int = 8
    top_k: int = 32
    tail_mean: bool = False
    vocabulary: int = 128_000


def synthetic(
    folder: Path,
    splits: Mapping[str, int],
    width: int,
    *,
    held_out: float = 0.0,
    tokens: Tokens | None = None,
) -> Path:
    """Write a cache of bfloat16 states of `width` components; returns `folder`.

    splits: number of pairs of each split; every pair has its own prompt and two adjacent responses.
    held_out: share of the prompts of "train" that go to the split `HELD_OUT` instead.
    tokens: token rows, with random states and logits of realistic magnitude; None for no rows.
    Preferences are drawn by the Bradley-Terry model from the gold scores of `_World`. Memory does
    not grow with the cache.
    """
    random = np.random.default_rng(0)
    count = sum(splits.values())
    first = random.integers(0, 2, count)  # 1 where the second response is the chosen one
    pairs = _pairs(splits, first)
    if held_out:
        pairs = _with_held_out(pairs, held_out)
    shard_pairs = max(1, _SHARD_BYTES // (4 * width))
    states = _World(width).shards(torch.from_numpy(first), shard_pairs)
    _write(
        folder,
        pairs,
        states,
        rows=2 * count,
        shard_rows=2 * shard_pairs,
        width=width,
        tokens=tokens,
    )
    return folder


def resplit(folder: Path, source: Path, held_out: float) -> Path:
    """Write a cache with the states "last" and the split "train" of the cache `source`; returns
    `folder`. held_out: share of the prompts that go to the split `HELD_OUT` instead."""
    cache = open_cache(source)
    pairs = _with_held_out(cache.pairs.filter(pl.col("split") == "train"), held_out)
    rows, shard_rows = cache.manifest.n_responses, cache.manifest.shard_rows
    shards = map(to_tensor, cache.stored_shards("last"))
    _write(folder, pairs, shards, rows=rows, shard_rows=shard_rows, width=cache.width)
    return folder


def _with_held_out(pairs: pl.DataFrame, share: float) -> pl.DataFrame:
    out = pl.Series(holdout(pairs["prompt_id"], share, 0, "bench"))
    moved = out & (pairs["split"] == "train")
    return pairs.with_columns(split=pl.when(moved).then(pl.lit(HELD_OUT)).otherwise("split"))


def _pairs(splits: Mapping[str, int], first: np.ndarray) -> pl.DataFrame:
    rows = np.arange(len(first), dtype=np.int32) * 2
    names = [hashlib.blake2b(b"%d" % row, digest_size=8).hexdigest() for row in rows]
    return pl.DataFrame(
        {
            "pair_id": names,  # their sorted order differs from that of the rows, as in any cache
            "split": [*chain.from_iterable([name] * count for name, count in splits.items())],
            "subset": pl.Series([None] * len(rows), dtype=pl.String),
            "prompt_id": names,
            "chosen": (rows + first).astype(np.int32),
            "rejected": (rows + 1 - first).astype(np.int32),
            "margin": pl.Series([None] * len(rows), dtype=pl.Float64),
            "label": np.ones(len(rows)),
            "weight": np.ones(len(rows)),
        }
    )


class _World:
    """Draws states and gold scores.

    States: independent normal components with variances proportional to 1/(10 + j), scaled to a
    mean square of 1. Gold: 80 % of its variance is linear in the state; the rest comes from a
    random layer of 64 ReLUs, about half of which is linear too. A response wins with the
    Bradley-Terry probability of its gold score, so no model can exceed an accuracy of 79 %.
    """

    def __init__(self, width: int) -> None:
        self._random = random = torch.Generator().manual_seed(0)
        variances = 1 / (10 + torch.arange(width))
        self._scale = (variances / variances.mean()).sqrt()
        self._direction = torch.randn(width, generator=random)
        self._layer = torch.randn(width, 64, generator=random)
        self._output = torch.randn(64, generator=random)
        self._lines = [(0.0, 1.0), (0.0, 1.0)]
        parts = self._parts(self._states(4096))
        self._lines = [(float(part.mean()), float(part.std())) for part in parts]

    def shards(self, first: Tensor, pairs: int) -> Iterator[Tensor]:
        """Yield bfloat16 states of `pairs` pairs at a time, rows 2i and 2i + 1 for pair i.

        first: int64 [all pairs], 1 where the second response of a pair is the chosen one.
        """
        for some in first.split(pairs):
            states = self._states(2 * len(some))
            linear, curved = self._parts(states)
            gold = 2**0.5 * (0.8**0.5 * linear + 0.2**0.5 * curved)
            wins = torch.sigmoid(gold[::2] - gold[1::2])
            won = torch.rand(len(some), generator=self._random) < wins
            # Swap the responses of a pair where the winner is not the one that `first` says.
            order = torch.arange(len(states)).view(-1, 2)
            order[won == some.bool()] = order[won == some.bool()].flip(1)
            yield states[order.flatten()].bfloat16()

    def _states(self, rows: int) -> Tensor:
        return torch.randn(rows, len(self._scale), generator=self._random) * self._scale

    def _parts(self, states: Tensor) -> list[Tensor]:
        """Linear and nonlinear part of the gold score, each with mean 0 and variance 1."""
        curved = torch.relu(states @ self._layer) @ self._output
        parts = (states @ self._direction, curved)
        return [(part - mean) / sd for part, (mean, sd) in zip(parts, self._lines, strict=True)]


def _write(
    folder: Path,
    pairs: pl.DataFrame,
    shards: Iterable[Tensor],
    *,
    rows: int,
    shard_rows: int,
    width: int,
    tokens: Tokens | None = None,
) -> None:
    tables = {
        "pairs": pairs,
        "members": pl.DataFrame(schema=_MEMBERS),
        "exclusions": pl.DataFrame(schema={"row": pl.Int64}),
        "leaks": pl.DataFrame(schema=_LEAKS),
    }
    with (
        open_writer(
            folder,
            identity={"bench": content_id(pairs["pair_id"].to_list()), "rows": rows},
            environment={},
            extraction={},
            data={},
            tables=tables,
            n_responses=rows,
            shard_rows=shard_rows,
            lm_head=lambda: _lm_head(tokens, width),
        ) as writer,
        progress("writing the synthetic cache", writer.n_shards, "shards") as bar,
    ):
        first = 0
        for index, states in enumerate(shards):
            sampled = _token_rows(first, states, tokens) if tokens else None
            writer.write_shard(index, _shard_rows(first, states), sampled)
            first += len(states)
            bar.advance()
        writer.finish()


def _shard_rows(first: int, states: Tensor) -> ShardRows:
    count = len(states)
    names = [str(row) for row in range(first, first + count)]
    return ShardRows(
        first=first,
        response_id=names,
        prompt_id=names,
        n_prompt=np.ones(count, np.int32),
        n_response=np.arange(first, first + count, dtype=np.int32) % 50 + 1,
        truncated=np.zeros(count, np.bool_),
        final_position=np.ones(count, np.int32),
        final_token=np.zeros(count, np.int32),
        S=np.zeros(count),
        states={"last": to_stored(states)},
        norms={"last": states.float().norm(dim=1).numpy()},
    )


def _lm_head(tokens: Tokens | None, width: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    weight = torch.empty(tokens.vocabulary if tokens else 1, width, dtype=torch.bfloat16)
    for rows in weight.split(1 << 14):
        rows.copy_(torch.randn(rows.shape, generator=random) * width**-0.5)
    return {"weight": weight, "scale": torch.ones(1)}


def _token_rows(first: int, states: Tensor, tokens: Tokens) -> TokenRows[Stored]:
    random = np.random.default_rng(first)
    count = len(states) * tokens.rows
    # Inverse transform sampling of ranks with density proportional to 1/(2.7 + rank).
    draws = random.random((count, tokens.top_k + 1))
    ranks = 2.7 * ((1 + tokens.vocabulary / 2.7) ** draws - 1)
    ids = ranks.astype(np.int32).clip(0, tokens.vocabulary - 1)
    logits = -np.log(2.7 + np.arange(tokens.top_k, dtype=np.float32)).repeat(count)
    logits = logits.reshape(tokens.top_k, count).T.copy()
    generator = torch.Generator().manual_seed(first)
    values = torch.randn(count, states.shape[1], generator=generator).to(states.dtype)
    tail_means = None
    if tokens.tail_mean:
        tail_means = torch.randn(values.shape, generator=generator).mul_(values.shape[1] ** -0.5)
    return TokenRows(
        response=np.repeat(np.arange(first, first + len(states), dtype=np.int32), tokens.rows),
        position=np.tile(np.arange(tokens.rows, dtype=np.int32), len(states)),
        target=ids[:, -1].copy(),
        target_logit=np.full(count, -3, np.float32),
        logsumexp=np.full(count, 1.2, np.float32),
        state=to_stored(values),
        top_ids=ids[:, :-1].copy(),
        top_logits=logits,
        tail_mean=None if tail_means is None else to_stored(tail_means.to(states.dtype)),
    )
