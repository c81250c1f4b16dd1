"""Scoring: a run and its exported folder say the same of any data, whatever shares a batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from export_world import write_groups, write_sweep
from extract_models import VOCABULARY, tokenizer
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from embrm.cli import app
from embrm.core.errors import UserError
from embrm.data.dataset import load
from embrm.data.sources import SourceSpec, parse_source
from embrm.exports.exported import load_exported
from embrm.exports.run import export
from embrm.exports.scoring import Scores, score
from embrm.lm.tokens import encode
from embrm.results.ledger import open_results
from embrm.results.rewards import scores

RUNS = ("bt", "standardized", "adapter", "deep", "with S", "pooled")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("scoring") / "world", *RUNS)


@pytest.fixture(scope="module")
def folder(swept: Path) -> Path:
    export(swept, "standardized@0", swept.parent / "rm", device="cpu")
    return swept.parent / "rm"


def pairs_of(swept: Path) -> list[SourceSpec]:
    return [parse_source(str(swept.parent / "pairs.jsonl"))]


def sides(found: Scores) -> np.ndarray:
    return found.pairs.select("scores_chosen", "scores_rejected").to_numpy()


@pytest.mark.parametrize("run", RUNS)
def test_a_run_scores_the_text_of_its_cache_as_the_sweep_did(swept: Path, run: str) -> None:
    found = score(f"{swept}:{run}@0", pairs_of(swept), device="cpu")
    expected = scores(swept, f"{run}@0")
    assert found.pairs["pair_id"].to_list() == expected["pair_id"].to_list()
    columns = expected.select("scores_chosen", "scores_rejected").to_numpy()
    assert np.abs(sides(found) - columns).max() < 1e-5 * max(1, np.abs(columns).max())
    row = open_results(swept).find(f"{run}@0")
    metrics = found.splits.filter(pl.col("split") == "id").row(0, named=True)
    for name in ("accuracy", "ties", "reward_sd", "length_accuracy"):
        assert metrics[name] == pytest.approx(row[f"{name}@id"], rel=1e-4)


def test_a_folder_scores_as_its_run_and_no_batch_matters(swept: Path, folder: Path) -> None:
    run = score(f"{swept}:standardized@0", pairs_of(swept), device="cpu")
    found = {
        size: score(str(folder), pairs_of(swept), batch_tokens=size, device="cpu")
        for size in (1, 500, 100_000)
    }
    for one in found.values():
        assert np.abs(sides(one) - sides(run)).max() < 1e-4
        assert np.abs(sides(one) - sides(found[1])).max() < 1e-5
        assert one.pairs.drop(pl.selectors.starts_with("scores_")).equals(
            run.pairs.drop(pl.selectors.starts_with("scores_"))
        )


def test_our_own_class_is_told_where_responses_begin(swept: Path, tmp_path: Path) -> None:
    export(swept, "adapter@0", tmp_path / "rm", custom=True, device="cpu")
    found = score(str(tmp_path / "rm"), pairs_of(swept), device="cpu")
    run = score(f"{swept}:adapter@0", pairs_of(swept), device="cpu")
    assert np.abs(sides(found) - sides(run)).max() < 1e-5


@pytest.mark.parametrize("place", ["folder", "run"])
def test_groups_pairs_and_exclusions_are_told(
    swept: Path, folder: Path, tmp_path: Path, place: str
) -> None:
    groups = write_groups(tmp_path / "groups.jsonl")
    model = str(folder) if place == "folder" else f"{swept}:standardized@0"
    found = score(model, [parse_source(f"ood/groups={groups}")], device="cpu")
    assert found.exclusions == {"duplicate": 1}
    assert found.members.height == 15
    assert found.members["model"].to_list() == ["m0", "m1", "m2"] * 5
    assert found.members["gold"].to_list() == [0.0, 1.0, 2.0] * 5
    # Derived pairs name the same responses: their rewards are those of the members.
    lookup = dict(zip(found.members["row"], found.members["score"], strict=True))
    assert found.pairs.height == 15
    for row, value in found.pairs.select("row", "scores_chosen").rows():
        assert lookup[row] == value
    [split] = found.splits.to_dicts()
    assert split["split"] == "ood/groups"
    right = (found.pairs["scores_chosen"] > found.pairs["scores_rejected"]).mean()
    assert split["accuracy"] == pytest.approx(right)
    assert -1 <= split["tau"] <= 1


def test_equal_texts_tie_and_count_neither_way(folder: Path, tmp_path: Path) -> None:
    """Weights of zero: every pair is a tie, so that accuracy is of nothing."""
    flat = tmp_path / "flat"
    shutil.copytree(folder, flat)
    tensors = safetensors.torch.load_file(flat / "model.safetensors")
    tensors["score.weight"].zero_()
    safetensors.torch.save_file(tensors, flat / "model.safetensors", metadata={"format": "pt"})
    found = score(str(flat), [parse_source(str(folder.parent / "pairs.jsonl"))], device="cpu")
    assert found.splits["ties"].to_list() == [1.0, 1.0]
    assert found.splits["accuracy"].to_list() == [None, None]


def changed(folder: Path, out: Path, **config) -> str:
    shutil.copytree(folder, out)
    values = json.loads((out / "config.json").read_text()) | config
    values = {name: value for name, value in values.items() if value is not None}
    (out / "config.json").write_text(json.dumps(values))
    return str(out)


def encoder(out: Path) -> str:
    """A classifier that pools its first token."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(out)
    tokenizer().save_pretrained(out)
    return str(out)


