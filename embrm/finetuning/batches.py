"""The minibatches of a sweep, cut into the micro-batches that each process reads at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from embrm.core.streams import stream
from embrm.extraction.positions import predicting_positions
from embrm.finetuning.dropout import ViewMasks
from embrm.lm.tokens import Encoded
from embrm.training.heads import HeadSpec, dropout_masks
from embrm.training.order import Order
from embrm.training.pairs import Pairs
from embrm.training.regularizers import Regularizer


@dataclass(frozen=True)
class MinibatchPlace:
    """Where a micro-batch lies in its minibatch, for losses of the whole minibatch.

    epoch: from 1. minibatch: its number in the epoch, from 0. places: int64 [2b], the places of
    the micro-batch's responses among the 2·size of the minibatch, where the chosen ones come
    first. distinct: int64 [m], one place in the minibatch of each of its distinct responses.
    """

    epoch: int
    minibatch: int
    places: Tensor
    distinct: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """The pairs of one forward step on one device.

    pairs: int64 [b], numbers of pairs. share: b / size, the part of the minibatch's `size` pairs;
    it is 0 where no pair was left for this process, which then reads one pair that does not count.
    kept: the head's dropout masks float32 [2b, width], of the chosen, then the rejected responses.
    """

    pairs: Tensor
    share: float
    size: int
    kept: list[Tensor]
    within: MinibatchPlace


class Minibatches:
    """A batch sampler of the micro-batches that one process reads in an epoch.

    A minibatch has the pairs and the head's dropout masks of the sweep's minibatch, whatever the
    number of processes and the size of a micro-batch.
    """

    def __init__(
        self,
        pairs: Pairs,
        order: Order,
        head: HeadSpec,
        seed: int,
        *,
        batch: int,
        micro: int,
        process: int,
        processes: int,
        lengths: Tensor | None = None,
    ) -> None:
        """batch, micro: pairs of a minibatch and of a micro-batch. process: this one's number among
        `processes`. lengths: int64 [N], tokens of the longer text of each pair; if given, a
        minibatch is cut into micro-batches of similar length, the longest first, to pad less.
        """
        self._pairs, self._order, self._head, self._seed = pairs, order, head, seed
        self._lengths = lengths
        self._batch, self._micro = batch, micro
        self._process, self._processes = process, processes
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to read next, from 0."""
        self._epoch = epoch

    @property
    def turns(self) -> int:
        """Number of micro-batches that each process reads of a whole minibatch."""
        return self._turns(self._batch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self._pairs), self._batch)
        return whole * self.turns + self._turns(rest)

    def _turns(self, size: int) -> int:
        return -(-size // (self._micro * self._processes))

    def __iter__(self) -> Iterator[MicroBatch]:
        chosen, rejected = self._pairs.chosen, self._pairs.rejected
        dropout = stream(self._seed, "dropout", self._epoch + 1)
        minibatches = self._order.minibatches(self._epoch + 1, self._batch)
        for number, some in enumerate(minibatches):
            size = len(some)
            rows, places = torch.cat([chosen[some], rejected[some]]).unique(return_inverse=True)
            kept = dropout_masks(self._head, len(rows), dropout)
            distinct = torch.from_numpy(np.unique(places.numpy(), return_index=True)[1])
            cut = torch.arange(size)
            if self._lengths is not None:
                cut = self._lengths[some].argsort(descending=True, stable=True)
            for turn in range(self._turns(size)):
                first = (turn * self._processes + self._process) * self._micro
                own = cut[first : first + self._micro]
                share = len(own) / size
                if not len(own):
                    own = torch.zeros(1, dtype=torch.int64)
                ends = torch.cat([own, own + size])
                of_own = [mask[places[ends]] for mask in kept]
                within = MinibatchPlace(self._epoch + 1, number, ends, distinct)
                yield MicroBatch(some[own], share, size, of_own, within)


class PairTokens(Dataset[dict[str, Any]]):
    """A data set whose items are the inputs of a forward step; see `__getitems__`."""

    def __init__(
        self,
        encoded: Sequence[Encoded],
        pairs: Pairs,
        regularizer: Regularizer | None = None,
        S: Tensor | None = None,
        view_masks: ViewMasks | None = None,
    ) -> None:
        """encoded: the texts of all responses, which the rows of `pairs` index.

        regularizer: of kind grm-*, for which log-probabilities are computed; S: float32 [all], the
        reference model's. view_masks: of a run with SimCSE, for two views of every response.
        """
        self._encoded, self._pairs = encoded, pairs
        self._weight = pairs.relative_weight
        self._regularizer, self._S = regularizer, S
        self._view_masks = view_masks

    def __getitem__(self, index: Any) -> dict[str, Any]:
        raise NotImplementedError("a batch sampler's items are read by __getitems__")

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitems__(self, micro: MicroBatch) -> dict[str, Any]:
        """Return the inputs of a micro-batch's forward step.

        `text`: the arguments of `RewardModel.forward`, for the chosen, then the rejected responses.
        `pairs`: the keyword arguments of `StepLoss`. `share`, `size`: of the micro-batch. `within`:
        places and distinct, as of `MinibatchPlace`.
        """
        pairs, some = self._pairs, micro.pairs
        rows = torch.cat([pairs.chosen[some], pairs.rejected[some]])
        label = pairs.label[some]
        of_pairs: dict[str, Any] = {
            "label": label,
            "weight": self._weight[some],
            "margin": None if pairs.margin is None else pairs.margin[some],
        }
        weighed = None
        if self._regularizer is not None and self._S is not None:
            chosen, rejected = torch.arange(len(rows)).chunk(2)
            weighed = self._regularizer.responses_read(len(rows), chosen, rejected, label)
            number = (weighed.cumsum(0) - 1).clamp_min(0)
            of_pairs["numbers"] = number.chunk(2)
            of_pairs["reference"] = self._S[rows[weighed]]
        encoded = [self._encoded[row] for row in rows.tolist()]
        text = pad_texts(encoded, None if weighed is None else weighed.tolist())
        text["kept"] = micro.kept
        within = micro.within
        if self._view_masks is not None:
            text["masks"] = self._view_masks.of(within.epoch, within.minibatch, rows.tolist())
        return {
            "text": text,
            "pairs": of_pairs,
            "share": micro.share,
            "size": micro.size,
            "within": {"places": within.places, "distinct": within.distinct},
        }


def pad_texts(encoded: Sequence[Encoded], weighed: Sequence[bool] | None = None) -> dict[str, Any]:
    """Return the arguments of `RewardModel.forward` for some responses, padded on the right.

    weighed: for each response, whether its log-probability S is wanted.
    """
    length = max(len(entry.ids) for entry in encoded)
    ids = np.zeros((len(encoded), length), dtype=np.int64)
    for padded, entry in zip(ids, encoded, strict=True):
        padded[: len(entry.ids)] = entry.ids
    found: dict[str, Any] = {
        "ids": torch.from_numpy(ids),
        "final": torch.tensor([entry.final_position for entry in encoded]),
    }
    if weighed is None:
        return found
    places, targets = [], []
    for row, (entry, wanted) in enumerate(zip(encoded, weighed, strict=True)):
        if wanted:
            span = predicting_positions(entry.n_prompt, len(entry.ids))
            places.append(row * length + np.arange(span.start, span.stop))
            targets.append(entry.ids[span.start + 1 : span.stop + 1].astype(np.int64))
    return found | {
        "predicting": torch.from_numpy(np.concatenate(places)),
        "targets": torch.from_numpy(np.concatenate(targets)),
        "counts": [len(own) for own in places],
    }
