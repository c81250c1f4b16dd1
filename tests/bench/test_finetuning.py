"""The fine-tuning benchmark at a tiny size: all ways train the same, and the figures fit."""

import math
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

from embrm.bench import finetuning
from embrm.bench.extraction import Size
from embrm.bench.finetuning import measure_finetuning
from embrm.bench.footprint import Footprint
from embrm.bench.processes import Measured
from embrm.core.errors import UserError

TINY = Size(64, 1, 1100)


def here(prepare: Any, *arguments: Any, threads: int) -> Measured:  # noqa: ARG001
    """As `measure`, in this process: a fresh one takes seconds to import all it needs."""
    prepare, *arguments = ForkingPickler.loads(ForkingPickler.dumps([prepare, *arguments]))
    return Measured(1.0, [prepare(*arguments)()], Footprint(rss=1))


def test_all_ways_train_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "measure", here)
    rows = measure_finetuning(tmp_path, device="cpu", batch_pairs=4, steps=2, rounds=1, size=TINY)
    limit, trl, _, bt, _, *_ = rows
    of = {row["way"]: row["first loss"] for row in rows}
    assert of.pop(limit["way"]) is None
    for way in ("TRL", "TRL, 4 micro-batches", "bt, 4 micro-batches"):
        assert of[way] == pytest.approx(of["bt"], rel=1e-5)
    assert of["grm-sft, all logits at once"] == pytest.approx(of["grm-sft"], rel=1e-5)
    # Nothing has moved yet: R = log 2, with the cached reference and with the second model.
    for way in ("grm-dpo", "grm-dpo, a second model"):
        assert of[way] == pytest.approx(0.99 * of["bt"] + 0.01 * math.log(2), rel=1e-4)
    assert len({round(loss, 4) for loss in of.values()}) == 3
    assert limit["of limit"] == trl["times TRL"] == bt["times bt"] == 1
    for row in rows:
        assert row["core seconds"] > 0 < row["peak MB"]
        assert row["times TRL"] == pytest.approx(row["tokens/s"] / trl["tokens/s"])
        assert row["of limit"] == pytest.approx(row["tokens/s"] / limit["tokens/s"])
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data needs --model"):
        measure_finetuning(tmp_path, data="pairs.jsonl")
    with pytest.raises(UserError, match="--batch-pairs 6"):
        measure_finetuning(tmp_path, batch_pairs=6)
    with pytest.raises(UserError, match="--dtype float16"):
        measure_finetuning(tmp_path, dtype="float16")
