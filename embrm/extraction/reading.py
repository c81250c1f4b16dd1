"""Reads any number of requests with an engine, shard by shard."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from embrm.cache.schema import TokenRows
from embrm.core.errors import UserError
from embrm.extraction.engine import Batch, Engine, Request


def check_batch_tokens(batch_tokens: int | None) -> None:
    """Raises: UserError for a token budget under 1; None means the engine's own."""
    if batch_tokens is not None and batch_tokens < 1:
        raise UserError(
            f"batch_tokens = {batch_tokens}, but a batch has at least 1 token: leave it out"
        )


def read(
    engine: Engine,
    requests: Sequence[Request],
    batch_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Batch:
    """Read requests as if they were one shard: see `read_shards`."""
    [(_, answer)] = read_shards(engine, [requests], batch_tokens, advance)
    return answer


def read_shards(
    engine: Engine,
    shards: Iterable[Sequence[Request]],
    batch_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> Iterator[tuple[Sequence[Request], Batch]]:
    """Yield for each shard its requests and the answer to all of them, in their order.

    They are read in batches of at most `batch_tokens` tokens, padding included (a longer request is
    read alone). A batch never has requests of two shards, but the engine may begin the next shard
    while the caller works on this one. `advance` is called with the tokens of each finished batch.
    """
    asked: deque[tuple[Sequence[Request], list[list[int]]]] = deque()

    def batches() -> Iterator[list[Request]]:
        for requests in shards:
            asked.append((requests, engine.batches(requests, batch_tokens)))
            for batch in asked[-1][1]:
                yield [requests[index] for index in batch]

    parts: list[Batch] = []
    for part in engine.forward(batches()):
        requests, order = asked[0]
        advance(sum(len(requests[index].ids) for index in order[len(parts)]))
        parts.append(part)
        if len(parts) == len(order):
            answer = _in_order(order, parts)
            # Release them now, so that they do not take memory while the caller writes the answer.
            parts = []
            asked.popleft()
            yield requests, answer


def _in_order(batches: Sequence[Sequence[int]], parts: Sequence[Batch]) -> Batch:
    """Merge the answers to batches into one, in the order of the requests.

    batches: indices of requests; parts: the answer to each batch.
    """
    order = [index for batch in batches for index in batch]
    back = torch.from_numpy(np.argsort(order))
    tokens = TokenRows.joined(
        [
            replace(part.tokens, response=np.array(batch, np.int32)[part.tokens.response])
            for batch, part in zip(batches, parts, strict=True)
        ]
    )
    return Batch(
        states={v: torch.cat([part.states[v] for part in parts])[back] for v in parts[0].states},
        norms={v: torch.cat([part.norms[v] for part in parts])[back] for v in parts[0].norms},
        S=np.concatenate([part.S for part in parts])[back.numpy()],
        tokens=tokens.take(np.argsort(tokens.response, kind="stable")),
    )


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of sequences of similar length, batched to at most `batch_tokens` tokens with
    padding; a longer sequence is alone in its batch."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
