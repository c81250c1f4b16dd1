"""Made-up results of one stage, as a folder: configurations of given skill on two splits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from embrm.core.specs import canonical_json, content_id
from embrm.metrics.accuracy import OUTCOMES, PROMPTS
from embrm.sweeps.ledger import parquet
from embrm.sweeps.spec import RunSpec, SweepSpec

SPLITS = ("id", "ood/far")
PROMPT_COUNT, PAIRS = 80, 8


def small_stage(
    folder: Path,
    skills: Mapping[str, float | None],
    specs: Mapping[str, dict[str, Any]] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    stage: int = 0,
    baseline: str = "bt",
    cache_id: str = "c0",
    splits: Sequence[str] = SPLITS,
    train_pairs: int = 1000,
) -> Path:
    """A results folder. skills: accuracy by configuration, None: it diverged; specs: their fields.
    stage: another has other luck."""
    folder.mkdir(parents=True)
    ledger, outcomes = [], []
    for name, skill in skills.items():
        spec = RunSpec(**(specs or {}).get(name, {}))
        for seed in seeds:
            run_id = content_id([name, seed, stage])
            row: dict[str, Any] = {"run_id": run_id, "config_id": content_id(name), "config": name}
            row |= {"seed": seed, "status": "diverged" if skill is None else "ok"}
            own = spec.model_copy(update={"seed": seed})
            row |= {"spec": canonical_json(own.model_dump(mode="json"))}
            row |= {"train_pairs": train_pairs, "epochs": 3, "best_epoch": 1}
            row |= {"validation_accuracy": skill}
            for split in splits:
                if skill is None:
                    continue
                random = np.random.default_rng([seed, stage, len(split), len(name)])
                wins = (random.random((PROMPT_COUNT, PAIRS)) < skill).sum(axis=1).astype(float)
                nll = PAIRS * (1.2 - wins / PAIRS)
                lists = {"wins": wins, "nll": nll} | dict.fromkeys(
                    ("ties", "brier"), np.zeros(PROMPT_COUNT)
                )
                lists |= {"tau": np.full(PROMPT_COUNT, np.nan)}
                outcomes.append(
                    {"run_id": run_id, "split": split}
                    | {metric: values.tolist() for metric, values in lists.items()}
                )
                row[f"accuracy@{split}"] = wins.sum() / PROMPT_COUNT / PAIRS
                row[f"nll@{split}"] = nll.sum() / PROMPT_COUNT / PAIRS
            ledger.append(row)
    prompts = [
        {"split": split, "subset": None, "prompt_id": f"{split} {prompt}"}
        | {"pairs": float(PAIRS), "length_wins": 4.0, "length_ties": 0.0}
        for split in splits
        for prompt in range(PROMPT_COUNT)
    ]
    tables = {
        "ledger": pl.DataFrame(ledger, infer_schema_length=None),
        "prompts": pl.DataFrame(prompts, schema={"split": pl.String()} | PROMPTS),
        "outcomes": pl.DataFrame(
            outcomes,
            schema={"run_id": pl.String(), "split": pl.String()}
            | dict.fromkeys(OUTCOMES, pl.List(pl.Float32())),
        ),
    }
    for name, table in tables.items():
        (folder / f"{name}.parquet").write_bytes(parquet(table))
    spec = SweepSpec(
        evaluate=tuple(splits),
        seeds=tuple(seeds),
        baseline=baseline,
        runs=tuple({"name": name} for name in skills),
    )
    header = {"spec": spec.model_dump(mode="json"), "cache_id": cache_id, "cache": "cache/x"}
    header |= {"environment": {}, "leaked": {}}
    (folder / "sweep.json").write_text(canonical_json(header))
    return folder
