"""Which figures are drawn, what they show, and that equal numbers give equal bytes."""

import dataclasses
import re

import polars as pl
import pytest
from small_sweep import SPLITS, compare_tables, small_sweep

from embrm.reports.figures import figures
from embrm.results.comparison import Comparison

SWEEP = small_sweep()
COMPARISON = compare_tables("small", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt")
CURVES = SWEEP.curves.join(SWEEP.ledger.select("run_id", name="config"), on="run_id")
NO_CURVES = CURVES.head(0)
BLUE, ORANGE = b"#0072b2", b"#d55e00"


@pytest.fixture(scope="module")
def drawn() -> dict[str, bytes]:
    return figures(COMPARISON, CURVES, 20)


def test_all_three_figures_are_drawn_as_png_and_svg(drawn: dict[str, bytes]) -> None:
    assert sorted(drawn) == sorted(
        f"{name}.{suffix}"
        for name in ("ranked", "id_vs_ood", "curves")
        for suffix in ("png", "svg")
    )
    for name, content in drawn.items():
        start = b"\x89PNG" if name.endswith("png") else b"<?xml"
        assert content.startswith(start)


def test_row_order_does_not_change_the_bytes(drawn: dict[str, bytes]) -> None:
    assert figures(COMPARISON, CURVES.sample(fraction=1, shuffle=True, seed=3), 20) == drawn


def test_files_hold_no_date(drawn: dict[str, bytes]) -> None:
    assert b"dc:date" not in drawn["ranked.svg"]
    assert b"tEXt" not in drawn["ranked.png"]


def test_names_are_not_read_as_mathematics(drawn: dict[str, bytes]) -> None:
    # matplotlib writes each drawn text into a comment of the SVG.
    assert b"hinge|$x_1$ [red]*" in drawn["ranked.svg"]


def test_names_with_missing_glyphs_or_broken_mathtext_are_drawn() -> None:
    ledger = SWEEP.ledger.with_columns(pl.col("config").replace("bad", "奖励 $\\frac{ \x1b"))
    comparison = compare_tables("odd", ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt")
    assert "ranked.png" in figures(comparison, NO_CURVES, 20)


def test_scatter_without_in_distribution_splits_uses_held_out_training_prompts() -> None:
    ood = compare_tables(
        "ood", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, ("ood/maths", "ood/chat_hard"), "bt"
    )
    assert b"held-out training prompts" in figures(ood, NO_CURVES, 20)["id_vs_ood.svg"]
    blind = dataclasses.replace(ood, validation=ood.validation.with_columns(accuracy=pl.lit(None)))
    assert "id_vs_ood.svg" not in figures(blind, NO_CURVES, 20)


def ranked(comparison: Comparison) -> bytes:
    return figures(comparison, NO_CURVES, 20)["ranked.svg"]


def dots(comparison: Comparison, color: bytes) -> tuple[int, int]:
    """Count the filled and the hollow markers of a colour in the two panels and the legend."""
    uses = re.findall(rb'<use [^>]*style="([^"]*)"', ranked(comparison))
    own = [style for style in uses if b"stroke: " + color in style]
    filled = sum(b"fill: " + color in style for style in own)
    return filled, len(own) - filled


def test_dots_are_filled_only_if_the_holm_adjusted_p_is_small() -> None:
    # Blue is "bsr", above the baseline, and orange is "bad", below it: each has a filled dot in
    # both panels, and the legend has one filled and one hollow dot of each colour.
    assert dots(COMPARISON, BLUE) == dots(COMPARISON, ORANGE) == (3, 1)
    unsure = COMPARISON.ranking.with_columns(p_holm=pl.lit(0.05))
    hollow = dataclasses.replace(COMPARISON, ranking=unsure)
    assert dots(hollow, BLUE) == dots(hollow, ORANGE) == (1, 3)
    assert "interval excludes 0, Holm p ≥ 0.05".encode() in ranked(hollow)


@pytest.mark.parametrize(("share", "drawn"), [(0.625, True), (0.05, False), (1.0, False)])
def test_the_longer_is_better_line_is_drawn_only_near_the_estimates(
    share: float, drawn: bool
) -> None:
    lengths = COMPARISON.lengths.with_columns(estimate=pl.lit(share))
    comparison = dataclasses.replace(COMPARISON, lengths=lengths)
    assert (b"longer is better" in ranked(comparison)) == drawn


def test_the_axis_names_metric_and_splits() -> None:
    assert b"Mean accuracy over 3 splits (%)" in ranked(COMPARISON)
    one = compare_tables(
        "one", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt", rank_by="id"
    )
    assert b"Accuracy, id (%)" in ranked(one)
    groups = compare_tables(
        "groups", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, ("groups",), "bt"
    )
    assert "Kendall τ-b, groups".encode() in ranked(groups)


def test_without_curves_there_is_no_figure_of_them() -> None:
    assert "curves.png" not in figures(COMPARISON, NO_CURVES, 20)


def test_a_sweep_with_groups_only_has_only_the_ranking_figure() -> None:
    groups = compare_tables(
        "groups", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, ("groups",), "bt"
    )
    assert sorted(figures(groups, NO_CURVES, 20)) == ["ranked.png", "ranked.svg"]


def test_figures_need_no_baseline() -> None:
    comparison = compare_tables("free", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, None)
    assert len(figures(comparison, CURVES, 2)) == 6
