"""The best-of-n comparison: recovery of known curves, intervals, tables, files and the command."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from command_line import Outcome
from toy_cache import toy_cache
from toy_sweep import toy_sweep

from embrm.core.errors import UserError
from embrm.metrics.best_of_n import kl_bound
from embrm.studies.best_of_n.measure import SplitChoices
from embrm.studies.best_of_n.table import best_of_n, best_of_n_figure, best_of_n_tables, summarize

NS = (1, 2, 4, 8, 16, 32)
D = np.sqrt(kl_bound(NS))


def planted(
    gains: dict[str, np.ndarray], prompts: int = 200, seeds: int = 2, noise: float = 0.0
) -> tuple[SplitChoices, pl.DataFrame]:
    """Made-up choices of configurations with known gains of gold, in sd; the reward gains √KL.

    gains: configuration → gain of gold at each n of `NS`. noise: sd of the noise added to gold.
    """
    generator = np.random.default_rng(prompts)
    runs = pl.DataFrame(
        [{"name": name, "seed": seed} for name in sorted(gains) for seed in range(seeds)]
    )
    curves = np.stack([gains[name] for name in runs["name"]])
    gold = np.tile(curves, (prompts, 1, 1))
    gold += noise * generator.standard_normal(gold.shape)
    level = generator.standard_normal((prompts, 1, 1))
    chosen = SplitChoices(
        split="pool",
        ns=NS,
        prompt_ids=pl.Series([f"prompt {prompt}" for prompt in range(prompts)]),
        gold=gold + level,
        proxy=np.broadcast_to(D, gold.shape).copy(),
        kl=np.broadcast_to(D**2, gold.shape[1:]),
        gold_mean=100.0,
        gold_sd=4.0,
        sizes=(32, 32),
        tied=np.zeros(runs.height, np.int64),
        constant=0,
        leaked=0,
        excluded={},
    )
    return chosen, runs


def test_known_curves_are_recovered() -> None:
    falling = D * (1.5 - 0.8 * D)
    chosen, runs = planted({"ideal": D, "falls": falling})
    curves, summary = summarize(chosen, runs, "ideal")
    rows = {row["name"]: row for row in summary.iter_rows(named=True)}
    ideal, falls = rows["ideal"], rows["falls"]
    assert [row["rank"] for row in (ideal, falls)] == [1, 2]
    assert (ideal["gap"], ideal["drop"]) == (pytest.approx(0, abs=1e-6), 0)
    assert (ideal["peak_n"], ideal["fit_peak"]) == (32, None)
    assert ideal["gold_difference"] is None
    assert (falls["alpha"], falls["beta"]) == pytest.approx((1.5, 0.8), abs=1e-6)
    assert falls["fit_peak"] == pytest.approx(1.5 / 1.6, abs=1e-6)
    assert falls["peak_n"] == NS[falling.argmax()]
    drop = falling.max() - falling[-1]
    assert falls["drop"] == pytest.approx(drop, abs=1e-6)
    assert falls["fit_drop"] == pytest.approx(1.5**2 / 3.2 - falling[-1], abs=1e-6)
    assert falls["gap"] == pytest.approx(D[-1] - falling[-1], abs=1e-6)
    # Differences are paired: prompts differ only in the level of gold, which cancels.
    assert falls["gold_low"] < falls["gold"] - 0.1
    for end in ("", "_low", "_high"):
        assert falls[f"gold_difference{end}"] == pytest.approx(4 * (falling[-1] - D[-1]), abs=1e-6)
        assert falls[f"gap_difference{end}"] == pytest.approx(D[-1] - falling[-1], abs=1e-6)
    point = curves.filter(name="falls", n=8).row(0, named=True)
    level = chosen.gold[:, 0, 0].mean()
    assert point["kl"] == point["kl_estimate"] == pytest.approx(D[3] ** 2)
    assert point["gain"] == pytest.approx(falling[3], abs=1e-6)
    assert point["proxy"] == pytest.approx(D[3], abs=1e-6)
    assert point["gold"] == pytest.approx(100 + 4 * (level + falling[3]), abs=1e-5)
    assert curves.height == 2 * len(NS)


def test_noise_alone_is_not_reported_as_a_drop() -> None:
    """The highest point of a flat curve lies above its end, but not on other prompts."""
    excluded, naive, trials = 0, 0.0, 40
    for trial in range(trials):
        chosen, runs = planted({"flat": np.zeros(6)}, prompts=40 + trial, noise=1.0)
        row = summarize(chosen, runs, "flat")[1].row(0, named=True)
        mean = chosen.gold.mean(axis=(0, 1))
        naive += (mean.max() - mean[-1]) / trials
        excluded += row["drop_low"] > 0
    assert naive > 0.05
    assert excluded <= 4


def test_a_true_drop_is_found_despite_noise() -> None:
    chosen, runs = planted({"falls": D * (1.5 - 0.8 * D)}, prompts=300, seeds=5, noise=1.0)
    row = summarize(chosen, runs, "falls")[1].row(0, named=True)
    assert 0 < row["drop_low"] < row["drop"] < row["drop_high"]
    assert row["gap_low"] < row["gap"] < row["gap_high"]


def test_one_prompt_has_curves_without_intervals() -> None:
    chosen, runs = planted({"a": D, "b": D / 2}, prompts=1)
    curves, summary = summarize(chosen, runs, "a")
    assert summary["gold"].null_count() == summary["gap"].null_count() == 0
    for column in ("gold_low", "gap_high", "drop", "gold_difference_low"):
        assert summary[column].null_count() == 2, column
    assert curves["gain"].null_count() == 0


def test_a_run_whose_rewards_are_all_tied_has_no_gap() -> None:
    chosen, runs = planted({"a": D, "ties": np.zeros(6)})
    chosen.proxy[:, runs["name"].to_numpy() == "ties"] = np.nan
    chosen.tied[2:] = 200
    row = summarize(chosen, runs, "a")[1].filter(name="ties").row(0, named=True)
    assert row["gap"] is None
    assert row["gold_difference"] < 0
    assert row["tied"] == 200


def test_tables_distinguish_a_drop_from_none() -> None:
    chosen, runs = planted({"falls": D * (1.5 - 0.8 * D), "ideal": D, "other": D / 2}, seeds=1)
    chosen.tied[0] = 1
    summary = summarize(chosen, runs, "falls")[1]
    splits = pl.DataFrame(
        [
            {"split": "pool", "prompts": 1200, "least": 32, "most": 40, "gold_at_1": 0.1}
            | {"gold_sd": 2.0, "constant": 3, "leaked": 4, "excluded": "5 one response"}
        ]
    )
    pools, table = best_of_n_tables(summary, splits, "falls", 1)
    assert pools.rows == (("pool", "1,200", "32-40", "0.100", "2.000", "3", "4"),)
    assert "Groups of pool left out: 5 one response." in pools.note
    ideal, falls = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (ideal["configuration"], ideal["drop"], ideal["fitted peak"]) == ("ideal", "none", "n/a")
    assert ideal["minus falls"].endswith("▲")
    assert (falls["configuration"], falls["minus falls"]) == ("falls°", "baseline")
    assert falls["drop"].startswith("+0.")
    assert falls["gap"].startswith(f"{D[-1] - D[-1] * (1.5 - 0.8 * D[-1]):+.3f} [+")
    assert "1 more configurations in bon.json." in table.note
    assert "* one seed" in table.note


def test_the_same_numbers_draw_the_same_bytes() -> None:
    chosen, runs = planted({"falls": D * (0.5 - 0.8 * D), "ideal": D})
    curves, summary = summarize(chosen, runs, "ideal")
    once, again = (best_of_n_figure(curves, summary, "ideal") for _ in range(2))
    assert once == again
    assert once.keys() == {"bon.png", "bon.svg"}
    higher = best_of_n_figure(curves.with_columns(pl.col("gain") + 0.5), summary, "ideal")
    assert higher != once


# Files and the command.

OTHER_RUNS = """
[[runs]]
name = "noise|$x_1$ [red]*"
label_noise = 0.3
[[runs]]
name = "wild"
lr = 1e30
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = toy_cache(tmp_path_factory.mktemp("cache") / "toy", prompts=100, per_prompt=8)
    return toy_sweep(tmp_path_factory.mktemp("sweeps"), cache, OTHER_RUNS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("bon.*")}


