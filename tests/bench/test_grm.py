"""The GRM benchmark trains real packs on a real cache, and counts the bytes they read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embrm.bench.caches import Tokens, synthetic
from embrm.bench.grm import measure_grm
from embrm.cache.reader import open_cache
from embrm.cache.tensors import lm_head_tensors
from embrm.cache.verify import verify
from embrm.core.errors import UserError

_TOKENS = Tokens(rows=3, top_k=5, vocabulary=40)


@pytest.mark.parametrize("tail_mean", [False, True])
def test_synthetic_token_rows_pass_verification(tmp_path: Path, tail_mean: bool) -> None:
    tokens = replace(_TOKENS, tail_mean=tail_mean)
    folder = synthetic(tmp_path / "cache", {"train": 200}, 8, tokens=tokens)
    assert verify(folder) == []
    cache = open_cache(folder)
    rows = cache.token_rows()
    assert len(rows.target) == 3 * 400
    assert rows.top_ids.shape == (1200, 5)
    assert 0 <= rows.top_ids.min() < rows.top_ids.max() < 40
    assert (rows.tail_mean is not None) == tail_mean
    assert lm_head_tensors(cache)["weight"].shape == (40, 8)


@pytest.mark.slow
def test_bytes_read_are_at_least_the_possible_minimum(tmp_path: Path) -> None:
    (one, (twin, sampled)), (two, (every,)), (memory, (limited,)) = measure_grm(
        tmp_path,
        runs=2,
        parts={"one": ["none (bt)", "grm-sft, 2 token rows"], "two": ["grm-sft"]},
        pairs=2_000,
        width=64,
        tokens=_TOKENS,
    )
    assert (one, two, memory) == ("one", "two", "memory limit")
    assert every["times bt"] == pytest.approx(every["seconds a run"] / twin["seconds a run"])
    assert limited["GB read"] == every["GB read"]
    assert limited["regularizer"] == "grm-sft, --memory 2GB"
    assert twin["times bt"] == 1
    assert twin["GB read"] is None
    assert every["GB read"] > sampled["GB read"] > 0
    assert every["times least"] >= 1
    row = 64 * 2 + 4 * (3 + 2 * 5)
    most = 2_000 * 3 * row + 40 * 64 * 2 * 4  # chosen responses, in four minibatches
    assert every["GB read"] == pytest.approx(most / 1e9, rel=0.02)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_tail_means_add_one_vector_to_every_token_row_read(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "runs": 1,
        "parts": {"both": ["none (bt)", "grm-dpo, 2 token rows"]},
        "pairs": 200,
        "width": 32,
    }
    plain, with_means = (
        next(measure_grm(tmp_path, tokens=replace(_TOKENS, tail_mean=tail_mean), **options))[1][1]
        for tail_mean in (False, True)
    )
    rows = 2 * 400  # two of the three that each response has
    assert with_means["GB read"] - plain["GB read"] == pytest.approx(rows * 32 * 2 / 1e9, rel=1e-6)


def test_a_cache_without_token_rows_is_refused(tmp_path: Path) -> None:
    cache = synthetic(tmp_path / "cache", {"train": 20}, 8)
    with pytest.raises(UserError, match="--token-rows"):
        next(measure_grm(tmp_path, cache))
