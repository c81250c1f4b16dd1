"""Write the report of a sweep, or of its confirmation by fine-tuning: Markdown, JSON and figures.

The same results also go back to the caller, which prints some of the tables.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import polars as pl

from embrm.core.drawing import drawn
from embrm.core.errors import UserError
from embrm.core.files import write_bytes
from embrm.core.table import Table, escape, markdown
from embrm.reports.figures import figures
from embrm.reports.tables import markdown_tables, terminal_tables
from embrm.results.comparison import Comparison, compare_results
from embrm.results.ledger import Results, open_results
from embrm.studies.confirmation.measure import Confirmation
from embrm.studies.confirmation.table import CAPTION as AGREEMENT
from embrm.studies.confirmation.table import (
    confirmation_figure,
    confirmation_tables,
    further_confirmation_tables,
)
from embrm.studies.reliability.measure import measure_reliability
from embrm.studies.reliability.table import CAPTION as RELIABILITY
from embrm.studies.reliability.table import compared_names, reliability_figure, reliability_tables
from embrm.studies.robustness.noise import CAPTION as NOISE
from embrm.studies.robustness.noise import noise_figure
from embrm.studies.robustness.scenarios import CAPTION as SCENARIOS
from embrm.studies.robustness.scenarios import scenario_figure

_CAPTIONS = {
    "ranked": "Configurations with 95 % intervals; right, paired differences to the baseline",
    "id_vs_ood": "Accuracy in distribution against out of distribution",
    "distortion": "What each run scores against how far it moved the language model; lines lead "
    "from a BT twin to the same run with a regularizer",
    "scenarios": SCENARIOS,
    "noise": NOISE,
    "reliability": RELIABILITY,
    "curves": "Learning curves: median over seeds, band from the lowest to the highest seed",
    "agreement": AGREEMENT,
}


@dataclass(frozen=True)
class Report:
    """The results of a sweep's report, and the files that hold them."""

    comparison: Comparison
    reliability: pl.DataFrame
    """Bins of the best configuration and of the baseline, with the columns of
    `measure_reliability`; empty if they could not be computed."""
    notes: tuple[str, ...]
    """What the report leaves out, and why."""
    tables: tuple[Table, ...]
    """The tables that the terminal shows; report.md has more."""
    files: tuple[Path, ...]

    def json(self) -> str:
        """Encode the comparison and the reliability, floats to 12 significant digits."""
        return _json({**vars(self.comparison), "reliability": self.reliability})


def report(
    folder: Path,
    *,
    rank_by: str | None = None,
    baseline: str | None = None,
    top: int = 20,
    cache: Path | None = None,
    out: Path | None = None,
) -> Report:
    """Write report.md, report.json and figures/*.png and *.svg of the sweep in `folder`.

    rank_by: an evaluation split, "ood" for the mean over all splits named "ood/...", or None for
        the mean over all splits not named "train...".
    baseline: the configuration that all others are compared with; by default the spec's.
    top: number of configurations to show; the JSON always holds all of them.
    cache: the cache's current path, if it has moved. Reliability needs the cache, because rewards
        are computed again. If `cache` is not given, an unusable cache is not an error: the report
        leaves reliability out and says so.
    out: folder to write to; by default the sweep's.
    The same results and cache give the same bytes.

    Raises: UserError if the sweep has no finished runs, `rank_by` or `baseline` names nothing, or a
    `cache` that was given cannot be used.
    """
    results = open_results(folder)
    comparison = compare_results(results, rank_by=rank_by, baseline=baseline)
    reliable, notes = _reliability(results, comparison, cache)
    images = _images(results, comparison, reliable, top)
    shown = terminal_tables(comparison, top)
    further = [*markdown_tables(comparison, top), *reliability_tables(reliable)]
    out = out or folder
    contents = {
        "report.md": _markdown(comparison, [*shown, *further], images, notes),
        "report.json": _json({**vars(comparison), "reliability": reliable}),
    }
    written = {
        **{out / name: text.encode() for name, text in contents.items()},
        **{out / "figures" / name: image for name, image in images.items()},
    }
    for path, content in written.items():
        write_bytes(path, content)
    return Report(comparison, reliable, notes, tuple(shown), tuple(written))


