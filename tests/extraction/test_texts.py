"""Tests of the prepared texts: identity, exclusions and limits."""

import json
from pathlib import Path

import numpy as np
import pytest
from extract_models import save_model, tokenizer
from extract_world import make, spec_of
from transformers import LlamaConfig, LlamaForCausalLM

from embrm.cache.reader import open_cache
from embrm.core.errors import UserError
from embrm.extraction.texts import prepare_texts


def test_moving_model_and_data_keeps_the_identity(
    world: dict[str, str], extracted: Path, tmp_path: Path
) -> None:
    model = Path(world["model"]).rename(tmp_path / "moved")
    try:
        moved = prepare_texts(spec_of(world | {"model": str(model)}))
        assert moved.identity == open_cache(extracted).manifest.identity
    finally:
        model.rename(world["model"])


def test_over_long_rows_are_counted_and_listed(world: dict[str, str]) -> None:
    whole = prepare_texts(spec_of(world))
    limit = int(np.median(whole.lengths))
    cut = prepare_texts(spec_of(world, max_length=limit))
    assert max(cut.lengths) <= limit
    lost = whole.dataset.pairs.height - cut.dataset.pairs.height
    assert cut.dataset.exclusions["reason"].to_list() == ["over_long"] * lost
    assert lost > 0
    by_id = dict(zip(whole.dataset.responses["response_id"], whole.encoded, strict=True))
    for response_id, entry in zip(cut.dataset.responses["response_id"], cut.encoded, strict=True):
        assert entry.ids.tolist() == by_id[response_id].ids.tolist()


def test_pairs_with_identical_tokens_are_excluded(world: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    rows = [
        {"prompt": "Who?", "chosen": "The river.", "rejected": "The river. "},
        {"prompt": "Who?", "chosen": "The boats.", "rejected": "The mud."},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    strip = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    save_model(model, "llama-tied", tokenizer(template=strip))
    prepared = prepare_texts(spec_of(world, model=str(model), data=[{"path": str(data)}]))
    assert prepared.dataset.pairs.height == 1
    assert prepared.dataset.exclusions["reason"].to_list() == ["identical"]
    assert len(prepared.encoded) == prepared.dataset.responses.height == 2


def test_left_truncation_is_recorded(world: dict[str, str], tmp_path: Path) -> None:
    spec = spec_of(world, max_length=60, truncation="left")
    opened = open_cache(make(world, tmp_path / "left", spec))
    cut = opened.responses["truncated"]
    total = opened.responses["n_prompt"] + opened.responses["n_response"]
    assert 0 < cut.sum() < len(cut)
    assert set(total.filter(cut)) == {60}


def test_limit_applies_to_sources_without_their_own(world: dict[str, str]) -> None:
    data = [
        {"path": world["data"], "where": {"split": "train"}},
        {"path": world["data"], "where": {"split": "id"}, "limit": 7},
    ]
    pairs = prepare_texts(spec_of(world, data=data, limit=5)).dataset.pairs
    assert dict(pairs.group_by("split").len().rows()) == {"train": 5, "id": 7}


def test_all_rows_excluded_is_an_error_with_counts(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="over_long"):
        make(world, tmp_path / "none", spec_of(world, max_length=4))
    assert not (tmp_path / "none").exists()


def test_token_ids_beyond_the_model_are_refused(world: dict[str, str], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "llama-tied", tokenizer())
    small = LlamaConfig.from_pretrained(folder)
    small.vocab_size = 100
    LlamaForCausalLM(small).save_pretrained(folder)
    with pytest.raises(UserError, match="the vocabulary has 100 ids"):
        prepare_texts(spec_of(world, model=str(folder)))