def test_files_are_written_beside_the_results_and_repeat_their_bytes(
    swept: Path, tmp_path: Path
) -> None:
    found = best_of_n(swept)
    names = {"bon.parquet", "bon.json", "bon.md", "bon.png", "bon.svg"}
    assert {path.name for path in found.files} == names
    assert [table.title for table in found.tables] == ["Response pools", "Best of n: ood/far"]
    assert found.notes == ("2 of 6 runs diverged and are left out",)
    assert pl.read_parquet(swept / "bon.parquet").equals(found.curves)
    text = (swept / "bon.md").read_text()
    assert "(figures/bon.png)" in text
    assert r"noise\|\$x\_1\$ \[red\]\*" in text
    assert text.endswith("- 2 of 6 runs diverged and are left out.\n")
    content = json.loads((swept / "bon.json").read_text())
    assert content["summary"] == found.summary.to_dicts()
    best_of_n(swept, out=tmp_path)
    assert contents(tmp_path) == contents(swept)


def test_the_command_shows_what_it_wrote(
    embrm: Callable[..., Outcome], swept: Path, tmp_path: Path
) -> None:
    code, out, _ = embrm("bon", swept, "--n", "2,8", "--out", tmp_path)
    assert code == 0
    assert "gold at n" in out
    assert f"wrote {tmp_path / 'figures' / 'bon.png'}" in out
    code, out, _ = embrm("bon", swept, "--json", "--top", 1, "--out", tmp_path)
    found = json.loads(out)
    assert code == 0
    assert found["baseline"] == "bt"
    assert [row["n"] for row in found["curves"] if row["name"] == "bt"] == [1, 2, 4, 8]
    assert len(found["summary"]) == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--n", "2,x"), ("--n '2,x'", "1,4,16")),
        (("--n", "0,4"), ("--n '0,4'", "from 1")),
        (("--n", "1"), ("name at least one larger n",)),
        (("--n", "64"), ("n = 64", "has 8 responses", "lower n")),
        (("--split", "id"), ("split 'id'", "ood/far")),
        (("--baseline", "wild"), ("'wild' has no finished runs", "bt")),
        (("--cache", "nowhere"), ("nowhere",)),
    ],
)
def test_wrong_arguments_are_refused_with_one_line(
    embrm: Callable[..., Outcome],
    swept: Path,
    words: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    code, _, err = embrm("bon", swept, *words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err, err


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep results in"):
        best_of_n(tmp_path)
