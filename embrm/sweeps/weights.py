"""The weights file of a run: what is stored, and its digest."""

import hashlib
from collections.abc import Mapping

import safetensors.torch
import torch

from embrm.core.specs import canonical_json
from embrm.sweeps.spec import Run
from embrm.training.ensembles import Reference
from embrm.training.heads import REWARDS, Parameters, Preprocess

FORMAT = "embrm-head 1"
"""Format of a weights file that holds heads."""

REWARDS_FORMAT = "embrm-rewards 1"
"""Format of a file that holds rewards of the cache's responses, for runs without weights."""

MODEL_FORMAT = "embrm-model 1"
"""Format of a file that holds a fine-tuned model."""

PREPROCESS = "preprocess."
REFERENCE = "reference."


def weights_file(
    run: Run,
    cache_id: str,
    parameters: Parameters,
    preprocess: Preprocess,
    reference: Reference | None = None,
) -> tuple[bytes, str]:
    """The bytes of a run's safetensors file, and the digest of its tensors without the header.

    reference: what the members of an ensemble are standardised on, if they are not averaged.
    """
    tensors = dict(parameters)
    if preprocess.mean is not None and preprocess.scale is not None:
        tensors[PREPROCESS + "mean"] = preprocess.mean
        tensors[PREPROCESS + "scale"] = preprocess.scale
    if reference is not None:
        tensors[REFERENCE + "mean"] = reference.mean
        tensors[REFERENCE + "sd"] = reference.sd
    kind = REWARDS_FORMAT if REWARDS in parameters else FORMAT
    header = {"format": kind, "cache_id": cache_id, "run": run.spec.model_dump(mode="json")}
    # One key only, because the library writes metadata in no fixed order.
    content = safetensors.torch.save(tensors, metadata={"embrm": canonical_json(header)})
    return content, tensors_digest(tensors)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the tensors' names, types, shapes and values, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].contiguous().numpy()
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
