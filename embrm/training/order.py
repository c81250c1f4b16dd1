"""The order of the pairs in an epoch: a seeded shuffle that reads the states window by window."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from embrm.core.streams import stream
from embrm.training.row_store import WINDOW_BLOCKS, RowStore


class Order:
    """Divides the pairs into minibatches; the result depends only on the seed and their rows.

    A pair belongs to the block of states that holds its chosen response; the rejected one usually
    lies beside it. An epoch shuffles the blocks, takes `WINDOW_BLOCKS` of them at a time and
    shuffles the pairs of these. With no more blocks than that, it is a plain shuffle of all pairs.
    """

    def __init__(self, chosen: Tensor, states: RowStore, seed: int) -> None:
        """chosen: row of each pair's chosen response, int64 [N]."""
        self._states, self._seed = states, seed
        self._blocks, places = np.unique(chosen.cpu() // states.block_rows, return_inverse=True)
        self._places = places.reshape(-1)

    def minibatches(self, epoch: int, batch: int) -> Iterator[Tensor]:
        """Yield the pair numbers of every minibatch, int64 [batch]; the last one may be smaller.

        Between windows, the pages of the last are released and the next window is read ahead.
        """
        random = stream(self._seed, "order", epoch)
        shuffled = random.permutation(len(self._places))
        turn = random.permutation(len(self._blocks))
        rank = np.empty_like(turn)
        rank[turn] = np.arange(len(turn))
        windows = rank[self._places[shuffled]] // WINDOW_BLOCKS
        order = shuffled[np.argsort(windows, kind="stable")]
        starts = np.searchsorted(np.sort(windows), np.arange(windows.max() + 2))
        window = -1
        for first in range(0, len(order), batch):
            while window + 1 < len(starts) - 1 and starts[window + 1] <= first:
                window += 1
                self._states.release_pages()
                ahead = turn[(window + 1) * WINDOW_BLOCKS : (window + 2) * WINDOW_BLOCKS]
                self._states.read_ahead(self._blocks[np.sort(ahead)].tolist())
            yield torch.from_numpy(order[first : first + batch])
        self._states.release_pages()
