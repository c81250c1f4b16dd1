"""The report's tables as printed: their numbers, notes, escaping and width."""

import io
import re

import polars as pl
import pytest
from rich.console import Console
from small_sweep import SKILL, SPLITS, compare_tables, small_geometry, small_sweep

from embrm.core.table import Table, escape, markdown, terminal
from embrm.reports.tables import markdown_tables, terminal_tables
from embrm.results.comparison import Comparison

SWEEP = small_sweep()
COMPARISON = compare_tables("small", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt")


def shown(table: Table, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(terminal(table))
    return stream.getvalue()


def cells(text: str) -> list[str]:
    """A Markdown row's cells: split at pipes that are not escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]


def test_ranking_rows() -> None:
    ranking = terminal_tables(COMPARISON, top=10)[0]
    assert [row[1] for row in ranking.rows] == [
        *COMPARISON.ranking["name"],
        "(longer is better)",
        "(chance)",
    ]
    best = COMPARISON.ranking.row(0, named=True)
    assert ranking.rows[0][3] == (
        f"{100 * best['estimate']:.1f} [{100 * best['low']:.1f}, {100 * best['high']:.1f}]"
    )
    assert ranking.rows[0][4].startswith(f"+{100 * best['difference']:.1f} [+")
    assert ranking.rows[0][4].endswith("▲")
    by_name = {row[1]: row for row in ranking.rows}
    assert by_name["bad"][4].endswith("▼")
    assert by_name["bt"][4] == "baseline"
    assert by_name["hinge|$x_1$ [red]*"][4] == "+0.0 [+0.0, +0.0]"
    assert by_name["(longer is better)"][3] == "62.5"
    assert "bad: 1 runs diverged" in ranking.note


def test_the_baseline_is_shown_whatever_top_is() -> None:
    for table in terminal_tables(COMPARISON, top=1):
        if table.columns[0] == "configuration" and "minus" not in table.title:
            assert [row[0] for row in table.rows][:2] == ["bsr[lr=0.01]", "bt"]
    assert "2 more configurations" in terminal_tables(COMPARISON, top=1)[0].note


def test_configurations_with_one_seed_are_marked() -> None:
    sweep = small_sweep(seeds=1)
    comparison = compare_tables("one", sweep.ledger, sweep.prompts, sweep.outcomes, SPLITS, "bt")
    ranking = terminal_tables(comparison, top=4)[0]
    assert ranking.rows[0][2] == "1*"
    assert "* one seed" in ranking.note
    assert "* one seed" not in terminal_tables(COMPARISON, top=4)[0].note


def test_differences_agree_with_the_comparison() -> None:
    table = next(
        t for t in terminal_tables(COMPARISON, 9) if t.title == "Accuracy % minus bt by split"
    )
    row = next(row for row in table.rows if row[0] == "bad")
    for split, cell in zip(table.columns[1:], row[1:], strict=True):
        score = COMPARISON.scores.filter(split=split, name="bad", metric="accuracy")
        half = 50 * (score["difference_high"].item() - score["difference_low"].item())
        assert cell == f"{100 * score['difference'].item():+.1f}±{half:.1f}▼"


LONG = "weight-decay[state=mean,widths=256,weight_decay=0.1]"


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, [f"10 {LONG} 57.8"]),
        (40, ["10 weight-decay[state=mean,         57.8", "   widths=256,weight_decay=0.1]"]),
        (28, ["10 weight-decay[        57.8", "   state=mean,", "   widths=256,"]),
        (14, ["10 weight 57.8", "   -decay", "   ["]),
    ],
)
def test_long_names_break_at_their_punctuation(width: int, lines: list[str]) -> None:
    table = Table("", ("#", "name", "%"), (("10", LONG, "57.8"),), left=2)
    found = [line.rstrip() for line in shown(table, width).splitlines()]
    assert found[2 : 2 + len(lines)] == lines


def test_headers_are_aligned_with_their_numbers() -> None:
    table = Table("", ("configuration", "reward at T"), (("bt", "57.8"),))
    lines = [line.rstrip() for line in shown(table).splitlines()]
    assert lines[1:] == [f"{'reward at':>23}", "configuration         T", f"bt{'57.8':>21}"]


def test_calibration_fits_eighty_columns() -> None:
    ledger = SWEEP.ledger.with_columns(pl.col("config").replace("bad", LONG))
    comparison = compare_tables("long", ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt")
    table = terminal_tables(comparison, 9)[-1]
    text = shown(table, width=80)
    assert table.rows[-1][:2] == ("4", LONG)
    assert "4 weight-decay[state=mean," in text
    assert "Brier" not in text
    assert all(cell in text for row in table.rows for cell in row[2:])
    assert "Brier at T" in markdown(table)


def test_epoch_limits_are_marked_and_explained() -> None:
    assert "epoch limit" not in terminal_tables(COMPARISON, 9)[0].note

    def ranking(*names: str) -> Table:
        reached = pl.when(pl.col("config").is_in(names))
        ledger = SWEEP.ledger.with_columns(
            epochs=reached.then(9).otherwise("epochs"),
            best_epoch=reached.then(8).otherwise("best_epoch"),
        )
        return terminal_tables(
            compare_tables("x", ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt"), 9
        )[0]

    some = ranking("bt", "bsr[lr=0.01]")
    assert [row[1] for row in some.rows if row[1].endswith("°")] == ["bsr[lr=0.01]°", "bt°"]
    end = "reached their epoch limit before early stopping: raise epochs."
    last = f"° 2 of 4 configurations (bsr[lr=0.01], bt) {end}"
    assert some.note.splitlines()[1] == last
    assert f"\n{last}" in shown(some, width=120)
    assert f"\n\n° 2 of 4 configurations (bsr\\[lr=0.01\\], bt) {end}" in markdown(some)
    every = ranking(*SKILL).note
    assert f"° 4 of 4 configurations (bsr[lr=0.01], bt, hinge|$x_1$ [red]*, …) {end}" in every


def test_the_ranking_ends_with_the_command_that_writes_scores() -> None:
    note = terminal_tables(COMPARISON, 9)[0].note
    command = "embrm scores FOLDER bsr[lr=0.01]-0 --out scores.parquet"
    assert note.endswith(f"Rewards of the best configuration for every pair: {command}")


@pytest.mark.parametrize(
    "table", terminal_tables(COMPARISON, 9), ids=lambda table: table.title[:30]
)
def test_terminal_shows_every_cell_and_interprets_no_markup(table: Table) -> None:
    text = shown(table, width=200)
    for row in table.rows:
        for column, cell in zip(table.columns, row, strict=True):
            assert cell in text or column in table.wide
    assert "\x1b" not in shown(table)


def test_eight_long_splits_fit_a_hundred_columns() -> None:
    long = [f"ood/benchmark_number_{number}" for number in range(11)]
    prompts, outcomes = (
        pl.concat(
            table.filter(split="ood/maths").with_columns(split=pl.lit(split)) for split in long
        )
        for table in (SWEEP.prompts, SWEEP.outcomes)
    )
    comparison = compare_tables("wide", SWEEP.ledger, prompts, outcomes, long[:8], "bt")
    tables = terminal_tables(comparison, 9)
    for table in tables:
        assert max(map(len, shown(table).splitlines())) <= 100
    matrix = next(table for table in tables if table.title == "Accuracy % by split")
    assert matrix.columns[1:] == tuple(long[:8])
    for row in matrix.rows:
        assert all(cell in shown(matrix) for cell in row[1:])  # No number is wrapped.
    more = compare_tables("wider", SWEEP.ledger, prompts, outcomes, long, "bt")
    widths = [len(t.columns) for t in terminal_tables(more, 9) if t.title == "Accuracy % by split"]
    assert widths == [7, 6]


@pytest.mark.parametrize(
    "table",
    [*terminal_tables(COMPARISON, 9), *markdown_tables(COMPARISON, 9)],
    ids=lambda table: table.title[:30],
)
def test_markdown_rows_have_all_cells_escaped(table: Table) -> None:
    lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
    assert len(lines) == len(table.rows) + 2
    for line, row in zip(lines[2:], table.rows, strict=True):
        assert cells(line) == [escape(cell) for cell in row]
        assert len(row) == len(table.columns)


def test_markdown_and_control_characters_are_escaped() -> None:
    assert escape("a|b_c$ <b> `x` [y](z)") == r"a\|b\_c\$ \<b\> \`x\` \[y\](z)"
    assert escape("two\nlines\x1b[31m").count("\N{REPLACEMENT CHARACTER}") == 2
    assert "\n" not in escape("two\nlines")
    backslash = escape("\\|")
    assert backslash == r"\\\|"


def test_subsets_and_calibration_by_split_are_in_markdown_only() -> None:
    titles = [table.title for table in markdown_tables(COMPARISON, 9)]
    assert titles[0] == "Accuracy % by subset"
    assert "Calibration: ood/maths" in titles
    subsets = markdown_tables(COMPARISON, 9)[0]
    assert {row[1] for row in subsets.rows} == {"easy", "hard|er\x1b[31m"}
    assert "\x1b" not in markdown(subsets) + shown(subsets)


def test_the_ranking_names_splits_too_small_for_an_interval() -> None:
    small = SWEEP.without(pl.col("split") == "ood/maths", pl.col("prompt_id") != "ood/maths 7")
    tables = small.ledger, small.prompts, small.outcomes
    one = compare_tables("one", *tables, SPLITS, "bt")
    ranking = terminal_tables(one, 9)[0]
    assert ranking.title.endswith("mean over id, ood/chat_hard")
    assert (
        "Left out of the mean, because they have fewer than 2 prompts: ood/maths." in ranking.note
    )
    assert "95 % intervals" in ranking.note
    alone = terminal_tables(compare_tables("alone", *tables, ["ood/maths"], "bt"), 9)[0]
    assert "No intervals: too few prompts" in alone.note
    assert "95 %" not in alone.note
    assert "Left out" not in alone.note
    assert "Left out" not in terminal_tables(COMPARISON, 9)[0].note


def test_a_split_without_defined_outcomes_has_no_prompts() -> None:
    prompts, outcomes = (
        pl.concat([table, table.filter(split="groups").with_columns(split=pl.lit("empty"))])
        for table in (SWEEP.prompts, SWEEP.outcomes)
    )
    undefined = pl.col("tau").list.eval(pl.element() * float("nan"))
    outcomes = outcomes.with_columns(pl.when(split="empty").then(undefined).otherwise("tau"))
    comparison = compare_tables("empty", SWEEP.ledger, prompts, outcomes, (*SPLITS, "empty"), "bt")
    tables = {table.title: table for table in terminal_tables(comparison, 9)}
    assert tables["Evaluation splits"].rows[-1] == ("empty", "0", "0", "n/a", "0")


def calibration_without_temperature(missing: pl.Expr) -> Table:
    """Make the calibration table when the runs that match `missing` have no temperature."""
    calibrated = pl.col("^.*_calibrated@.*$")
    ledger = SWEEP.ledger.with_columns(pl.when(~missing).then(calibrated))
    comparison = compare_tables("cold", ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt")
    return next(t for t in terminal_tables(comparison, 9) if t.title.startswith("Calibration"))


def test_runs_without_a_temperature_show_no_calibrated_metrics() -> None:
    def at_t(table: Table) -> dict[str, set[str]]:
        columns = [index for index, name in enumerate(table.columns) if name.endswith(" at T")]
        assert len(columns) == 3
        return {row[1]: {row[index] for index in columns} for row in table.rows}

    fitted, none_fits = (
        "fitted on the validation pairs.",
        "n/a at T: no temperature could be fitted",
    )
    all_known = calibration_without_temperature(pl.lit(False))
    assert set.union(*at_t(all_known).values()) == {"0.250"}
    assert fitted in all_known.note
    assert none_fits not in all_known.note
    some = calibration_without_temperature(pl.col("config") == "bad")
    assert at_t(some)["bad"] == {"n/a"}
    assert at_t(some)["bt"] == {"0.250"}
    assert fitted in some.note
    assert none_fits in some.note
    none = calibration_without_temperature(pl.lit(True))
    assert set.union(*at_t(none).values()) == {"n/a"}
    assert fitted not in none.note
    assert none_fits in none.note


def with_geometry(geometry: pl.DataFrame, splits: tuple[str, ...] = SPLITS) -> Comparison:
    tables = SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes
    return compare_tables("moved", *tables, splits, "bt", geometry=geometry)


def geometry_tables(tables: list[Table]) -> list[Table]:
    return [table for table in tables if table.title.startswith("Geometry")]


def test_geometry_of_adapters_is_shown_on_train_and_out_of_distribution() -> None:
    comparison = with_geometry(small_geometry())
    trained, outside = geometry_tables(terminal_tables(comparison, 9))
    assert not geometry_tables(markdown_tables(comparison, 9))
    assert trained.title == "Geometry: train"
    assert outside.title == "Geometry: mean over ood/chat_hard, ood/maths"
    columns = ("norm", "CV", "effective rank", "drift", "drift token rows", "KL token rows")
    assert trained.columns == (
        *("#", "configuration", *columns, "KL reward position", "corr length", "corr S"),
    )
    by_name = {row[1]: row[2:] for row in outside.rows}
    moved = ("26.000", "0.5", "0.500", "0.026", "0.026", "0.026", "0.026", "0.500", "0.500")
    assert by_name["bsr[lr=0.01]"] == moved
    assert by_name["bt"] == (*moved[:3], *["n/a"] * 4, *moved[7:])
    assert "an adapter may move the state that the reward reads" in trained.note
    assert outside.note.startswith("n/a: drift needs an adapter or a fine-tune")
    everywhere = geometry_tables(terminal_tables(with_geometry(small_geometry(tuple(SKILL))), 9))
    assert "n/a" not in "".join(table.note for table in everywhere)
    few = geometry_tables(terminal_tables(comparison, 1))
    assert [row[1] for row in few[0].rows] == ["bsr[lr=0.01]", "bt"]


def test_geometry_without_adapters_is_in_markdown_only_and_has_no_empty_columns() -> None:
    comparison = with_geometry(small_geometry(adapters=()), splits=("id",))
    assert not geometry_tables(terminal_tables(comparison, 9))
    found = geometry_tables(markdown_tables(comparison, 9))
    assert [table.title for table in found] == ["Geometry: train", "Geometry: id"]
    columns = ("#", "configuration", "norm", "CV", "effective rank", "corr length", "corr S")
    assert {table.columns for table in found} == {columns}
    assert "adapter" not in found[0].note + found[1].note
    assert not geometry_tables(markdown_tables(COMPARISON, 9))


def test_small_divergences_keep_their_digits_and_fit_eighty_columns() -> None:
    geometry = small_geometry(tuple(SKILL)).with_columns(kl_reward=pl.lit(3.21e-7))
    table = geometry_tables(terminal_tables(with_geometry(geometry), 9))[0]
    text = shown(table, width=80)
    assert "3.2e-07" in text
    assert all(cell in text for row in table.rows for cell in row[3:-1])
    assert max(map(len, text.splitlines())) <= 80
    assert "corr S" in markdown(table)


def test_leaked_prompts_are_counted() -> None:
    leaked = {"id": ["id 1", "id 2"]}
    comparison = compare_tables(
        "leaky", SWEEP.ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt", leaked=leaked
    )
    tables = {table.title: table for table in terminal_tables(comparison, 9)}
    without = tables["Accuracy % without prompts seen in training"]
    assert without.note == "Prompts: id: 2 removed, 58 left."
    assert tables["Evaluation splits"].rows[0][-1] == "2"


def test_disagreement_is_shown_for_configurations_with_several_heads() -> None:
    assert not any("Disagreement" in table.title for table in markdown_tables(COMPARISON, 9))
    several = pl.col("config").is_in(["bsr[lr=0.01]", "bad"]) & (pl.col("status") == "ok")
    ledger = SWEEP.ledger.with_columns(
        pl.when(several).then(0.1 * pl.col("seed")).alias("disagreement@id"),
        pl.when(several).then(0.75).alias("disagreement_auroc@id"),
        pl.when(several).then(0.5).alias("disagreement@ood/maths"),
    )
    comparison = compare_tables("s", ledger, SWEEP.prompts, SWEEP.outcomes, SPLITS, "bt")
    [table] = [t for t in markdown_tables(comparison, 9) if t.title.startswith("Disagreement")]
    assert table.columns == ("configuration", "id", "ood/maths")
    assert table.rows == (
        ("bsr[lr=0.01]", "0.100 / 0.750", "0.500 / n/a"),
        ("bad", "0.050 / 0.750", "0.500 / n/a"),  # The last seed diverged.
    )
    assert not any("Disagreement" in table.title for table in terminal_tables(comparison, 9))
