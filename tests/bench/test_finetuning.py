"""The fine-tuning benchmark at a tiny size: every row trains the same task, and ratios agree."""

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
    """Stand-in for `measure` in this process: a fresh one takes seconds to import libraries."""
    prepare, *arguments = ForkingPickler.loads(ForkingPickler.dumps([prepare, *arguments]))
    return Measured(1.0, [prepare(*arguments)()], Footprint(rss=1))


def test_all_rows_train_the_same_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetuning, "measure", here)
    parts = dict(
        measure_finetuning(tmp_path, device="cpu", batch_pairs=4, steps=2, rounds=1, size=TINY)
    )
    limit, trl, _, bt, _ = parts["trl"]
    again, *_ = parts["grm"]
    of = {row["way"]: row["first loss"] for rows in parts.values() for row in rows}
    assert of.pop(limit["way"]) is None
    for way in ("TRL", "TRL, 4 micro-batches", "bt, 4 micro-batches"):
        assert of[way] == pytest.approx(of["bt"], rel=1e-5)
    assert of["grm-sft, all logits at once"] == pytest.approx(of["grm-sft"], rel=1e-5)
    # Before any weight has changed the DPO loss is log 2, from either kind of reference.
    for way in ("grm-dpo", "grm-dpo, a second model"):
        assert of[way] == pytest.approx(0.99 * of["bt"] + 0.01 * math.log(2), rel=1e-4)
    assert len({round(loss, 4) for loss in of.values()}) == 3
    assert again["way"] == bt["way"]
    for rows, first in ((parts["trl"], bt), (parts["grm"], again)):
        for row in rows:
            assert row["core seconds"] > 0 < row["peak MB"]
            assert row["times bt"] == pytest.approx(row["tokens/s"] / first["tokens/s"])
    for row in parts["trl"]:
        assert row["times TRL"] == pytest.approx(row["tokens/s"] / trl["tokens/s"])
        assert row["of limit"] == pytest.approx(row["tokens/s"] / limit["tokens/s"])
    assert not [*tmp_path.iterdir()]


def test_options_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data needs --model"):
        next(measure_finetuning(tmp_path, data="pairs.jsonl"))
    with pytest.raises(UserError, match="--batch-pairs 6"):
        next(measure_finetuning(tmp_path, batch_pairs=6))
    with pytest.raises(UserError, match="--dtype float16"):
        next(measure_finetuning(tmp_path, dtype="float16"))
