"""Tests of extraction: stored content, identical bytes after interruptions, and refusals."""

import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from extract_models import save_model, tokenizer
from extract_world import make, spec_of
from transformers import AutoModelForCausalLM

from embrm.cache.reader import open_cache
from embrm.cache.tensors import lm_head_tensors, to_tensor
from embrm.cache.verify import verify
from embrm.cache.writer import CacheWriter
from embrm.core.errors import UserError
from embrm.extraction import run
from embrm.extraction.choice import load_engine_for
from embrm.extraction.reading import read, read_shards
from embrm.extraction.run import extract
from embrm.extraction.spec import ExtractSpec
from embrm.extraction.texts import prepare_texts


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_the_cache_contains_the_engines_answers(world: dict[str, str], extracted: Path) -> None:
    assert verify(extracted) == []
    opened, prepared = open_cache(extracted), prepare_texts(spec_of(world))
    rows = range(len(prepared.encoded))
    batch = read(load_engine_for(prepared, "cpu"), prepared.requests(rows), 1)
    for view in ("last", "mean"):
        assert torch.allclose(
            to_tensor(opened.stored_states(view)), batch.states[view], rtol=1e-4, atol=1e-5
        )
        norms = opened.responses[f"norm.{view}"].to_numpy()
        assert norms == pytest.approx(batch.states[view].norm(dim=1).numpy(), rel=1e-5)
    responses = opened.responses
    assert responses["S"].to_numpy() == pytest.approx(batch.S, rel=1e-5)
    assert responses["response_id"].to_list() == prepared.dataset.responses["response_id"].to_list()
    assert (responses["n_prompt"] + responses["n_response"]).to_list() == list(prepared.lengths)
    assert (responses["final_position"] + 1).to_list() == list(prepared.lengths)
    assert opened.pairs.height == 48
    assert set(opened.splits) == {"train", "id"}


def test_token_rows_belong_to_their_responses(world: dict[str, str], extracted: Path) -> None:
    opened, prepared = open_cache(extracted), prepare_texts(spec_of(world))
    tokens = opened.token_rows()
    assert (np.diff(tokens.response) >= 0).all()
    assert np.bincount(tokens.response).max() == 3
    assert tokens.top_ids.shape == (len(tokens.response), 4)
    for row, (response, position) in enumerate(zip(tokens.response, tokens.position, strict=True)):
        entry = prepared.encoded[response]
        assert entry.n_prompt - 1 <= position < len(entry.ids) - 1
        assert tokens.target[row] == entry.ids[position + 1]
    head = lm_head_tensors(opened)
    logits = to_tensor(tokens.state) @ head["weight"].T * head["scale"]
    assert logits.logsumexp(1).numpy() == pytest.approx(tokens.logsumexp, rel=1e-4)
    chosen = logits[torch.arange(len(logits)), torch.from_numpy(tokens.target).long()]
    assert chosen.numpy() == pytest.approx(tokens.target_logit, rel=1e-3, abs=1e-4)
    tail = logits.softmax(1).scatter(1, torch.from_numpy(tokens.top_ids).long(), 0)
    tail = tail.scatter(1, torch.from_numpy(tokens.target).long()[:, None], 0)
    expected = tail @ head["weight"] / tail.sum(1, keepdim=True)
    assert tokens.tail_mean is not None
    assert torch.allclose(to_tensor(tokens.tail_mean), expected, rtol=1e-3, atol=1e-4)


def test_unused_tail_means_and_spacing_do_not_change_ids_and_bytes(
    world: dict[str, str], extracted: Path, tmp_path: Path
) -> None:
    """Caches have the ids and bytes that they had before these options existed."""
    spec = spec_of(world, tail_mean=False, token_positions="random")
    opened = open_cache(make(world, tmp_path / "plain", spec))
    assert opened.manifest.identity["token_rows"] == {
        "rule": "Philox keyed by SHA-256 of seed:response_id, without replacement",
        "rows": 3,
        "top_k": 4,
        "seed": 0,
    }
    assert opened.manifest.extraction.keys() == ExtractSpec.model_fields.keys() - {
        "tail_mean",
        "token_positions",
        "engine",
    }
    assert "engine" not in opened.manifest.identity
    assert "tail" not in (tmp_path / "plain" / "manifest.json").read_text()
    assert opened.token_rows().tail_mean is None
    for name in content(extracted):
        if name.startswith("responses"):
            assert (tmp_path / "plain" / name).read_bytes() == (extracted / name).read_bytes()
    recorded = open_cache(extracted).manifest
    assert recorded.identity["token_rows"] == {
        "rule": "Philox keyed by SHA-256 of seed:response_id, evenly spaced from a random start",
        "rows": 3,
        "top_k": 4,
        "seed": 0,
        "tail_mean": True,
    }
    assert ExtractSpec.parse(recorded.extraction, "manifest") == spec_of(world)


