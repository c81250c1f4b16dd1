"""The extraction benchmark has a part for vLLM where it is installed."""

from pathlib import Path

import pytest

from embrm.bench.extraction import Size, measure_extraction


def test_the_model_alone_and_both_engines_read_the_same_texts(tmp_path: Path) -> None:
    parts = dict(
        measure_extraction(tmp_path, device="cpu", responses=20, rounds=1, size=Size(64, 2, 1100))
    )
    bare, *_ = rows = parts["vllm"]
    names = ["model alone, same batches", "transformers", "vllm"]
    assert [row["engine"] for row in rows] == names
    assert bare["times"] == 1
    limit = parts["speed"][0]["TFLOP/s"]
    for row in rows:
        assert row["times"] == pytest.approx(bare["tokens/s"] / row["tokens/s"])
        # The same products for all three.
        assert row["TFLOP/s"] * row["times"] == pytest.approx(bare["TFLOP/s"])
        assert row["of peak"] == pytest.approx(row["TFLOP/s"] / limit)
    (same,) = (row for row in parts["speed"] if row.get("way") == bare["engine"])
    per_token = same["TFLOP/s"] / same["tokens/s"]
    assert bare["TFLOP/s"] / bare["tokens/s"] == pytest.approx(per_token)
