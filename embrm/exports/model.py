"""Reward models out of runs: a head folded into a stock class where algebra allows, or carried by
our own small one.

A linear head on a linear adapter, standardised states and all, and any mean of such heads, is one
linear map of the state plus a constant:
    r = w·(I + up·down)·(h - mean)/scale = v·h - offset',   v = (w + downᵀ·upᵀ·w)/scale.
Stock classes have no bias, so the exported logit is v·h and the reward is the logit minus `offset`.
The constant cancels wherever rewards are compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from embrm.core.errors import UserError
from embrm.exports import modeling_embrm
from embrm.exports.modeling_embrm import EmbrmRewardConfig, EmbrmRewardModel
from embrm.exports.run_model import RunModel, load_backbone
from embrm.extraction.run import Prepared
from embrm.lm.loading import attention
from embrm.lm.tokens import reason_of
from embrm.training.heads import DOWN, DOWN_BIAS, UP, Parameters, Preprocess

CODE = Path(modeling_embrm.__file__)
"""The file that goes with a model of our own class."""

# In this process transformers finds our class by itself, and never asks for the folder's code.
AutoConfig.register(EmbrmRewardConfig.model_type, EmbrmRewardConfig, exist_ok=True)
AutoModelForSequenceClassification.register(EmbrmRewardConfig, EmbrmRewardModel, exist_ok=True)

STOCK = ("last",)
"""Views that a stock class pools."""

CUSTOM = ("last", "mean")
"""Views that our own class pools."""


@dataclass(frozen=True)
class Folded:
    """logit = weight·h, reward = logit - offset. weight: float64 [d]."""

    weight: Tensor
    offset: float


def fold(parameters: Parameters, preprocess: Preprocess) -> Folded | None:
    """The linear map that heads [members, ...] and their preprocessing are together, in float64;
    None where a ReLU is in the way."""
    if "hidden.0.weight" in parameters or DOWN_BIAS in parameters:
        return None
    weight = parameters["output.weight"].double()
    if UP in parameters:
        up, down = parameters[UP].double(), parameters[DOWN].double()
        weight = weight + torch.einsum("pd,pdr,pre->pe", weight, up, down)
    mean_weight = weight.mean(0)
    if preprocess.mean is None or preprocess.scale is None:
        return Folded(mean_weight, 0.0)
    mean_weight = mean_weight / preprocess.scale.double()
    return Folded(mean_weight, float(mean_weight @ preprocess.mean.double()))


def why_not_stock(run_model: RunModel, prepared: Prepared) -> str | None:
    """Why a run has no stock form, or None."""
    if run_model.view not in STOCK:
        return f"it reads state {run_model.view!r}, and stock classes pool 'last'"
    if fold(run_model.parameters, run_model.preprocess) is None:
        return "its head is not linear"
    if run_model.combination.kind != "mean":
        return f"its members are combined by {run_model.combination.kind!r}"
    config = AutoConfig.from_pretrained(prepared.folder, local_files_only=True, num_labels=1)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return f"transformers has no sequence classification for {config.model_type!r}"
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return None if has_linear_score(model) else f"{type(model).__name__} has another head"


def has_linear_score(model: Any) -> bool:
    """Whether all of a sequence classifier beside its base model is one linear layer, `score`,
    without bias: the classes that pool the rightmost token that is not the pad token."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    own = [name for name, parameter in model.named_parameters() if id(parameter) not in base]
    return model.base_model is not model and own == ["score.weight"]


def stock_model(run_model: RunModel, prepared: Prepared, about: dict[str, Any]) -> Any:
    """An `AutoModelForSequenceClassification` for a run that has a stock form. about: for its
    config. Raises: UserError when the model's weights are not complete."""
    folded = fold(run_model.parameters, run_model.preprocess)
    assert folded is not None  # see why_not_stock
    model, missing = _load(AutoModelForSequenceClassification, prepared, num_labels=1)
    _refuse_missing(model, missing - {"score.weight"})
    with torch.no_grad():
        model.score.weight.copy_(folded.weight[None])
    load_backbone(model.base_model, run_model.backbone, run_model.name)
    _finish(model.config, prepared, about | {"offset": folded.offset})
    return model


def custom_model(run_model: RunModel, prepared: Prepared, about: dict[str, Any]) -> Any:
    """An `EmbrmRewardModel`, its head in float32 whatever its backbone's dtype. about: for its
    config. Raises: UserError when the model's weights are not complete."""
    backbone, missing = _load(AutoModel, prepared)
    _refuse_missing(backbone, missing)
    load_backbone(backbone, run_model.backbone, run_model.name)
    tensors = {name.replace(".", "_"): tensor for name, tensor in run_model.parameters.items()}
    if run_model.preprocess.mean is not None and run_model.preprocess.scale is not None:
        tensors |= {"mean": run_model.preprocess.mean, "scale": run_model.preprocess.scale}
    combination = run_model.combination
    if combination.reference is not None:
        reference = combination.reference
        tensors |= {"reference_mean": reference.mean, "reference_sd": reference.sd}
    own = backbone.config.to_diff_dict()
    own.pop("_name_or_path", None)  # a place on this machine
    config = EmbrmRewardConfig(
        backbone=own,
        head={name: list(tensor.shape) for name, tensor in tensors.items()},
        pooling=run_model.view,
        combine=combination.kind,
        penalty=combination.penalty,
        dtype=prepared.spec.dtype,
        architectures=[EmbrmRewardModel.__name__],
        auto_map={
            "AutoConfig": f"{CODE.stem}.{EmbrmRewardConfig.__name__}",
            "AutoModelForSequenceClassification": f"{CODE.stem}.{EmbrmRewardModel.__name__}",
        },
    )
    _finish(config, prepared, about | {"offset": 0.0})
    with torch.device("meta"):
        model = EmbrmRewardModel(config)
    model.model = backbone
    for name, tensor in tensors.items():
        setattr(model.head, name, torch.nn.Parameter(tensor.clone()))
    return model.eval()


def _refuse_missing(model: Any, missing: set[str]) -> None:
    if missing:
        raise UserError(
            f"the weights of {type(model).__name__} lack {min(missing)!r}: use a complete model"
        )


def _finish(config: Any, prepared: Prepared, about: dict[str, Any]) -> None:
    """What every exported config says beside its architecture."""
    config.get_text_config().pad_token_id = prepared.identity["tokenizer"]["pad"]
    config.problem_type = "regression"  # one number, no sigmoid: vLLM applies one otherwise
    config.embrm = about


def _load(auto: Any, prepared: Prepared, **options: Any) -> tuple[Any, set[str]]:
    """A model from the cache's model folder, in the cache's dtype, and what its weights lack."""
    config = AutoConfig.from_pretrained(prepared.folder, local_files_only=True)
    with quiet():
        try:
            model, info = auto.from_pretrained(
                prepared.folder,
                dtype=getattr(torch, prepared.spec.dtype),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **attention(config),
                **options,
            )
        except Exception as error:  # whatever transformers says of files it cannot use
            raise UserError(
                f"model {prepared.folder} cannot be loaded as a reward model "
                f"({reason_of(error)}): check its files"
            ) from None
    for name, value in attention(config).items():
        setattr(model.config, name, value)  # saved, so that whoever loads the folder gets it too
    return model.eval(), set(info["missing_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting a missing score layer that is about to be set."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