def test_extracting_twice_gives_the_same_bytes(
    world: dict[str, str], extracted: Path, tmp_path: Path
) -> None:
    again = make(world, tmp_path / "again")
    assert content(again) == content(extracted)
    make(world, again)  # finished already, so nothing is done
    assert content(again) == content(extracted)


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_interrupted_and_resumed_gives_the_same_bytes(
    world: dict[str, str],
    extracted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
) -> None:
    finished = run._shard
    calls = []

    def stop_after(*arguments):
        calls.append(1)
        if len(calls) > shards:
            raise KeyboardInterrupt
        return finished(*arguments)

    monkeypatch.setattr(run, "_shard", stop_after)
    with pytest.raises(KeyboardInterrupt):
        make(world, tmp_path / "cut")
    monkeypatch.setattr(run, "_shard", finished)
    with pytest.raises(UserError, match="incomplete"):
        open_cache(tmp_path / "cut")
    make(world, tmp_path / "cut")
    assert content(tmp_path / "cut") == content(extracted)


def test_the_model_reads_the_next_shard_while_one_is_written(
    world: dict[str, str], extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, write = threading.Semaphore(0), CacheWriter.write_shard

    def wait_then_write(writer, index, *rows):
        assert index == 5 or reading.acquire(timeout=20)  # no shard follows the last
        write(writer, index, *rows)

    def read_and_note(*given):
        for number, answer in enumerate(read_shards(*given)):
            if number:
                reading.release()
            yield answer

    monkeypatch.setattr(CacheWriter, "write_shard", wait_then_write)
    monkeypatch.setattr(run, "read_shards", read_and_note)
    make(world, tmp_path / "out")
    assert content(tmp_path / "out") == content(extracted)


@pytest.mark.parametrize(
    ("fails", "read"),
    # The shard before, the one that failed and the one read meanwhile; or the last of six.
    [(1, 3), (5, 6)],
)
def test_an_error_of_the_writer_stops_the_model(
    world: dict[str, str],
    extracted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: int,
    read: int,
) -> None:
    shards, write = [], CacheWriter.write_shard

    def fill_the_disk(writer, index, *rows):
        if index == fails:
            raise UserError("disk full")
        write(writer, index, *rows)

    def read_and_note(*given):
        for answer in read_shards(*given):
            shards.append(answer)
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write_shard", fill_the_disk)
        patch.setattr(run, "read_shards", read_and_note)
        with pytest.raises(UserError, match="disk full"):
            make(world, tmp_path / "out")
    assert len(shards) == read
    make(world, tmp_path / "out")
    assert content(tmp_path / "out") == content(extracted)


def test_other_batch_sizes_change_rounding_only(
    world: dict[str, str], extracted: Path, tmp_path: Path
) -> None:
    other = open_cache(make(world, tmp_path / "other", batch_tokens=64))
    whole = open_cache(extracted)
    assert other.cache_id == whole.cache_id
    assert np.allclose(other.states("mean"), whole.states("mean"), rtol=1e-4, atol=1e-5)
    assert (other.token_rows().position == whole.token_rows().position).all()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("template", {"template": "plain"}),
        ("dtype", {"dtype": "bfloat16"}),
        ("max_length", {"max_length": 100}),
        ("views", {"states": ["last"]}),
        ("seed", {"seed": 1}),
        (r"tail_mean = True, not None", {"tail_mean": False}),
        ("rule", {"token_positions": "random"}),
    ],
)
def test_a_cache_with_other_settings_is_not_continued(
    world: dict[str, str], extracted: Path, field: str, changes: dict
) -> None:
    before = content(extracted)
    with pytest.raises(UserError, match=field):
        make(world, extracted, spec_of(world, **changes))
    assert content(extracted) == before


def test_bfloat16_without_token_rows(world: dict[str, str], tmp_path: Path) -> None:
    spec = spec_of(
        world, dtype="bfloat16", token_rows=0, tail_mean=False, states=["prenorm", "layer:1"]
    )
    opened = open_cache(make(world, tmp_path / "half", spec))
    assert opened.dtype == "bfloat16"
    assert opened.views == ("layer:1", "prenorm")
    with pytest.raises(UserError, match="has no token rows"):
        opened.token_rows()


def test_an_error_about_nan_states_names_the_response(
    world: dict[str, str], tmp_path: Path
) -> None:
    broken = save_model(tmp_path / "model", "llama-untied", tokenizer(bos=True))
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer()(" river")["input_ids"][0]] = torch.nan
    model.save_pretrained(broken)
    with pytest.raises(UserError, match=r"of response [0-9a-f]{16} is NaN") as caught:
        make(world, tmp_path / "out", spec_of(world, model=str(broken)))
    assert "\n" not in str(caught.value)


def test_a_batch_of_no_tokens_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_tokens = 0"):
        make(world, tmp_path / "out", batch_tokens=0)


def test_the_lab_model_on_real_preferences(shared: Path, tmp_path: Path) -> None:
    spec = ExtractSpec.parse(
        {
            "model": str(shared / "models/lab-lm"),
            "data": [{"path": str(shared / "data/hhh_alignment/pairs.parquet"), "split": "ood"}],
            "max_length": 512,
            "limit": 12,
        },
        "test",
    )
    opened = open_cache(extract(spec, tmp_path / "lab", device="cpu"))
    assert opened.width == 192
    assert opened.pairs.height + opened.exclusions.height == 12
    per_token = opened.responses["S"] / opened.responses["n_response"]
    assert -6 < per_token.median() < -1  # a trained model: far better than ln 4096 = 8.3
    assert isinstance(opened.exclusions, pl.DataFrame)
