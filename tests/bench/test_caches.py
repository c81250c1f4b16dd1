"""Synthetic caches pass verification, and preferences can be learned from them."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from embrm.bench.caches import HELD_OUT, resplit, synthetic
from embrm.cache.reader import Cache, open_cache
from embrm.cache.verify import verify


def _accuracy(cache: Cache) -> float:
    """Accuracy on "id" of a least-squares direction fitted on "train"."""
    states = torch.from_numpy(cache.states("last"))

    def differences(split: str) -> torch.Tensor:
        pairs = cache.pairs.filter(split=split)
        rows = (torch.tensor(pairs[side].to_numpy()) for side in ("chosen", "rejected"))
        chosen, rejected = (states[own] for own in rows)
        return chosen - rejected

    fitted = differences("train")
    weights = torch.linalg.lstsq(fitted, torch.ones(len(fitted), 1)).solution
    return float((differences("id") @ weights > 0).float().mean())


def test_a_synthetic_cache_passes_verification_and_its_preferences_can_be_learned(
    tmp_path: Path,
) -> None:
    folder = synthetic(tmp_path / "cache", {"train": 3000, "id": 1000}, 8)
    assert verify(folder) == []
    cache = open_cache(folder)
    assert cache.pairs["split"].value_counts().sort("split").rows() == [
        ("id", 1000),
        ("train", 3000),
    ]
    sides = cache.pairs.select("chosen", "rejected").to_numpy()
    assert sorted(sides.flatten()) == [*range(8000)]
    assert (sides // 2 == sides[:, :1] // 2).all()  # adjacent rows
    assert 0.4 < (sides[:, 0] % 2).mean() < 0.6  # the position does not reveal the chosen response
    assert 0.65 < _accuracy(cache) < 0.85
    assert cache.dtype == "bfloat16"
    assert abs(float(np.square(cache.states("last")).mean()) - 1) < 0.1


def test_a_synthetic_cache_is_deterministic(tmp_path: Path) -> None:
    one, two = (synthetic(tmp_path / name, {"train": 50}, 8) for name in "ab")
    assert np.array_equal(open_cache(one).states("last"), open_cache(two).states("last"))
    assert open_cache(one).pairs.equals(open_cache(two).pairs)


def test_resplit_only_moves_held_out_prompts(tmp_path: Path) -> None:
    source = open_cache(synthetic(tmp_path / "source", {"train": 1000, "id": 10}, 8))
    again = open_cache(resplit(tmp_path / "again", source.folder, 0.2))
    assert np.array_equal(again.states("last"), source.states("last"))
    assert 150 < again.pairs.filter(split=HELD_OUT).height < 250
    train = source.pairs.filter(split="train")
    assert again.pairs.drop("split").equals(train.drop("split"))
    assert {*again.pairs["split"]} == {"train", HELD_OUT}
    sides = again.pairs.group_by("prompt_id").agg(pl.col("split").n_unique())
    assert (sides["split"] == 1).all()