def headless(folder: Path, out: Path) -> str:
    changed(folder, out)
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    del tensors["score.weight"]
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def test_a_classifier_of_someone_else_is_read_by_its_own_tokenizer(
    folder: Path, swept: Path, tmp_path: Path
) -> None:
    other = changed(folder, tmp_path / "other", embrm=None)
    found = score(other, pairs_of(swept), device="cpu")
    own = score(str(folder), pairs_of(swept), device="cpu")
    offset = json.loads((folder / "config.json").read_text())["embrm"]["offset"]
    assert offset
    assert np.abs(sides(found) - offset - sides(own)).max() < 1e-5


def test_what_cannot_score_is_refused_in_one_line(
    swept: Path, folder: Path, tmp_path: Path
) -> None:
    data = pairs_of(swept)
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    cases = {
        "no pad_token_id": changed(folder, tmp_path / "pad", pad_token_id=None),
        "2 labels: a reward model has one": changed(folder, tmp_path / "two", **labels),
        "LlamaForCausalLM, which gives no reward": str(swept.parent / "model"),
        "lack 'score.weight'": headless(folder, tmp_path / "headless"),
        "BertForSequenceClassification has another head": encoder(tmp_path / "encoder"),
        "holds many runs": str(swept),
        "no such folder": "./nowhere",
        "no run 'none'": f"{swept}:none",
    }
    for match, model in cases.items():
        with pytest.raises(UserError, match=match) as error:
            score(model, data, device="cpu")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="batch_tokens = 0"):
        score(str(folder), data, batch_tokens=0)
    with pytest.raises(UserError, match=r"dtype \(--dtype\) is for a model\'s folder"):
        score(f"{swept}:bt@0", data, dtype="float16")
    with pytest.raises(UserError, match="'float61': did you mean 'float16'"):
        score(str(folder), data, dtype="float61")
    with pytest.raises(UserError, match=r"cache \(--cache\) is for"):
        score(str(folder), data, cache=tmp_path)


def test_half_precision_is_close_and_not_the_same(folder: Path, swept: Path) -> None:
    whole = sides(score(str(folder), pairs_of(swept), device="cpu"))
    half = sides(score(str(folder), pairs_of(swept), device="cpu", dtype="bfloat16"))
    scale = np.abs(whole).max()
    assert 1e-5 * scale < np.abs(half - whole).max() < 0.2 * scale


def test_the_commands_write_what_the_functions_give(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["export", str(swept), "standardized@0", "rm", "--device", "cpu"])
    assert run.exit_code == 0, run.output
    assert "padded on the left: rewards differ by at most" in run.output
    assert "logit = reward +" in run.output
    groups = write_groups(tmp_path / "groups.jsonl")
    command = ["score", "rm", str(swept.parent / "pairs.jsonl"), f"g={groups}", "--device", "cpu"]
    run = CliRunner().invoke(app, [*command, "--out", "scores.parquet"])
    assert run.exit_code == 0, run.output
    assert "left out: 1 duplicate" in run.output
    found = score("rm", [*pairs_of(swept), parse_source(f"g={groups}")], device="cpu")
    assert pl.read_parquet("scores.parquet").equals(found.pairs)
    assert pl.read_parquet("scores.members.parquet").equals(found.members)
    run = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(run.stdout)["splits"] == found.splits.to_dicts()


def test_a_response_alone_has_the_reward_it_has_among_others(folder: Path, swept: Path) -> None:
    """Read from the model's own forward, with no batch, mask or padding at all."""
    exported = load_exported(folder, device="cpu")
    dataset = load(pairs_of(swept))
    texts, _ = encode(dataset.responses, exported.tokenizer, exported.policy)
    kept = [text for text in texts if text][:24]
    together = exported.rewards(kept, [range(len(kept))])
    with torch.no_grad():
        alone = torch.cat(
            [exported.model(torch.from_numpy(text.ids)[None].long()).logits[0] for text in kept]
        )
    assert (together - (alone - exported.offset)).abs().max() < 1e-5
