"""Tests of the dry run: it predicts what an extraction does and how large its cache is."""

from pathlib import Path

import pytest
from extract_world import make, spec_of

from embrm.cache.reader import open_cache
from embrm.cache.tensors import lm_head_tensors
from embrm.extraction.dry_run import dry_run


def test_a_dry_run_times_a_sample_for_any_budget(world: dict[str, str]) -> None:
    assert dry_run(spec_of(world), device="cpu", batch_tokens=1).tokens_per_second > 0


def test_the_estimate_agrees_with_the_extraction(world: dict[str, str], extracted: Path) -> None:
    planned = dry_run(spec_of(world), device="cpu")
    opened = open_cache(extracted)
    lengths = opened.responses["n_prompt"] + opened.responses["n_response"]
    assert planned.responses == opened.responses.height
    assert planned.tokens == lengths.sum()
    assert planned.prompts == 12
    assert {split: counts["pairs"] for split, counts in planned.splits.items()} == dict(
        opened.pairs.group_by("split").len().rows()
    )
    vectors = (
        sum(path.stat().st_size for path in extracted.rglob("part-*.parquet"))
        + (extracted / "lm_head.safetensors").stat().st_size
    )
    assert planned.cache_bytes["total"] == pytest.approx(vectors, rel=0.5)
    assert planned.tokens_per_second > 0
    assert planned.seconds == pytest.approx(planned.tokens / planned.tokens_per_second)
    assert planned.leaks["prompts_shared"].to_list() == opened.leaks["prompts_shared"].to_list()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16", "states": ["last"], "top_k": 1000},
        {"token_rows": 50, "tail_mean": False, "token_positions": "random"},
        {"token_rows": 0, "tail_mean": False},
    ],
)
def test_the_estimated_sizes_are_exact(
    world: dict[str, str], tmp_path: Path, changes: dict
) -> None:
    spec = spec_of(world, **changes)
    priced = dry_run(spec, device="cpu").cache_bytes
    opened = open_cache(make(world, tmp_path / "out", spec))
    vectors = {
        "states": sum(opened.stored_states(view).nbytes for view in opened.views),
        "token_states": 0,
        "top_logits": 0,
        "tail_means": 0,
        "lm_head": sum(tensor.nbytes for tensor in lm_head_tensors(opened).values()),
    }
    if spec.token_rows:
        tokens = opened.token_rows()
        vectors["token_states"] = tokens.state.nbytes
        vectors["top_logits"] = tokens.top_ids.nbytes + tokens.top_logits.nbytes
        vectors["tail_means"] = 0 if tokens.tail_mean is None else tokens.tail_mean.nbytes
    assert (vectors["tail_means"] > 0) == spec.tail_mean
    scalars = priced["scalars"]
    assert priced == vectors | {"scalars": scalars, "total": sum(vectors.values()) + scalars}
