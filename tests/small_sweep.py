"""A made-up sweep for the report's tests: four configurations, three seeds, five splits."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from embrm.evaluate.accuracy import PROMPT_SCHEMA

SKILL = {"bt": 0.60, "bsr[lr=0.01]": 0.72, "hinge|$x_1$ [red]*": 0.60, "bad": 0.45}
SPLITS = ("id", "ood/chat_hard", "ood/maths", "groups", "absent")
METRICS = (
    *("nll", "nll_calibrated", "brier", "brier_calibrated", "ece", "ece_calibrated"),
    *("margin", "reward_sd", "ties"),
)


@dataclass(frozen=True)
class SmallSweep:
    """The tables of `embrm.sweep.ledger`, as far as the report reads them."""

    ledger: pl.DataFrame
    curves: pl.DataFrame
    prompts: pl.DataFrame


def small_sweep(seeds: int = 3) -> SmallSweep:
    """Accuracy on every split close to `SKILL`; the last seed of "bad" diverged."""
    ledger, curves, prompts = [], [], []
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
            prompts += _prompts(run_id, skill, seed)
            curves += [
                {
                    "run_id": run_id,
                    "epoch": epoch,
                    "validation_nll": 0.7 - 0.02 * epoch + 0.001 * seed,
                    "validation_accuracy": skill - 0.1 / (epoch + 1),
                }
                for epoch in range(5)
            ]
    schema = {"run_id": pl.String(), "split": pl.String()} | PROMPT_SCHEMA
    return SmallSweep(
        pl.DataFrame(ledger, infer_schema_length=None),
        pl.DataFrame(curves),
        pl.DataFrame(prompts, schema=schema),
    )


def _prompts(run_id: str, skill: float, seed: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for split in SPLITS[:3]:
        luck = np.random.default_rng([seed, len(split)])  # shared by the configurations
        for prompt in range(60):
            uniform = luck.random(8)
            subset = None if split == "id" else ("easy", "hard|er\x1b[31m")[prompt % 2]
            zeros = dict.fromkeys(("ties", "nll", "brier", "margin", "length_ties"), 0.0)
            rows.append(
                zeros
                | {"run_id": run_id, "split": split, "subset": subset, "tau": None}
                | {"prompt_id": f"{split} {prompt}", "pairs": 8.0, "length_wins": 5.0}
                | {"wins": float((uniform < skill).sum())}
            )
    for prompt in range(20):
        zeros = dict.fromkeys([name for name in PROMPT_SCHEMA if name != "tau"], 0.0)
        rows.append(
            zeros
            | {"run_id": run_id, "split": "groups", "subset": None, "prompt_id": f"g{prompt}"}
            | {"tau": skill - 0.5 + 0.01 * prompt if prompt else None}
        )
    return rows
