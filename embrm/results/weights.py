"""Stored heads: the one reader of a run's weights file."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors

from embrm.core.errors import UserError
from embrm.results.ledger import open_results
from embrm.sweeps.spec import RunSpec
from embrm.sweeps.weights import FORMAT, PREPROCESS, REFERENCE, REWARDS_FORMAT
from embrm.training.ensembles import Combination, Reference
from embrm.training.heads import Parameters, Preprocess


@dataclass(frozen=True)
class SavedRun:
    """A stored head, or several, or the rewards of what has no weights: score states with
    `embrm.training.heads.score`, and make one reward of theirs with `combination`."""

    run_id: str
    spec: RunSpec
    cache_id: str
    parameters: Parameters
    preprocess: Preprocess
    combination: Combination


def load_run(folder: Path, run_id: str) -> SavedRun:
    """Read a run's weights. Raises: UserError when they are missing, damaged or diverged."""
    path = folder / "weights" / f"{run_id}.safetensors"
    if not path.is_file():
        row = open_results(folder).find(run_id)
        raise UserError(
            f"run {run_id!r} ({row['status']}) has no weights in {folder}: take another"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["embrm"])
            # Before tensors are read: they may be a whole model's.
            if header["format"] not in (FORMAT, REWARDS_FORMAT):
                raise UserError(
                    f"{path} has format {header['format']!r}, not that of a sweep's head: of a "
                    "fine-tuned model rewards come from embrm score"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is damaged: delete it and its sweep's parts folder, and run the sweep again"
        ) from None
    mean, scale = (tensors.pop(PREPROCESS + name, None) for name in ("mean", "scale"))
    means, sds = (tensors.pop(REFERENCE + name, None) for name in ("mean", "sd"))
    reference = None if means is None or sds is None else Reference(means, sds)
    spec = RunSpec.parse(header["run"], str(path))
    return SavedRun(
        run_id=run_id,
        spec=spec,
        cache_id=header["cache_id"],
        parameters=tensors,
        preprocess=Preprocess(mean, scale),
        combination=Combination(spec.combine, spec.penalty, reference),
    )
