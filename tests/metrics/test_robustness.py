"""Changes over scenarios and label noise by definition; figures show what the tables say."""

import json

import numpy as np
import polars as pl
import pytest
from small_sweep import SPLITS, SmallSweep, compare_tables, small_sweep

from embrm.core.drawing import drawn
from embrm.core.table import markdown
from embrm.metrics.robustness import noise_lines
from embrm.results.comparison import MEAN, Comparison
from embrm.studies.robustness.noise import noise_figure, noise_tables
from embrm.studies.robustness.scenarios import scenario_figure, scenario_tables

ODD = "hinge|$x_1$ [red]*"
NOISY = {
    "bt": ("bt[label_noise=0]", 0.0),
    "bad": ("bt[label_noise=0.4]", 0.4),
    "bsr[lr=0.01]": (f"{ODD}[label_noise=0,lr=0.01]", 0.0),
    ODD: (f"{ODD}[label_noise=0.4,lr=0.01]", 0.4),
}
SWEEP = small_sweep()


def noisy(extra: dict[str, object] | None = None) -> SmallSweep:
    """The small sweep as two lines of two rates. extra: keys of the first line's noisy runs."""
    names = {name: new for name, (new, _) in NOISY.items()}
    specs = [
        json.dumps({"seed": seed, "epochs": 9, "patience": 3, "label_noise": NOISY[name][1]}
                   | (extra or {} if name == "bad" else {}))
        for name, seed in SWEEP.ledger.select("config", "seed").iter_rows()
    ]  # fmt: skip
    ledger = SWEEP.ledger.with_columns(pl.col("config").replace(names), spec=pl.Series(specs))
    return SmallSweep(ledger, SWEEP.curves, SWEEP.prompts, SWEEP.outcomes)


def compared(sweep: SmallSweep, baseline: str | None, *scenarios: str) -> Comparison:
    return compare_tables(
        "small", sweep.ledger, sweep.prompts, sweep.outcomes, SPLITS, baseline, scenarios=scenarios
    )


def accuracy(run_id: str, split: str) -> float:
    wins = SWEEP.outcomes.filter(run_id=run_id, split=split)["wins"][0]
    return wins.sum() / (60 * 8)


NOISE = compared(noisy(), "bt[label_noise=0]")


def test_lines_are_named_by_the_common_part_of_names() -> None:
    lines = NOISE.noise.filter(split=MEAN).select("line", "label_noise", "name").rows()
    assert lines == [
        ("bt", 0.0, "bt[label_noise=0]"),
        ("bt", 0.4, "bt[label_noise=0.4]"),
        (f"{ODD}[lr=0.01]", 0.0, NOISY["bsr[lr=0.01]"][0]),
        (f"{ODD}[lr=0.01]", 0.4, NOISY[ODD][0]),
    ]


@pytest.mark.parametrize(
    ("names", "rates"),
    [
        (("bt", "bt-noisy"), (0.0, 0.2)),  # no grid named them
        (("bt[lr=1]", "bt[lr=2]"), (0.0, 0.2)),
        (("bt[label_noise=0.1]", "hinge[label_noise=0.2]"), (0.1, 0.2)),  # one rate each
        (("label_noise=0", "label_noise=1"), (0.0, 0.2)),
    ],
)
def test_configurations_without_a_grid_form_no_line(
    names: tuple[str, ...], rates: tuple[float, ...]
) -> None:
    specs = [json.dumps({"label_noise": rate}) for rate in rates]
    assert noise_lines(pl.DataFrame({"name": names, "spec": specs})).is_empty()


def test_configurations_that_differ_in_more_than_the_rate_form_no_line() -> None:
    found = compared(noisy({"lr": 0.1}), "bt[label_noise=0]").noise
    assert found["line"].unique().to_list() == [f"{ODD}[lr=0.01]"]


def test_the_noise_table_repeats_the_report_on_its_configurations() -> None:
    ranked = {row["name"]: row for row in NOISE.ranking.iter_rows(named=True)}
    scored = {
        (row["split"], row["name"]): row
        for row in NOISE.scores.filter(metric="accuracy").iter_rows(named=True)
    }
    assert NOISE.noise["split"].unique(maintain_order=True).to_list() == [MEAN, *SPLITS[:3]]
    for row in NOISE.noise.iter_rows(named=True):
        same = ranked[row["name"]] if row["split"] == MEAN else scored[row["split"], row["name"]]
        assert [row[key] for key in ("estimate", "low", "high")] == [
            same[key] for key in ("estimate", "low", "high")
        ]


def test_changes_use_the_seeds_that_both_rates_have() -> None:
    """The last seed of "bad" diverged."""
    for split in SPLITS[:3]:
        falls = {row["name"]: row for row in NOISE.noise_falls.filter(split=split).to_dicts()}
        of_bt = [accuracy(f"bad-{seed}", split) - accuracy(f"bt-{seed}", split) for seed in (0, 1)]
        of_odd = [
            accuracy(f"{ODD}-{seed}", split) - accuracy(f"bsr[lr=0.01]-{seed}", split)
            for seed in range(3)
        ]
        bt, odd = falls["bt"], falls[f"{ODD}[lr=0.01]"]
        assert (bt["seeds"], odd["seeds"]) == (2, 3)
        assert bt["estimate"] == pytest.approx(np.mean(of_bt))
        assert odd["estimate"] == pytest.approx(np.mean(of_odd))
        assert bt["difference"] is None
        assert odd["difference"] == pytest.approx(np.mean(np.subtract(of_odd[:2], of_bt)))
        assert odd["difference_low"] < odd["difference"] < odd["difference_high"]


