"""A made-up sweep for the report's tests: four configurations, three seeds, five splits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from embrm.metrics.accuracy import OUTCOMES, PROMPTS
from embrm.metrics.geometry import MEASURES
from embrm.results.comparison import ComparedTables, Comparison, compare_runs

SKILL = {"bt": 0.60, "bsr[lr=0.01]": 0.72, "hinge|$x_1$ [red]*": 0.60, "bad": 0.45}
SPLITS = ("id", "ood/chat_hard", "ood/maths", "groups", "absent")
METRICS = (
    *("nll", "nll_calibrated", "brier", "brier_calibrated", "ece", "ece_calibrated"),
    *("margin", "reward_sd", "ties"),
)


@dataclass(frozen=True)
class SmallSweep:
    """The tables of `embrm.sweeps.ledger`, as far as the report reads them."""

    ledger: pl.DataFrame
    curves: pl.DataFrame
    prompts: pl.DataFrame
    outcomes: pl.DataFrame

    def without(self, *unwanted: pl.Expr) -> "SmallSweep":
        """Without the prompts of which all this holds."""
        kept = self.prompts.filter(~pl.all_horizontal(unwanted))
        rows = self.prompts.with_row_index("place").with_columns(
            place=pl.int_range(pl.len()).over("split")
        )
        places = rows.filter(~pl.all_horizontal(unwanted)).group_by("split").agg("place")
        lists = self.outcomes.join(places, on="split", how="inner", maintain_order="left")
        outcomes = lists.with_columns(pl.col(OUTCOMES).list.gather(pl.col("place"))).drop("place")
        return replace(self, prompts=kept, outcomes=outcomes)


def small_sweep(seeds: int = 3) -> SmallSweep:
    """Accuracy on every split close to `SKILL`; the last seed of "bad" diverged."""
    ledger, curves, outcomes = [], [], []
    for name, skill in SKILL.items():
        for seed in range(seeds):
            run_id = f"{name}-{seed}"
            diverged = name == "bad" and seed == seeds - 1 and seeds > 1
            numbers = {f"{metric}@{split}": 0.25 for metric in METRICS for split in SPLITS[:3]}
            row = {"run_id": run_id, "config": name, "seed": seed, "status": "ok"}
            row |= {"validation_accuracy": skill} | numbers
            row |= {"spec": '{"epochs":9,"patience":3}', "epochs": 5, "best_epoch": 2}
            if diverged:
                row |= {"status": "diverged", "validation_accuracy": None, "best_epoch": None}
                row |= dict.fromkeys(numbers)
            ledger.append(row)
            if diverged:
                continue
            outcomes += _outcomes(run_id, skill, seed)
            curves += [
                {
                    "run_id": run_id,
                    "epoch": epoch,
                    "validation_nll": 0.7 - 0.02 * epoch + 0.001 * seed,
                    "validation_accuracy": skill - 0.1 / (epoch + 1),
                }
                for epoch in range(5)
            ]
    lists = dict.fromkeys(OUTCOMES, pl.List(pl.Float32()))
    return SmallSweep(
        pl.DataFrame(ledger, infer_schema_length=None),
        pl.DataFrame(curves),
        _prompts(),
        pl.DataFrame(outcomes, schema={"run_id": pl.String(), "split": pl.String()} | lists),
    )


def compare_tables(
    title: str,
    ledger: pl.DataFrame,
    prompts: pl.DataFrame,
    outcomes: pl.DataFrame,
    splits: Sequence[str],
    baseline: str | None,
    rank_by: str | None = None,
    **further: Any,
) -> Comparison:
    """`compare_runs` of tables that no folder holds."""
    tables = ComparedTables(title, ledger, prompts, outcomes, splits, **further)
    return compare_runs(tables, baseline, rank_by)


def small_geometry(adapters: tuple[str, ...] = ("bsr[lr=0.01]",), seeds: int = 3) -> pl.DataFrame:
    """Of the training responses and the splits with pairs: "norm" tells the split and the seed;
    what is of adapters, null for the other configurations, is 0.001 times as much."""
    rows = []
    for name in SKILL:
        for seed in range(seeds - (name == "bad" and seeds > 1)):
            for place, split in enumerate(("train", *SPLITS[:3])):
                row = dict.fromkeys(MEASURES, 0.5) | {"norm": 10.0 * place + seed}
                for column in ("drift", "drift_tokens", "kl_tokens", "kl_reward"):
                    row[column] = 0.001 * row["norm"] if name in adapters else None
                rows.append({"run_id": f"{name}-{seed}", "split": split, "responses": 256} | row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _prompts() -> pl.DataFrame:
    rows: list[dict[str, object]] = []
    for split in SPLITS[:3]:
        subsets = (None, None) if split == "id" else ("easy", "hard|er\x1b[31m")
        rows += [
            {"split": split, "subset": subsets[prompt % 2], "prompt_id": f"{split} {prompt}"}
            | {"pairs": 8.0, "length_wins": 5.0, "length_ties": 0.0}
            for prompt in range(60)
        ]
    rows += [
        {"split": "groups", "subset": None, "prompt_id": f"g{prompt}"}
        | {"pairs": 0.0, "length_wins": 0.0, "length_ties": 0.0}
        for prompt in range(20)
    ]
    return pl.DataFrame(rows, schema={"split": pl.String()} | PROMPTS)


def _outcomes(run_id: str, skill: float, seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for split in SPLITS[:3]:
        luck = np.random.default_rng([seed, len(split)])  # shared by the configurations
        wins = (luck.random((60, 8)) < skill).sum(axis=1).astype(float).tolist()
        zeros = dict.fromkeys(("ties", "nll", "brier"), [0.0] * 60)
        rows.append({"run_id": run_id, "split": split, "wins": wins, "tau": [np.nan] * 60} | zeros)
    taus = [np.nan, *(skill - 0.5 + 0.01 * prompt for prompt in range(1, 20))]
    zeros = dict.fromkeys(("wins", "ties", "nll", "brier"), [0.0] * 20)
    return [*rows, {"run_id": run_id, "split": "groups", "tau": taus} | zeros]
