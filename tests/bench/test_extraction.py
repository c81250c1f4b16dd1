"""The extraction benchmark at a tiny size: it runs to the end, and its figures agree."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from extract_models import save_model, tokenizer

from embrm.bench import extraction
from embrm.bench.extraction import PER_PROMPT, Size, made_model, measure_extraction
from embrm.core.errors import UserError
from embrm.extraction.engine import Engine
from embrm.extraction.run import fill
from embrm.extraction.texts import PreparedTexts
from embrm.extraction.transformers_engine import load_engine


def test_the_figures_of_a_part_agree(tmp_path: Path) -> None:
    parts = dict(
        measure_extraction(tmp_path, device="cpu", responses=40, rounds=1, size=Size(64, 2, 1100))
    )
    limit, engine, tokens, same, ordered, unsorted, few, single, script = parts["speed"]
    assert limit["TFLOP/s"] > 0
    assert engine["times"] == 1
    # In packed batches a prompt is read once for both responses, and there is no padding.
    assert engine["read"] == tokens["read"] == same["read"] < single["read"]
    assert engine["padding"] == same["padding"] == single["padding"] == 0
    assert 0 < ordered["padding"] < unsorted["padding"] < 1
    assert few["read"] == script["read"]
    for row in (ordered, unsorted, few, script):
        assert row["read"] * (1 - row["padding"]) == pytest.approx(single["read"])
    for row in parts["speed"][1:]:
        assert row["of peak"] == pytest.approx(row["TFLOP/s"] / limit["TFLOP/s"])
        assert row["times"] == pytest.approx(engine["tokens/s"] / row["tokens/s"])
    alone, shared = parts["prefix"]
    assert alone["saved"] == 0
    assert shared["read"] == pytest.approx(alone["read"] * (1 - shared["saved"]))
    assert 0.2 < shared["saved"] <= shared["could"] < (PER_PROMPT - 1) / PER_PROMPT
    assert shared["error"] <= 1e-5
    assert [row["tokens a batch"] for row in parts["batches"]] == [1, 1024, 8192]
    for row in parts["batches"]:
        assert max(row["state"], row["logsumexp"], row["S"]) < 1e-4
    assert any(row["state"] > 0 for row in parts["batches"])
    unwritten, written = parts["writer"]
    assert unwritten["waited"] == 0 <= written["waited"] < 1
    assert written["times"] == pytest.approx(written["seconds"] / unwritten["seconds"])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("width", "hidden", "heads", "shared"),
    [(64, 256, 1, 1), (512, 1536, 8, 2), (576, 1536, 9, 1), (1024, 2816, 16, 4)],
)
def test_the_random_model_has_the_shapes_of_current_models(
    tmp_path: Path, width: int, hidden: int, heads: int, shared: int
) -> None:
    folder = made_model(tmp_path, Size(width, 1, 1100))
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == hidden
    assert config["num_attention_heads"] == heads
    assert config["num_key_value_heads"] == shared


def test_the_part_writer_loads_the_model_once_and_writes_whole_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares, found, loads = iter((0.1, 0.7, 0.2)), [], []

    def filled(prepared: PreparedTexts, engine: Engine, out: Path, **options: Any) -> float:
        start = time.perf_counter()
        fill(prepared, engine, out, **options)
        content = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.*")}
        found.append((content, options["shard_rows"]))
        return next(shares) * (time.perf_counter() - start)

    def loaded(*arguments: Any, **options: Any) -> Engine:
        loads.append(arguments)
        return load_engine(*arguments, **options)

    monkeypatch.setattr(extraction, "fill", filled)
    monkeypatch.setattr(extraction, "load_engine", loaded)
    parts = measure_extraction(
        tmp_path, device="cpu", responses=20, rounds=3, size=Size(64, 1, 1100)
    )
    _, written = dict(parts)["writer"]
    assert written["waited"] == pytest.approx(0.2, rel=0.1)
    content, shard_rows = found[0]
    assert (len(found), len(loads), shard_rows) == (3, 1, 3)
    assert "manifest.json" in content
    assert found == [found[0]] * 3


def test_a_vllm_that_cannot_be_used_is_left_out_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("embrm.bench.extraction", "embrm.extraction.vllm_engine"):
        monkeypatch.setattr(f"{module}.installed_version", lambda: "0.10.1")
    parts = measure_extraction(
        tmp_path, device="cpu", responses=8, rounds=1, size=Size(64, 1, 1100)
    )
    (row,) = dict(parts)["vllm"]
    assert row["engine"] == "vllm"
    assert "vLLM 0.10.1 is older than 0.32" in row["left out"]


def test_prompts_that_fit_one_batch_save_all_they_could(tmp_path: Path) -> None:
    parts = measure_extraction(
        tmp_path,
        device="cpu",
        responses=20,
        rounds=1,
        batch_tokens=100_000,
        size=Size(64, 1, 1100),
    )
    _, shared = dict(parts)["prefix"]
    assert shared["saved"] == pytest.approx(shared["could"])


def test_data_needs_a_model(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "gpt2", tokenizer())
    data = tmp_path / "pairs.jsonl"
    data.write_text(
        "".join(
            f'{{"prompt": "Who wrote {n}?", "chosen": "A boat{" 1" * n}.", "rejected": "Mud."}}\n'
            for n in range(9)
        )
    )
    with pytest.raises(UserError, match="--width 100"):
        next(iter(measure_extraction(tmp_path, size=Size(width=100))))
    with pytest.raises(UserError, match="--data needs --model"):
        next(measure_extraction(tmp_path, data=[str(data)]))
    part, rows = next(
        measure_extraction(
            tmp_path, str(tmp_path / "model"), [str(data)], device="cpu", responses=8, rounds=1
        )
    )
    assert part == "speed"
    assert rows[-1]["read"] > 8 * 5
