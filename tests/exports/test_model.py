"""Model: what is folded says what the heads said, and our own class says it where nothing folds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrm.exports.model import linear_reward
from embrm.exports.modeling_embrm import RewardHead
from embrm.training.heads import (
    AdapterSpec,
    HeadSpec,
    Parameters,
    Preprocess,
    initialise,
    score_states,
    stack,
)
from embrm.training.row_store import RowStore

WIDTH = 6


def drawn(head: HeadSpec, members: int, seed: int) -> Parameters:
    """Heads as if trained: nothing is zero."""
    torch.manual_seed(seed)
    slots = stack([initialise(head, WIDTH, seed + member) for member in range(members)])
    return {name: tensor + torch.randn_like(tensor) for name, tensor in slots.items()}


def preprocessing(seed: int) -> Preprocess:
    torch.manual_seed(seed)
    return Preprocess(torch.randn(WIDTH) * 3, torch.rand(WIDTH) + 0.1)


def rewards(parameters: Parameters, preprocess: Preprocess, states: torch.Tensor) -> torch.Tensor:
    return score_states(parameters, preprocess, RowStore(states), torch.arange(len(states))).mean(0)


@given(
    members=st.integers(1, 3),
    rank=st.sampled_from([None, 1, 4]),
    standardized=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_linear_head_is_one_vector_and_a_constant(
    members: int, rank: int | None, standardized: bool, seed: int
) -> None:
    adapter = AdapterSpec(kind="low-rank", width=rank) if rank else None
    parameters = drawn(HeadSpec(adapter=adapter), members, seed)
    preprocess = preprocessing(seed) if standardized else Preprocess(None, None)
    folded = linear_reward(parameters, preprocess)
    assert folded is not None
    assert bool(folded.offset) == standardized
    states = torch.randn(20, WIDTH)
    found = states.double() @ folded.weight - folded.offset
    expected = rewards(parameters, preprocess, states).double()
    assert (found - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())


@pytest.mark.parametrize(
    "head",
    [
        HeadSpec(kind="mlp", widths=(5,)),
        HeadSpec(adapter=AdapterSpec(kind="mlp", width=3)),
        HeadSpec(kind="mlp", widths=(5, 4), adapter=AdapterSpec(kind="low-rank", width=2)),
        HeadSpec(kind="mlp", widths=(5,), adapter=AdapterSpec(kind="mlp", width=2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("standardized", [False, True])
def test_what_does_not_fold_is_carried_by_our_own_head(head: HeadSpec, standardized: bool) -> None:
    parameters = drawn(head, 2, seed=0)
    preprocess = preprocessing(0) if standardized else Preprocess(None, None)
    assert linear_reward(parameters, preprocess) is None
    tensors = {name.replace(".", "_"): tensor for name, tensor in parameters.items()}
    if preprocess.mean is not None and preprocess.scale is not None:
        tensors |= {"mean": preprocess.mean, "scale": preprocess.scale}
    own = RewardHead({name: list(tensor.shape) for name, tensor in tensors.items()})
    own.load_state_dict(tensors)
    states = torch.randn(20, WIDTH)
    expected = rewards(parameters, preprocess, states)
    assert (own(states) - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
