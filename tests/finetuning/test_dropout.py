"""Dropout masks of the two views of a response."""

import pytest
import torch

from embrm.finetuning.dropout import ViewMasks


def test_masks_depend_on_their_place_alone() -> None:
    masks = ViewMasks(seed=3, sites=2, width=4000, dropout=0.05)
    found = masks.of(1, 5, [7, 9, 7])
    assert found.shape == (2, 2, 3, 4000)
    assert torch.equal(found[:, :, 0], found[:, :, 2])
    assert torch.equal(masks.of(1, 5, [9])[:, :, 0], found[:, :, 1])
    others = [masks.of(2, 5, [7]), masks.of(1, 6, [7]), found[:, :, 1:2], found[:, [1, 0], :1]]
    for other in others:
        assert not torch.equal(other, found[:, :, :1])
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.95)}
    assert float((found == 0).float().mean()) == pytest.approx(0.05, abs=0.005)
    assert torch.equal(ViewMasks(3, 2, 8, 0.0).of(1, 5, [7]), torch.ones(2, 2, 1, 8))
