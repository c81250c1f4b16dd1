"""The model that a fine-tune trains: a head of any parameters on a backbone."""

import pytest
import torch

from embrm.finetuning.model import HeadModule
from embrm.training.heads import HeadSpec, initialise, rewards


@pytest.mark.parametrize(
    "head", [HeadSpec(), HeadSpec(kind="mlp", widths=(5, 3))], ids=["linear", "mlp"]
)
def test_a_head_gives_the_rewards_of_its_slot_in_a_bank(head: HeadSpec) -> None:
    parameters = initialise(head, 7, seed=0)
    module, states = HeadModule(parameters), torch.randn(4, 7)
    assert torch.equal(module(states), rewards(parameters, states)[0])
    assert [*module.state_dict()] == [*parameters]


def test_parameters_keep_their_names() -> None:
    """So that a head of a user's own kind needs no change in a fine-tune."""
    given = {"b.gain.weight": torch.ones(1, 2), "a": torch.zeros(1), "b.gain.bias": torch.ones(1)}
    module = HeadModule(given)
    assert set(module.bank()) == set(given)
    for name, tensor in module.bank().items():
        assert tensor.shape == given[name].shape
        assert torch.equal(tensor, given[name])
