"""The results of a sweep or a fine-tune, as a notebook wants them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embrm.api.arguments import AnyPath, optional_path, public

if TYPE_CHECKING:
    import polars as pl

    from embrm.results.comparison import Comparison
    from embrm.results.ledger import Results


class SweepResults:
    """What a sweep or a fine-tune has found. Open it with `embrm.open_results`."""

    def __init__(self, stored: Results) -> None:
        self.stored = stored
        """The files as they are read, for what is not offered here."""

    def __repr__(self) -> str:
        runs = self.stored.ledger
        return (
            f"SweepResults({str(self.folder)!r}: {runs.height} runs of "
            f"{runs['config'].n_unique()} configurations, evaluated on "
            f"{', '.join(self.stored.evaluated)})"
        )

    @property
    def folder(self) -> Path:
        """Where the results are."""
        return self.stored.folder

    @cached_property
    def ledger(self) -> pl.DataFrame:
        """One row per run: id, configuration, seed, status, `METRIC@SPLIT` columns, and every
        hyper-parameter as a column of its own.

        Keys of a table have dotted names such as `head.widths`. The most epochs that a run was
        allowed are `max_epochs`; `epochs` is how many it was trained for.
        """
        from embrm.results.hyperparameters import with_hyperparameters

        return with_hyperparameters(self.stored.ledger)

    @property
    def curves(self) -> pl.DataFrame:
        """One row per run and epoch: losses, validation metrics, rewards, norms."""
        return self.stored.curves

    @public
    def scores(self, run: str, cache: AnyPath | None = None) -> pl.DataFrame:
        """Every pair's rewards under one run, in reward-bench's names; twin of `embrm scores`.

        run: a run id, the beginning of one, or CONFIGURATION@SEED. cache: where the sweep's cache
        is now, if it has moved.

        Raises: UserError for an unknown run, one without weights, or another cache.
        """
        from embrm.results.rewards import scores

        return scores(self.folder, run, optional_path(cache, "cache"))

    @public
    def ranking(self, split: str | None = None, baseline: str | None = None) -> pl.DataFrame:
        """Configurations from best to worst, with 95 % intervals over prompts and seeds.

        split: an evaluated split, "ood" for the mean over all "ood/...", None for the mean over
        all. Accuracy ranks, or Kendall's tau-b where there are only groups. Differences are paired,
        to `baseline` (the spec's by default), with Holm-adjusted p.
        """
        return self._comparison(split, baseline).ranking

    @public
    def best(self, split: str | None = None) -> dict[str, Any]:
        """The first configuration of `ranking(split)`: its name, interval, and run ids by seed."""
        first = self._comparison(split, None).ranking.row(0, named=True)
        keys = ("name", "estimate", "low", "high", "seeds", "run_ids")
        return {"config": first["name"], **{key: first[key] for key in keys[1:]}}

    @public
    def compare(self, other: SweepResults | AnyPath) -> pl.DataFrame:
        """Paired differences (this minus other) of the configurations that both sweeps have.

        One row per split, metric and configuration, with a 95 % interval over prompts and common
        seeds, and Holm-adjusted p. Raises: UserError where nothing can be compared.
        """
        from embrm.api.sweeps import open_results
        from embrm.results.two_sweeps import compare_sweeps

        another = other if isinstance(other, SweepResults) else open_results(other)
        return compare_sweeps(self.stored, another.stored)

    @public
    def figures(
        self, split: str | None = None, *, baseline: str | None = None, top: int = 20
    ) -> Mapping[str, bytes]:
        """The figures of `embrm report`: file name (such as "ranked.png") → its content."""
        from embrm.reports.run import report_figures

        return report_figures(self.stored, rank_by=split, baseline=baseline, top=top)

    def _comparison(self, split: str | None, baseline: str | None) -> Comparison:
        from embrm.results.comparison import compare_results

        return compare_results(self.stored, rank_by=split, baseline=baseline)