def test_the_noise_figure_draws_the_table() -> None:
    draw = noise_figure(NOISE)
    assert draw is not None
    tables = noise_tables(NOISE, 20)
    axes = draw().axes
    assert [axis.get_title() for axis in axes] == ["Mean of 3 splits", *SPLITS[:3]]
    for axis, table in zip(axes, tables, strict=True):
        assert table.columns[1:4] == ("0 %", "40 %", "40 % minus 0 %")
        lines = {line.get_label(): line for line in axis.lines}
        assert lines.keys() == {row[0] for row in table.rows}
        for row in table.rows:
            x, y = lines[row[0]].get_data()
            assert np.round(x, -1).tolist() == [0, 40]
            assert [f"{value:.1f}" for value in y] == [cell.split("±")[0] for cell in row[1:3]]
    assert tables[0].rows[-1][0] == "bt"
    assert tables[0].rows[-1][-1] == "baseline"


def test_a_table_without_a_baseline() -> None:
    alone = compared(noisy(), None)
    table = noise_tables(alone, 1)[0]
    assert len(table.rows) == 1
    assert table.columns[-1] == "40 % minus 0 %"


def test_names_are_escaped_and_drawn_as_they_are() -> None:
    text = markdown(noise_tables(NOISE, 20)[0])
    assert r"hinge\|\$x\_1\$ \[red\]\*\[lr=0.01\]" in text
    draw = noise_figure(NOISE)
    assert draw is not None
    assert b"hinge|$x_1$ [red]*[lr=0.01]" in drawn({"noise": draw})["noise.svg"]


def test_nothing_is_shown_without_a_grid_or_scenarios() -> None:
    plain = compared(SWEEP, "bt")
    assert plain.noise.is_empty()
    assert plain.noise_falls.is_empty()
    assert plain.scenario_falls.is_empty()
    assert noise_figure(plain) is scenario_figure(plain) is None
    assert noise_tables(plain, 20) == scenario_tables(plain, 20) == []


SCENARIOS = compared(SWEEP, "bt", "id", "absent", "ood/chat_hard", "ood/maths")


def test_the_fall_over_scenarios_is_the_last_minus_the_first() -> None:
    assert SCENARIOS.scenarios == ("id", "ood/chat_hard", "ood/maths")
    falls = {row["name"]: row for row in SCENARIOS.scenario_falls.to_dicts()}

    def change(name: str) -> float:
        runs = [f"{name}-{seed}" for seed in range(3)]
        return np.mean([accuracy(run, "ood/maths") - accuracy(run, "id") for run in runs])

    for name in ("bt", "bsr[lr=0.01]", ODD):
        assert falls[name]["estimate"] == pytest.approx(change(name))
    assert falls["bsr[lr=0.01]"]["difference"] == pytest.approx(
        change("bsr[lr=0.01]") - change("bt")
    )


def test_the_scenario_figure_draws_the_table() -> None:
    draw = scenario_figure(SCENARIOS)
    assert draw is not None
    (table,) = scenario_tables(SCENARIOS, 20)
    left, right = draw().axes
    assert [label.get_text() for label in left.get_xticklabels()] == [*SCENARIOS.scenarios]
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert lines.keys() == {row[0] for row in table.rows}
    for row in table.rows:
        cells = [cell.split("±")[0] for cell in row[1:4]]
        assert [f"{value:.1f}" for value in lines[row[0]]] == cells
    assert table.columns[4:] == ("ood/maths minus id", "minus bt's")
    # Right, all but the baseline: the paired differences of the same rows.
    shown = {line.get_label(): line.get_ydata() for line in right.lines[:-1]}
    assert shown.keys() == lines.keys() - {"bt"}
    for name, values in shown.items():
        scores = SCENARIOS.scores.filter(metric="accuracy", name=name)
        rows = {row["split"]: row for row in scores.iter_rows(named=True)}
        wanted = [100 * rows[split]["difference"] for split in SCENARIOS.scenarios]
        assert values.tolist() == pytest.approx(wanted)
    assert r"hinge\|\$x\_1\$ \[red\]\*" in markdown(table)


def test_many_configurations_show_the_best_and_the_baseline() -> None:
    """`top` limits the rows of the table; the baseline is added."""
    (table,) = scenario_tables(SCENARIOS, 1)
    assert [row[0] for row in table.rows] == [SCENARIOS.ranking["name"][0], "bt"]


def test_a_metric_needs_two_scenarios() -> None:
    """The split id has only pairs, the split groups only groups."""
    one = compared(SWEEP, "bt", "id", "groups")
    assert scenario_figure(one) is None
    assert scenario_tables(one, 20) == []
