"""Which pairs make up each minibatch: a seeded shuffle whose reads stay close together."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from embrm.core.streams import stream
from embrm.training.states import WINDOW_BLOCKS, States


class Order:
    """The minibatches of every epoch, from the seed and the places of the pairs alone.

    A pair belongs to the block of states that holds its chosen response. An epoch shuffles the
    blocks, takes `WINDOW_BLOCKS` of them at a time and shuffles the pairs within; where there are
    no more blocks than that, this is a plain shuffle of all pairs. Other responses than the chosen
    one may lie anywhere; mostly they lie beside it.
    """

    def __init__(self, chosen: Tensor, states: States, seed: int) -> None:
        """chosen: row of each pair's chosen response, int64 [N]."""
        self._states, self._seed = states, seed
        self._blocks, places = np.unique(chosen.cpu() // states.block_rows, return_inverse=True)
        self._places = places.reshape(-1)

    def minibatches(self, epoch: int, batch: int) -> Iterator[Tensor]:
        """Numbers of the pairs of one minibatch after the other, int64 [batch]; the last one may
        be smaller. Between windows, states are read ahead and let go of."""
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
