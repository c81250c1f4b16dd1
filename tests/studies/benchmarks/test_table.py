"""The tables of suites: marks of the best and of differences, files and the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from toy_cache import toy_cache
from toy_sweep import toy_sweep

from embrm.cli import main
from embrm.core.errors import UserError
from embrm.core.table import markdown
from embrm.metrics.intervals import Replicates
from embrm.studies.benchmarks.measure import SuiteScores
from embrm.studies.benchmarks.table import MEAN, suite_tables, suites, summarize

NAMES = ("bt", "hinge|$x_1$ [red]*", "bad")
NAN = float("nan")


def replicates(estimates: list[float], noise: float = 0.05) -> Replicates:
    """Replicates of three configurations, two seeds each; resampling moves all of them alike."""

    values = np.repeat(np.asarray(estimates, dtype=np.float64), 2)
    moved = noise * np.random.default_rng(0).standard_normal((200, 1))
    return Replicates(values, values + moved, 60)


def suite(split: str, scores: dict[str, list[float]], longer: float | None = 0.5) -> SuiteScores:
    return SuiteScores(
        split,
        split.removeprefix("ood/"),
        {name: replicates(values) for name, values in scores.items()},
        {} if longer is None else dict.fromkeys(scores, longer),
        0,
    )


RUNS = pl.DataFrame([{"name": name, "seed": seed} for name in NAMES for seed in (0, 1)])
HHH = suite("ood/hhh", {"accuracy": [0.6, 0.7, 0.5], "mean of subsets": [0.7, 0.7, 0.4]}, 0.25)
JUDGE = suite("ood/judge-bench", {"accuracy": [0.5, 0.6, 0.8]})
PARTIAL = suite("ood/rm-bench", {"mean of four sections": [NAN] * 3, "hard": [0.1, 0.2, 0.3]}, None)


def cells(
    scores: pl.DataFrame, top: int = 20, baseline: str = "bt"
) -> list[dict[str, dict[str, str]]]:
    """Every table as configuration → column → cell."""
    return [
        {row[0]: dict(zip(table.columns[1:], row[1:], strict=True)) for row in table.rows}
        for table in suite_tables(scores, baseline, top)
    ]


def test_scores_and_the_mean_of_the_overall_scores() -> None:
    scores = summarize([HHH, JUDGE, PARTIAL], RUNS, "bt")
    rows = {(row["split"], row["score"], row["name"]): row for row in scores.iter_rows(named=True)}
    assert scores.height == 3 * (2 + 1 + 2 + 1)
    best = {key for key, row in rows.items() if row["best"]}
    assert best == {
        ("ood/hhh", "accuracy", NAMES[1]),
        ("ood/hhh", "mean of subsets", "bt"),
        ("ood/hhh", "mean of subsets", NAMES[1]),  # tied
        ("ood/judge-bench", "accuracy", "bad"),
        ("ood/rm-bench", "hard", "bad"),
        (MEAN, MEAN, NAMES[1]),
        (MEAN, MEAN, "bad"),
    }
    together = rows[MEAN, MEAN, NAMES[1]]
    # The suite without an overall score does not enter the mean.
    assert together["estimate"] == pytest.approx((0.7 + 0.6) / 2)
    assert together["difference"] == pytest.approx(0.1)
    assert together["longer"] == pytest.approx((0.25 + 0.5) / 2)
    # Resampling moves all configurations alike, so the differences to the baseline do not vary.
    assert together["low"] < 0.6
    assert together["difference_low"] == pytest.approx(0.1)
    missing = rows["ood/rm-bench", "mean of four sections", "bt"]
    assert (missing["estimate"], missing["best"], missing["longer"]) == (None, False, None)
    assert scores.filter("overall")["score"].n_unique() == 3
    assert rows["ood/hhh", "accuracy", "bt"]["difference"] is None


def test_one_suite_has_no_mean() -> None:
    scores = summarize([HHH, PARTIAL], RUNS, "bt")
    assert MEAN not in scores["split"]
    tables = cells(scores)
    assert [*tables[0]][:3] == [NAMES[1], "bt", "bad"]  # sorted by the only overall score


def test_tables_mark_the_best_and_differences_to_the_baseline() -> None:
    scores = summarize([HHH, JUDGE, PARTIAL], RUNS, "bt")
    overall, hhh, partial = cells(scores)
    assert [*overall[NAMES[1]]] == ["hhh", "judge-bench", "rm-bench", "mean"]
    half = 100 * np.diff(np.quantile(HHH.scores["accuracy"].draws[:, 0], [0.025, 0.975]))[0] / 2
    assert overall[NAMES[1]]["hhh"] == f"70.0±{half:.1f}▲★"
    assert overall["bad"]["hhh"] == f"50.0±{half:.1f}▼"
    assert overall["bt"]["hhh"] == f"60.0±{half:.1f}"
    assert {row["rm-bench"] for row in overall.values()} == {"n/a"}
    assert overall["the longer response"]["hhh"] == "25.0"
    assert [*hhh["bt"]] == ["accuracy", "mean of subsets"]
    assert partial["bad"]["hard"].startswith("30.0")
    assert "the longer response" not in partial
    assert "the longer response" in hhh


def test_the_best_come_first_and_the_baseline_is_always_shown() -> None:
    scores = summarize([suite("ood/hhh", {"accuracy": [0.1, 0.3, 0.2]}, None)], RUNS, "bt")
    [table] = suite_tables(scores, "bt", 1)
    assert [row[0] for row in table.rows] == [NAMES[1], "bt"]
    assert "1 more configurations in suites.json." in table.note
    first, *_ = cells(summarize([HHH, JUDGE], RUNS, NAMES[1]), 1, NAMES[1])
    assert [*first] == ["bad", NAMES[1], "the longer response"]  # the best ones of the suites
    [alone] = cells(summarize([_one_seed()], RUNS.unique("name", maintain_order=True), "bt"))
    assert [*alone] == ["bad*", "bt*", f"{NAMES[1]}*", "the longer response"]


def _one_seed() -> SuiteScores:
    found = replicates([0.2, 0.1, 0.3])
    alone = Replicates(found.estimates[::2], found.draws[:, ::2], found.prompts)
    return SuiteScores("ood/hhh", "hhh", {"accuracy": alone}, {"accuracy": 0.5}, 0)


def test_many_suites_are_split_into_several_tables() -> None:
    many = [suite(f"ood/{number}", {"accuracy": [0.1, 0.2, 0.3]}) for number in range(8)]
    tables = suite_tables(summarize(many, RUNS, "bt"), "bt", 5)
    assert [len(table.columns) for table in tables] == [8, 3]
    assert {tuple(row[0] for row in table.rows) for table in tables} == {
        ("bad", NAMES[1], "bt", "the longer response")
    }


def test_headings_are_distinct_and_name_a_suite_that_the_split_does_not() -> None:
    same = replace(HHH, split="hhh")
    other = replace(HHH, split="id")
    tables = suite_tables(summarize([HHH, same, JUDGE, other], RUNS, "bt"), "bt", 5)
    assert tables[0].columns == (
        "configuration", "ood/hhh", "hhh", "judge-bench", "id (hhh)", "mean",
    )  # fmt: skip
    assert [table.title for table in tables[1:]] == ["ood/hhh", "hhh", "id (hhh)"]


def test_a_split_with_the_name_of_the_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a split named 'mean' cannot be scored"):
        suites(tmp_path, named={MEAN: "hhh"})


def test_markdown_shows_names_as_they_are() -> None:
    [first, *_] = suite_tables(summarize([HHH, JUDGE], RUNS, "bt"), "bt", 5)
    assert r"hinge\|\$x\_1\$ \[red\]\*" in markdown(first)


# Files and the command.

BAD_RUN = """
[[runs]]
name = "bad"
lr = 1e-9
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suites")
    return toy_sweep(folder, toy_cache(folder / "cache"), BAD_RUN)


