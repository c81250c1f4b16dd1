"""A minibatch of seven pairs that share responses, cut into micro-batches in two ways."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embrm.finetuning.batches import MicroBatch, MinibatchPlace
from embrm.lm.tokens import Encoded
from embrm.training.pairs import Pairs

PAIRS = 7
CUTS = [[range(7)], [range(3), range(3, 6), range(6, 7)]]
"""Of a minibatch into micro-batches."""


def _pairs() -> Pairs:
    """Some of a response shared by pairs, labels soft, weights unequal."""
    random = np.random.default_rng(0)

    def numbers(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return Pairs(
        chosen=torch.tensor([0, 2, 2, 5, 6, 8, 10]),
        rejected=torch.tensor([1, 3, 4, 4, 7, 9, 11]),
        label=numbers([1.0, 0.7, 1.0, 1.0, 0.0, 1.0, 0.9]),
        weight=numbers([1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0]),
        margin=numbers(random.random(PAIRS)),
    )


def _texts() -> list[Encoded]:
    random = np.random.default_rng(1)
    found = []
    for row in range(12):
        length, n_prompt = int(random.integers(9, 30)), int(random.integers(0, 6))
        ids = random.integers(5, 300, length).astype(np.int32)
        found.append(Encoded(ids, n_prompt, length - 1 - row % 2, truncated=False))
    return found


ENCODED, PREFERENCES = _texts(), _pairs()
ROWS = torch.cat([PREFERENCES.chosen, PREFERENCES.rejected])
DISTINCT = torch.tensor([ROWS.tolist().index(row) for row in range(12)])


def micro(cut: range) -> MicroBatch:
    """These pairs of a minibatch of all."""
    places = torch.tensor([*cut, *(place + PAIRS for place in cut)])
    within = MinibatchPlace(1, 0, places, DISTINCT)
    return MicroBatch(torch.tensor([*cut]), len(cut) / PAIRS, PAIRS, [], within)
