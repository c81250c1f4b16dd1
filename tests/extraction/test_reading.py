"""Tests of reading: batches keep the order of requests and the token budget."""

from collections import deque

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrm.cache.schema import TokenRows
from embrm.extraction.engine import Batch, Request
from embrm.extraction.reading import batches_by_length, read_shards
from embrm.lm.head import LmHead


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    budget=st.integers(1, 200),
    shard_rows=st.integers(1, 30),
    ahead=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_reading_in_batches_keeps_order_and_budget(
    lengths: list[int], budget: int, shard_rows: int, ahead: int
) -> None:
    requests = [
        Request(np.full(n, i, np.int32), 0, n - 1, np.arange(i % 3, dtype=np.int32))
        for i, n in enumerate(lengths)
    ]
    shards = [requests[i : i + shard_rows] for i in range(0, len(requests), shard_rows)]
    engine, seen = _Echo(ahead), []
    answers = list(read_shards(engine, shards, budget, seen.append))
    assert [asked for asked, _ in answers] == shards
    S = [S for _, batch in answers for S in batch.S]
    assert list(range(len(lengths))) == S
    states = torch.cat([batch.states["last"] for _, batch in answers])
    assert states[:, 0].tolist() == list(range(len(lengths)))
    targets = np.concatenate([batch.tokens.target for _, batch in answers])
    assert targets.tolist() == [i for i in range(len(lengths)) for _ in range(i % 3)]
    assert sum(seen) == sum(lengths)
    for shape in engine.shapes:
        assert shape[0] == 1 or shape[0] * shape[1] <= budget


class _Echo:
    """An engine that answers with the first id of each request, and delays some batches."""

    width, batch_tokens, environment = 1, 1, {}
    head = LmHead(torch.eye(1))

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self.shapes: list[tuple[int, int]] = []

    def batches(self, requests, batch_tokens):
        return batches_by_length([len(r.ids) for r in requests], batch_tokens)

    def forward(self, batches):
        begun = deque()
        for requests in batches:
            begun.append(self._answer(requests))
            if len(begun) > self.ahead:
                yield begun.popleft()
        yield from begun

    def _answer(self, requests):
        self.shapes.append((len(requests), max(len(r.ids) for r in requests)))
        first = torch.tensor([float(r.ids[0]) for r in requests])
        counts = [len(r.positions) for r in requests]
        response = np.repeat(np.arange(len(requests), dtype=np.int32), counts)
        own = first.numpy()[response]
        return Batch(
            states={"last": first[:, None]},
            norms={"last": first},
            S=first.double().numpy(),
            tokens=TokenRows(
                response=response,
                position=np.concatenate([r.positions for r in requests]),
                target=own.astype(np.int32),
                target_logit=own,
                logsumexp=own,
                state=own[:, None],
                top_ids=own.astype(np.int32)[:, None],
                top_logits=own[:, None],
            ),
        )
