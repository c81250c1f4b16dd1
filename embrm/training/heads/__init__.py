"""Reward heads on cached states: a kind of head is one module (`linear`, `mlp`).

To add a kind, write a module with the names of `kinds.HeadKind` and enter it in `kinds.HEADS`.
"""

from embrm.training.heads.adapter import (
    DOWN,
    DOWN_BIAS,
    UP,
    adapted,
    adapter_inner,
    adapter_readouts,
    fold_adapter,
)
from embrm.training.heads.bank import (
    REWARDS,
    Parameters,
    initialise,
    pair_rewards,
    rewards,
    score_states,
    slots_of,
    stack,
)
from embrm.training.heads.kinds import HEADS, HeadKind, kind_of, register_head
from embrm.training.heads.mlp import dropout_masks
from embrm.training.heads.preprocess import Preprocess, PreprocessKind, fit_preprocess
from embrm.training.heads.products import product
from embrm.training.heads.spec import AdapterSpec, HeadSpec

__all__ = [
    "DOWN",
    "DOWN_BIAS",
    "HEADS",
    "REWARDS",
    "UP",
    "AdapterSpec",
    "HeadKind",
    "HeadSpec",
    "Parameters",
    "Preprocess",
    "PreprocessKind",
    "adapted",
    "adapter_inner",
    "adapter_readouts",
    "dropout_masks",
    "fit_preprocess",
    "fold_adapter",
    "initialise",
    "kind_of",
    "pair_rewards",
    "product",
    "register_head",
    "rewards",
    "score_states",
    "slots_of",
    "stack",
]
