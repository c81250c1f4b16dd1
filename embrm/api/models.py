"""Whole models: fine-tune them, confirm a sweep's ranking, export a run and score data with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embrm.api.arguments import (
    AnyData,
    AnyPath,
    cache_folder,
    optional_path,
    path,
    public,
    sources,
)

if TYPE_CHECKING:
    from embrm.api.results import SweepResults
    from embrm.cache.reader import Cache
    from embrm.exports.run import Export
    from embrm.exports.scoring import Scores
    from embrm.reports.run import ConfirmationReport


@public
def finetune(
    spec: AnyPath,
    cache: Cache | AnyPath | None = None,
    *,
    out: AnyPath | None = None,
    device: str = "auto",
) -> SweepResults:
    """Train the language model itself with a sweep's objectives; twin of `embrm finetune`."""
    from embrm.api.sweeps import open_results
    from embrm.finetuning.run import finetune as run

    return open_results(
        run(path(spec, "spec"), cache_folder(cache), out=optional_path(out, "out"), device=device)
    )


@public
def confirm(
    folder: AnyPath,
    runs: str,
    spec: AnyPath,
    cache: Cache | AnyPath | None = None,
    *,
    rank_by: str | None = None,
    device: str = "auto",
    out: AnyPath | None = None,
) -> ConfirmationReport | None:
    """Fine-tune some configurations of a sweep and compare the rankings; twin of `embrm confirm`.

    runs: with commas, top:N, spread:N, random:N, baseline, or names of configurations.
    """
    from embrm.finetuning.confirm import confirm as run

    return run(
        path(folder, "folder"),
        runs,
        path(spec, "spec"),
        cache_folder(cache),
        rank_by=rank_by,
        device=device,
        out=optional_path(out, "out"),
    )


@public
def export(
    folder: AnyPath,
    run: str,
    out: AnyPath,
    *,
    cache: AnyPath | None = None,
    model: AnyPath | None = None,
    custom: bool = False,
    sample: int = 256,
    device: str = "auto",
    push: str | None = None,
) -> Export:
    """Write a run as a reward model that transformers loads; twin of `embrm export`.

    folder, run: results of a sweep or a fine-tune, and a run id or CONFIGURATION@SEED in them.
    custom: accept a small class of embrm's own where no stock class can hold the head.
    """
    from embrm.exports.run import export as write

    return write(
        path(folder, "folder"),
        run,
        path(out, "out"),
        cache=optional_path(cache, "cache"),
        model=None if model is None else str(path(model, "model")),
        custom=custom,
        sample=sample,
        device=device,
        push=push,
    )


@public
def score(
    model: AnyPath,
    data: AnyData | Sequence[AnyData],
    *,
    cache: AnyPath | None = None,
    batch_tokens: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Scores:
    """Rewards of preference or group data under a reward model or a run; twin of `embrm score`.

    model: a folder of `export`, any sequence classifier with one label (folder or hub id), or
        RESULTS_FOLDER:RUN. data: as for `extract`.
    """
    from embrm.exports.scoring import score as run

    return run(
        str(path(model, "model")),
        sources(data),
        cache=optional_path(cache, "cache"),
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
    )
