"""The tables of a sweep's report, in the order in which they are shown.

A section is a function in `embrm/reports/sections/` or, with a measurement and figures of its own,
in `embrm/studies/`. It is given the comparison of the sweep's configurations and `top`, the number
of configurations to show (at least 1; the baseline is always added), and returns its tables: an
empty list if the sweep has nothing to show.
"""

from collections.abc import Callable

from embrm.core.table import Table
from embrm.reports.sections.by_split import accuracy_tables, tau_tables
from embrm.reports.sections.calibration import calibration_tables, calibration_tables_by_split
from embrm.reports.sections.disagreement import disagreement_tables
from embrm.reports.sections.distortion import distortion_tables
from embrm.reports.sections.geometry import moved_geometry_tables, unmoved_geometry_tables
from embrm.reports.sections.leak_free import leak_free_tables
from embrm.reports.sections.ranking import ranking_tables
from embrm.reports.sections.splits import split_tables
from embrm.reports.sections.subsets import subset_tables
from embrm.results.comparison import Comparison
from embrm.studies.robustness.noise import noise_tables
from embrm.studies.robustness.scenarios import scenario_tables

SectionTables = Callable[[Comparison, int], list[Table]]

TERMINAL_SECTIONS: tuple[SectionTables, ...] = (
    ranking_tables,
    distortion_tables,
    split_tables,
    accuracy_tables,
    tau_tables,
    leak_free_tables,
    calibration_tables,
    moved_geometry_tables,
)
"""Sections that both the terminal and Markdown show."""

MARKDOWN_SECTIONS: tuple[SectionTables, ...] = (
    scenario_tables,
    noise_tables,
    subset_tables,
    calibration_tables_by_split,
    disagreement_tables,
    unmoved_geometry_tables,
)
"""Sections that only Markdown shows, after those of the terminal."""


def terminal_tables(comparison: Comparison, top: int) -> list[Table]:
    """Make the tables of `TERMINAL_SECTIONS`."""
    return _made(TERMINAL_SECTIONS, comparison, top)


def markdown_tables(comparison: Comparison, top: int) -> list[Table]:
    """Make the tables of `MARKDOWN_SECTIONS`."""
    return _made(MARKDOWN_SECTIONS, comparison, top)


def _made(sections: tuple[SectionTables, ...], comparison: Comparison, top: int) -> list[Table]:
    return [table for section in sections for table in section(comparison, max(top, 1))]
