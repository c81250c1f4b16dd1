"""The transformers model of a run: a stock class where the head allows it, or our own small one.

A linear head on a linear adapter, with or without preprocessing, and any mean of such heads, is one
linear map of the state and a constant:
    r = w·(I + up·down)·(h - mean)/scale = v·h - offset,   v = (w + downᵀ·upᵀ·w)/scale.
Stock classes have no bias, so the exported logit is v·h, and the reward is the logit minus the
offset, which cancels wherever rewards are compared.
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
from embrm.extraction.texts import PreparedTexts
from embrm.lm.loading import attention
from embrm.lm.tokens import reason_of
from embrm.training.heads import Parameters, Preprocess, fold_adapter, kind_of

CODE = Path(modeling_embrm.__file__)
"""The source file that is saved beside a model of our own class."""

# In this process transformers finds our class by itself and never needs the folder's code.
AutoConfig.register(EmbrmRewardConfig.model_type, EmbrmRewardConfig, exist_ok=True)
AutoModelForSequenceClassification.register(EmbrmRewardConfig, EmbrmRewardModel, exist_ok=True)

STOCK = ("last",)
"""Views that a stock class can pool."""

CUSTOM = ("last", "mean")
"""Views that our own class can pool."""


@dataclass(frozen=True)
class LinearReward:
    """A linear reward: the logit is weight·h, float64 [d], and the reward is the logit - offset."""

    weight: Tensor
    offset: float


def linear_reward(parameters: Parameters, preprocess: Preprocess) -> LinearReward | None:
    """Fold heads [members, ...] and their preprocessing into one linear map, in float64.

    Returns None for heads that are not linear.
    """
    weight = kind_of(parameters).fold(parameters)
    weight = None if weight is None else fold_adapter(parameters, weight)
    if weight is None:
        return None
    mean_weight = weight.mean(0)
    if preprocess.mean is None or preprocess.scale is None:
        return LinearReward(mean_weight, 0.0)
    mean_weight = mean_weight / preprocess.scale.double()
    return LinearReward(mean_weight, float(mean_weight @ preprocess.mean.double()))


def why_not_stock(run_model: RunModel, prepared: PreparedTexts) -> str | None:
    """Return why a run cannot be exported as a stock class, or None if it can."""
    if run_model.view not in STOCK:
        return f"it reads state {run_model.view!r}, and stock classes pool 'last'"
    if linear_reward(run_model.parameters, run_model.preprocess) is None:
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
    """Whether a sequence classifier adds one linear layer `score` without bias to its base model.

    Such classes pool the rightmost token that is not the pad token.
    """
    base = {id(parameter) for parameter in model.base_model.parameters()}
    own = [name for name, parameter in model.named_parameters() if id(parameter) not in base]
    return model.base_model is not model and own == ["score.weight"]


def stock_model(run_model: RunModel, prepared: PreparedTexts, about: dict[str, Any]) -> Any:
    """Build an `AutoModelForSequenceClassification` for a run that has a stock form.

    about: recorded in the config under "embrm".
    Raises: UserError when the cache's model lacks weights.
    """
    linear = linear_reward(run_model.parameters, run_model.preprocess)
    assert linear is not None  # see why_not_stock
    model, missing = _load(AutoModelForSequenceClassification, prepared, num_labels=1)
    _refuse_missing(model, missing - {"score.weight"})
    with torch.no_grad():
        model.score.weight.copy_(linear.weight[None])
    load_backbone(model.base_model, run_model.backbone, run_model.name)
    _complete_config(model.config, prepared, about | {"offset": linear.offset})
    return model


def custom_model(run_model: RunModel, prepared: PreparedTexts, about: dict[str, Any]) -> Any:
    """Build an `EmbrmRewardModel`, whose head is in float32 whatever the backbone's dtype.

    about: recorded in the config under "embrm".
    Raises: UserError when the cache's model lacks weights.
    """
    if not kind_of(run_model.parameters).EXPORTED:
        raise UserError(
            f"run {run_model.name!r} has a head of a user's own kind, which the exported class "
            "cannot compute: export a run with a linear or mlp head"
        )
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
    own.pop("_name_or_path", None)  # a path of this machine
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
    _complete_config(config, prepared, about | {"offset": 0.0})
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


def _complete_config(config: Any, prepared: PreparedTexts, about: dict[str, Any]) -> None:
    """Set what every exported config records beside its architecture."""
    config.get_text_config().pad_token_id = prepared.identity["tokenizer"]["pad"]
    config.problem_type = "regression"  # without it vLLM applies a sigmoid
    config.embrm = about


def _load(auto: Any, prepared: PreparedTexts, **options: Any) -> tuple[Any, set[str]]:
    """Load the cache's model in the cache's dtype; return it and the names of missing weights."""
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
        except Exception as error:  # transformers raises many kinds for files it cannot use
            raise UserError(
                f"model {prepared.folder} cannot be loaded as a reward model "
                f"({reason_of(error)}): check its files"
            ) from None
    for name, value in attention(config).items():
        setattr(model.config, name, value)  # saved with the model, for all who load it
    return model.eval(), set(info["missing_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, which reports the score layer as missing before we set it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