def report_figures(
    results: Results, *, rank_by: str | None = None, baseline: str | None = None, top: int = 20
) -> dict[str, bytes]:
    """Draw the report's figures, except that of reliability; file name → content."""
    comparison = compare_results(results, rank_by=rank_by, baseline=baseline)
    return _images(results, comparison, pl.DataFrame(), top)


def _images(
    results: Results, comparison: Comparison, reliable: pl.DataFrame, top: int
) -> dict[str, bytes]:
    names = results.ledger.select("run_id", name="config")
    curves = results.curves.join(names, on="run_id", maintain_order="left")
    further = {
        "scenarios": scenario_figure(comparison),
        "noise": noise_figure(comparison),
        "reliability": reliability_figure(reliable, comparison),
    }
    images = figures(comparison, curves, top)
    return images | drawn({name: draw for name, draw in further.items() if draw})


def _reliability(
    results: Results, comparison: Comparison, cache: Path | None
) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Measure `Report.reliability`; return it and the notes on why it is empty."""
    if results.finetuned:  # Only heads can score cached states again.
        return pl.DataFrame(), ()
    if results.redivided:
        return pl.DataFrame(), (
            "no reliability diagrams: data_seeds divide the groups again, so runs are evaluated on "
            "different prompts",
        )
    try:
        return measure_reliability(results, compared_names(comparison), cache), ()
    except UserError as error:
        if cache is not None:
            raise
        return pl.DataFrame(), (f"no reliability diagrams: {error}",)


@dataclass(frozen=True)
class ConfirmationReport:
    """The results of a confirmation's report, and the files that hold them."""

    confirmation: Confirmation
    tables: tuple[Table, ...]
    """The tables that the terminal shows; confirm.md has more."""
    files: tuple[Path, ...]

    def json(self) -> str:
        """Encode the confirmation, floats to 12 significant digits."""
        return _json(vars(self.confirmation))


def confirmation_report(confirmation: Confirmation, out: Path) -> ConfirmationReport:
    """Write confirm.md, confirm.json and figures/agreement.png and .svg to the folder `out`."""
    shown = confirmation_tables(confirmation)
    images = drawn({"agreement": confirmation_figure(confirmation)})
    tuned = len({match.full for match in confirmation.matches})
    text = _page(
        f"{confirmation.title}, confirmed",
        f"{len(confirmation.matches)} configurations of the sweep, fine-tuned as {tuned}.",
        [*shown, *further_confirmation_tables(confirmation)],
        images,
    )
    written = {
        out / "confirm.md": text.encode(),
        out / "confirm.json": _json(vars(confirmation)).encode(),
        **{out / "figures" / name: image for name, image in images.items()},
    }
    for path, content in written.items():
        write_bytes(path, content)
    return ConfirmationReport(confirmation, tuple(shown), tuple(written))


def _markdown(
    comparison: Comparison,
    tables: list[Table],
    images: Mapping[str, bytes],
    notes: Sequence[str],
) -> str:
    runs = int(comparison.ranking["run_ids"].list.len().sum())
    line = f"{comparison.ranking.height} configurations, {runs} runs."
    page = _page(comparison.title, line, tables, images)
    return "\n".join([page, *(f"- {escape(note)}\n" for note in notes)])


def _page(title: str, line: str, tables: list[Table], images: Mapping[str, bytes]) -> str:
    parts = [
        f"# {escape(title)}\n",
        f"{line}\n",
        *(
            f"![{caption}](figures/{name}.png)\n"
            for name, caption in _CAPTIONS.items()
            if f"{name}.png" in images
        ),
        *(markdown(table) for table in tables),
    ]
    return "\n".join(parts)


def _json(found: Mapping[str, Any]) -> str:
    return json.dumps(_rounded(dict(found)), indent=1, allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    """Convert to what JSON can hold; floats are rounded to 12 significant digits, because further
    digits depend on the machine's order of summation."""
    if isinstance(value, pl.DataFrame):
        return _rounded(value.to_dicts())
    if is_dataclass(value):
        return _rounded(vars(value))
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
