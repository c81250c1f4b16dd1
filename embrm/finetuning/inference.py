"""Rewards and states of many texts under a model, shared among the processes that train it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate.utils import reduce
from numpy.typing import NDArray
from torch import Tensor

from embrm.extraction.reading import batches_by_length
from embrm.finetuning.batches import pad_texts
from embrm.lm.tokens import Encoded

_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}
"""Tokens of a batch, padding included, by device type."""


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of `value` over all processes that train together."""
    total: Tensor = reduce(value, "sum")
    return total


@torch.no_grad()
def score_texts(
    model: torch.nn.Module,
    encoded: Sequence[Encoded],
    rows: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[int], object] = lambda _: None,
    read: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> NDArray[np.float32]:
    """Return the rewards float32 [rows] of the responses `encoded[row]`, on every process.

    Texts are read in batches of similar length, which are the same for any number of processes;
    each process reads some of them. advance: called with the number of texts of each batch.
    read: computes values [n, ...] instead of rewards, from token ids int64 [n, length] and final
    positions int64 [n].
    """
    read = read or (lambda ids, final: model(ids, final)[0])
    was_training = model.training
    model.eval()
    batches = batches_by_length([len(encoded[row].ids) for row in rows], _BATCH_TOKENS[device.type])
    found = torch.zeros(len(rows), device=device)
    # With sharded weights a forward step takes all processes, so each one takes as many turns;
    # one that has no batch left reads the last batch and discards the result.
    for turn in range(-(-len(batches) // processes)):
        place = turn * processes + process
        batch = batches[min(place, len(batches) - 1)]
        text = pad_texts([encoded[rows[index]] for index in batch])
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            values = read(text["ids"].to(device), text["final"].to(device)).float()
        if not turn:
            found = values.new_zeros(len(rows), *values.shape[1:])
        if place < len(batches):
            found[torch.tensor(batch, device=device)] = values
        advance(len(batch))
    model.train(was_training)
    result: NDArray[np.float32] = sum_over_processes(found).cpu().numpy()
    return result
