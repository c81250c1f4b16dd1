"""Micro-batches are the sweep's minibatches, whoever reads how much of them at a time."""

import numpy as np
import pytest
import torch

from embrm.finetuning.batches import Minibatches, pad_texts
from embrm.lm.tokens import Encoded
from embrm.training.heads import HeadSpec
from embrm.training.order import Order
from embrm.training.pairs import Pairs
from embrm.training.row_store import RowStore

PAIRS, BATCH = 37, 8
ONES = torch.ones(PAIRS)
CHOSEN = torch.arange(PAIRS) * 7 % 20
DATA = Pairs(CHOSEN, (CHOSEN + 1 + torch.arange(PAIRS) % 3) % 20, ONES, ONES, None)
HEAD = HeadSpec(kind="mlp", widths=(3,), dropout=0.5)


def _read(micro: int, processes: int) -> list[Minibatches]:
    order = Order(DATA.chosen, RowStore(torch.empty(0, 4)), 5)
    found = [
        Minibatches(DATA, order, HEAD, 5, batch=BATCH, micro=micro, process=p, processes=processes)
        for p in range(processes)
    ]
    for one in found:
        one.set_epoch(1)
    return found


@pytest.mark.parametrize(("micro", "processes"), [(8, 1), (4, 2), (2, 1), (1, 4), (4, 1), (2, 2)])
def test_every_minibatch_is_whole_and_every_process_takes_as_many_turns(
    micro: int, processes: int
) -> None:
    (whole,) = _read(8, 1)
    expected = [*whole]
    assert [len(one.pairs) for one in expected] == [8, 8, 8, 8, 5]
    read = _read(micro, processes)
    of_processes = [[*one] for one in read]
    assert {len(own) for own in of_processes} == {len(one) for one in read}
    assert read[0].turns == BATCH // (micro * processes)
    in_order = [one for turn in zip(*of_processes, strict=True) for one in turn]
    for minibatch in expected:
        size, pairs, masks, share = minibatch.size, [], [], 0.0
        while share < 1 - 1e-9:
            one = in_order.pop(0)
            assert one.size == size
            assert one.share == pytest.approx((len(one.pairs) if one.share else 0) / size)
            share += one.share
            if one.share:
                pairs.append(one.pairs)
                masks.append(one.kept[0].view(2, -1, 3))
        while in_order and not in_order[0].share:  # a pair stands in where none is left
            assert len(in_order.pop(0).pairs) == 1
        assert torch.equal(torch.cat(pairs), minibatch.pairs)
        assert torch.equal(torch.cat(masks, 1).flatten(0, 1), minibatch.kept[0])
    assert not in_order


def test_a_micro_batch_knows_where_in_its_minibatch_it_is() -> None:
    of_whole = [*_read(8, 1)[0]]
    in_order = [one for turn in zip(*map(list, _read(2, 2)), strict=True) for one in turn]
    for number, whole in enumerate(of_whole):
        rows = torch.cat([DATA.chosen[whole.pairs], DATA.rejected[whole.pairs]])
        assert whole.within.places.tolist() == [*range(2 * whole.size)]
        assert rows[whole.within.distinct].tolist() == rows.unique().tolist()
        found = [one for one in in_order if one.within.minibatch == number and one.share]
        places = torch.cat([one.within.places for one in found])
        assert sorted(places.tolist()) == [*range(2 * whole.size)]
        for one in found:
            own = torch.cat([DATA.chosen[one.pairs], DATA.rejected[one.pairs]])
            assert torch.equal(own, rows[one.within.places])
            assert torch.equal(one.within.distinct, whole.within.distinct)
            assert one.within.epoch == whole.within.epoch == 2


def test_texts_are_padded_and_predicted_where_they_are() -> None:
    encoded = [
        Encoded(np.array([5, 6, 7, 8, 9], np.int32), 3, 4, truncated=False),
        Encoded(np.array([1, 2, 3], np.int32), 0, 1, truncated=False),
    ]
    found = pad_texts(encoded, [True, True])
    assert found["ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    assert found["final"].tolist() == [4, 1]
    # Without a prompt, the first token has nothing before it.
    assert found["predicting"].tolist() == [2, 3, 5, 6]
    assert found["targets"].tolist() == [8, 9, 2, 3]
    assert found["counts"] == [2, 2]
    assert pad_texts(encoded, [False, True])["predicting"].tolist() == [5, 6]


def test_pairs_of_like_length_are_read_together_the_longest_first() -> None:
    lengths = torch.from_numpy(np.random.default_rng(2).permutation(PAIRS))
    order = Order(DATA.chosen, RowStore(torch.empty(0, 4)), 5)
    shape = {"batch": PAIRS, "process": 0, "processes": 1}
    (drawn,) = Minibatches(DATA, order, HEAD, 5, micro=PAIRS, **shape)
    found = [*Minibatches(DATA, order, HEAD, 5, micro=5, lengths=lengths, **shape)]
    read = torch.cat([one.pairs for one in found])
    assert lengths[read].tolist() == list(range(PAIRS))[::-1]
    place = drawn.pairs.argsort()[read]  # of each pair where nothing is sorted
    masks = torch.cat([one.kept[0].view(2, -1, 3) for one in found], 1)
    assert torch.equal(masks, drawn.kept[0].view(2, -1, 3)[:, place])