def test_files_hold_the_same_scores_and_repeat_their_bytes(swept: Path, tmp_path: Path) -> None:
    named = {"ood/far": "hhh", "id": "judge-bench"}
    first, again = (suites(swept, named=named, out=tmp_path / name) for name in "ab")
    names = [path.name for path in first.files]
    assert names == ["suites.parquet", "suites.csv", "suites.json", "suites.md"]
    for one, other in zip(first.files, again.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    parquet, csv, found, text = first.files
    assert pl.read_parquet(parquet).equals(first.scores)
    assert pl.read_csv(csv).height == first.scores.height
    assert json.loads(found.read_text())["scores"] == first.scores.to_dicts()
    assert text.read_text().startswith("# one: suites\n")
    assert "| the longer response |" in text.read_text()
    assert not (swept / "suites.md").exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["embrm", "suites", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command(
    swept: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--suite", "ood/far=hhh", "--out", str(tmp_path)]
    assert command(monkeypatch, str(swept), *options) == 0
    shown = capsys.readouterr().out
    assert "Suites: overall scores" in shown
    assert "★" in shown
    assert f"wrote {tmp_path}/suites.md" in shown.replace("\n", "")
    assert command(monkeypatch, str(swept), *options, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["suite"] for row in rows["scores"]} == {"hhh"}
    assert rows["notes"] == []
    for wrong, word in (
        ("ood/far", "--suite 'ood/far': write SPLIT=SUITE"),
        ("ood/far=hh", "no suite 'hh'"),
        ("id=rm-bench", "id cannot be scored: rm-bench finds no column 'chosen_model'"),
    ):
        assert command(monkeypatch, str(swept), "--suite", wrong) == 2
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") == 1
