"""The inputs of a fine-tune: spec, cache, model and data that do not fit are refused."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from extract_models import save_model, tokenizer
from small_finetune import BT, made, written

from embrm.cache.reader import Cache, open_cache
from embrm.core.errors import UserError
from embrm.finetuning.inputs import read_inputs
from embrm.finetuning.run import finetune

GRM = BT + 'regularizer = { kind = "grm-dpo" }\n'


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("world"))


def test_what_is_wrong_is_said_in_one_line(cache: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other")
    save_model(tmp_path / "retrained", "llama-tied", tokenizer(bos=True), seed=1)
    cases: list[tuple[str, dict[str, Any], str]] = [
        (BT, {"model": str(tmp_path / "retrained")}, "model.weights = .*name the model and the da"),
        (BT, {"data": [{"path": str(tmp_path / "few.jsonl")}]}, "data.dataset = .*name the model"),
        (BT, {"micro_pairs": 3}, "batch_pairs = 8 is no multiple of micro_pairs = 3 times 1 proc"),
        (BT, {"tune": "all"}, "tune = 'all'"),
        (BT, {"numerics": "cuda"}, "numerics = 'cuda' is of sweeps"),
        (BT, {"bsr_scope": "micro"}, "bsr_scope = 'micro' needs micro_pairs"),
        (GRM, {"tune": "frozen"}, "regularizer 'grm-dpo' with tune = 'frozen': acts on states"),
        (BT + 'preprocess = "center"', {}, "preprocess = 'center' with tune = 'full'"),
        (BT + 'state = "mean"', {}, "state = 'mean' with tune = 'full'"),
        (BT + "members = 2", {}, "members = 2 with tune = 'full'"),
        (BT + "data_smoothing = 0.1", {}, "data_smoothing = 0.1 with tune = 'full'"),
        (BT + 'head = { adapter = { kind = "low-rank" } }', {}, "head.adapter = 'low-rank 16'"),
        (BT + 'regularizer = { kind = "fisher" }', {}, "regularizer 'fisher' with tune = 'full'"),
        (BT + 'regularizer = { kind = "grm-sft", top_k = 4 }', {}, "regularizer.top_k = 4"),
        ('[lora]\ntargets = ["nose"]\n' + BT, {"tune": "lora"}, "lora.targets = 'nose'"),
        (BT, {"report_to": ["tensorbord"]}, "report_to = 'tensorbord': did you mean 'tensorboard'"),
        (BT, {"report_to": ["clearml"]}, "report_to = 'clearml' is not installed .*install it, or"),
        ("[lora]\nrank = 2\n" + BT, {}, "lora with tune = 'full' does nothing"),
    ]
    lines = (other.parent / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:30]))
    for number, (text, fields, message) in enumerate(cases):
        spec = written(tmp_path / f"{number}.toml", text, **fields)
        with pytest.raises(UserError, match=message) as raised:
            finetune(spec, cache, device="cpu")
        assert "\n" not in str(raised.value)
    for device in ("gpu", "cuda:1"):
        with pytest.raises(UserError, match=f"device = '{device}'"):
            finetune(written(tmp_path / "bt.toml"), cache, device=device)


def test_a_reference_that_is_missing_or_not_the_models_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = written(tmp_path / "grm.toml", GRM)
    read_inputs(spec, cache)
    responses = open_cache(cache).responses
    for S, message in (
        (pl.col("S") * 1.01, "holds S = .* for which the model gives"),
        (pl.when(pl.int_range(pl.len()) == 3).then(None).otherwise("S"), "lacks it for 1 respons"),
    ):
        changed = responses.with_columns(S=S)
        monkeypatch.setattr(Cache, "responses", changed)
        with pytest.raises(UserError, match=message):
            read_inputs(spec, cache)
