"""Read the weights file of a run: that of a head, or of a fine-tuned model."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from embrm.core.errors import UserError
from embrm.results.ledger import open_results
from embrm.sweeps.spec import RunSpec
from embrm.sweeps.weights import FORMAT, MODEL_FORMAT, PREPROCESS, REFERENCE, REWARDS_FORMAT
from embrm.training.ensembles import Combination, Reference
from embrm.training.heads import Parameters, Preprocess


@dataclass(frozen=True)
class SavedRun:
    """A stored run.

    parameters: the weights of its heads, several for an ensemble; or, for learners without weights
        such as boosted trees, the rewards of all responses of the cache.
    preprocess: what is applied to states first.
    combination: combines the rewards of the heads (`embrm.training.heads.score_states`) into one.
    """

    run_id: str
    spec: RunSpec
    cache_id: str
    parameters: Parameters
    preprocess: Preprocess
    combination: Combination


def load_run(folder: Path, run_id: str) -> SavedRun:
    """Read the weights of a sweep's run.

    Raises: UserError when they are missing, damaged, or those of a fine-tuned model, and when the
    run diverged.
    """
    path = folder / "weights" / f"{run_id}.safetensors"
    if not path.is_file():
        row = open_results(folder).find(run_id)
        raise UserError(
            f"run {run_id!r} ({row['status']}) has no weights in {folder}: choose another run"
        )
    header, tensors = _read(path, (FORMAT, REWARDS_FORMAT))
    if header["format"] not in (FORMAT, REWARDS_FORMAT):
        raise UserError(
            f"{path} has format {header['format']!r}, not that of a sweep's head: score a "
            "fine-tuned model with embrm score"
        )
    mean, scale = (tensors.pop(PREPROCESS + name, None) for name in ("mean", "scale"))
    means, sds = (tensors.pop(REFERENCE + name, None) for name in ("mean", "sd"))
    reference = None if means is None or sds is None else Reference(means, sds)
    spec = RunSpec.stored(header["run"], str(path))
    return SavedRun(
        run_id=run_id,
        spec=spec,
        cache_id=header["cache_id"],
        parameters=tensors,
        preprocess=Preprocess(mean, scale),
        combination=Combination(spec.combine, spec.penalty, reference),
    )


@dataclass(frozen=True)
class SavedModel:
    """A stored fine-tuned model.

    header: format, cache_id, run (the fields of its spec), tune, and the base model.
    head: tensors [1, ...].
    backbone: the weights that were trained, named as in the base model's state_dict.
    """

    header: dict[str, Any]
    head: Parameters
    backbone: dict[str, Tensor]


def load_saved_model(path: Path) -> SavedModel:
    """Read the weights file of a fine-tuned run.

    Raises: UserError when it is missing, damaged, or that of another kind of run.
    """
    header, tensors = _read(path, (MODEL_FORMAT,))
    if header["format"] != MODEL_FORMAT:
        raise UserError(
            f"{path} has format {header['format']!r}, a fine-tuned model has {MODEL_FORMAT!r}: "
            "pass the weights of an embrm finetune run"
        )

    def below(prefix: str) -> dict[str, Tensor]:
        names = (name for name in tensors if name.startswith(prefix))
        return {name.removeprefix(prefix): tensors[name] for name in names}

    return SavedModel(header, below("head."), below("backbone."))


def _read(path: Path, formats: Collection[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of a weights file, and its tensors if its format is one of `formats`.

    Tensors of other formats are not read, since they may be as large as a whole model.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["embrm"])
            names = file.keys() if header["format"] in formats else ()
            return header, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: delete the run's parts folder, and train it again"
        ) from None
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} is damaged: delete it and its parts folder, and train the run again"
        ) from None
