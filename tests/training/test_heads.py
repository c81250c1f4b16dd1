"""Heads: specs, initial distributions, agreement with torch.nn, and bits of a slot alone."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strict_process import strict_process

from embrm.core.errors import UserError
from embrm.core.streams import stream
from embrm.training.heads import (
    DOWN,
    DOWN_BIAS,
    UP,
    AdapterSpec,
    HeadSpec,
    Preprocess,
    adapted,
    fit_preprocess,
    initialise,
    pair_rewards,
    rewards,
    score_states,
    stack,
)
from embrm.training.row_store import RowStore

MLP = HeadSpec(kind="mlp", widths=(7, 5))
ADAPTERS = (AdapterSpec(kind="low-rank", width=3), AdapterSpec(kind="mlp", width=18))


@pytest.fixture(scope="module")
def strict() -> Iterator[Callable[..., Any]]:
    with strict_process() as call:
        yield call


def _bank(head: HeadSpec, width: int, slots: int) -> dict[str, torch.Tensor]:
    """Newly initialised heads, but with adapters that are not the identity."""
    bank = stack([initialise(head, width, seed) for seed in range(slots)])
    if UP in bank:
        bank[UP].normal_(generator=torch.Generator().manual_seed(1))
    return bank


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mlp"}, "an mlp needs widths"),
        ({"widths": [4]}, 'need kind = "mlp"'),
        ({"dropout": 0.1}, 'need kind = "mlp"'),
        ({"kind": "mlp", "widths": [0]}, "greater than 0"),
        ({"kind": "tree"}, "valid: linear, mlp"),
        ({"kind": "mlp", "widths": [4], "dropout": 1.0}, "less than 1"),
        ({"kind": "mlp", "width": [4]}, "did you mean 'widths'"),
    ],
)
def test_invalid_head_specs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeadSpec.parse(values, "test")


def test_descriptions_of_heads() -> None:
    assert str(HeadSpec()) == "linear"
    assert str(HeadSpec(kind="mlp", widths=(64, 32), dropout=0.1)) == "mlp 64-32 dropout 0.1"
    adapter = AdapterSpec(kind="mlp", width=8)
    assert str(HeadSpec(adapter=adapter)) == "linear on mlp 8 adapter"


def test_reward_weights_start_with_variance_one_over_fan_in_plus_one() -> None:
    width = 50_000
    weight = initialise(HeadSpec(), width, 3)["output.weight"][0].double() * (width + 1) ** 0.5
    # Four standard errors of a sample's mean and variance.
    assert abs(weight.mean()) < 4 / width**0.5
    assert abs(weight.var() - 1) < 4 * (2 / width) ** 0.5


def test_hidden_layers_start_as_torch_linear_does() -> None:
    parameters = initialise(HeadSpec(kind="mlp", widths=(300, 20)), 100, 0)
    assert {name: tuple(t.shape) for name, t in parameters.items()} == {
        "hidden.0.weight": (1, 300, 100),
        "hidden.0.bias": (1, 300),
        "hidden.1.weight": (1, 20, 300),
        "hidden.1.bias": (1, 20),
        "output.weight": (1, 20),
    }
    for layer, fan_in in ((0, 100), (1, 300)):
        for name in ("weight", "bias"):
            values = parameters[f"hidden.{layer}.{name}"]
            assert 0.8 / fan_in**0.5 < values.abs().max() <= 1 / fan_in**0.5
    uniform_variance = 1 / (3 * 100)
    assert abs(parameters["hidden.0.weight"].var() / uniform_variance - 1) < 0.03


def test_streams_differ_by_seed_and_stage_and_repeat() -> None:
    draws = {
        key: tuple(stream(*key).random(4))
        for key in [(0, "order", 1), (0, "order", 2), (1, "order", 1), (0, "init"), (11, "order")]
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(stream(0, "order", 1).random(4)) == draws[0, "order", 1]


def test_a_linear_reward_is_the_inner_product() -> None:
    X = torch.randn(9, 6)
    bank = _bank(HeadSpec(), 6, 35)
    expected = bank["output.weight"].double() @ X.double().T
    torch.testing.assert_close(rewards(bank, X).double(), expected, rtol=1e-5, atol=1e-6)


def test_an_mlp_is_torch_sequential() -> None:
    X = torch.randn(11, 6)
    bank = _bank(MLP, 6, 3)
    for slot in range(3):
        reference = torch.nn.Sequential(
            torch.nn.Linear(6, 7),
            torch.nn.ReLU(),
            torch.nn.Linear(7, 5),
            torch.nn.ReLU(),
            torch.nn.Linear(5, 1, bias=False),
        )
        names = ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"]
        values = [tensor[slot] for tensor in bank.values()]
        values[-1] = values[-1][None]
        reference.load_state_dict(dict(zip(names, values, strict=True)))
        torch.testing.assert_close(rewards(bank, X)[slot], reference(X)[:, 0])


def test_parameters_are_found_by_name_not_by_order() -> None:
    X = torch.randn(4, 6)
    bank = _bank(MLP, 6, 2)
    assert torch.equal(rewards(dict(sorted(bank.items())), X), rewards(bank, X))


def test_a_dropout_mask_sets_its_units_to_zero() -> None:
    X = torch.randn(4, 6)
    bank = _bank(MLP, 6, 2)
    kept = [torch.ones(4, 7), torch.zeros(4, 5)]
    assert torch.equal(rewards(bank, X, kept), torch.zeros(2, 4))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("head", [HeadSpec(), MLP], ids=str)
def test_the_head_reads_the_states_that_the_adapter_shifted(
    head: HeadSpec, adapter: AdapterSpec
) -> None:
    X = torch.randn(11, 6)
    bank = _bank(head.model_copy(update={"adapter": adapter}), 6, 3)
    plain = {name: tensor for name, tensor in bank.items() if not name.startswith("adapter.")}
    found = rewards(bank, X)
    chosen, rejected = torch.tensor([0, 4, 4, 10]), torch.tensor([1, 2, 3, 0])
    pairs = pair_rewards(bank, X, chosen, rejected, torch.tensor([0, 2]), torch.tensor([1]))
    for slot in range(3):
        own = {name: tensor[slot : slot + 1] for name, tensor in bank.items()}
        inner = X @ bank[DOWN][slot].T
        if adapter.kind == "mlp":
            inner = torch.relu(inner + bank[DOWN_BIAS][slot])
        moved = X + inner @ bank[UP][slot].T
        torch.testing.assert_close(adapted(own, X), moved)
        r = rewards({name: plain[name][slot : slot + 1] for name in plain}, moved)[0]
        torch.testing.assert_close(found[slot], r, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            pairs.difference[slot], r[chosen] - r[rejected], rtol=1e-4, atol=1e-5
        )
    total = found[:, chosen] + found[:, rejected]
    torch.testing.assert_close(pairs.total, total[[0, 2]])
    torch.testing.assert_close(pairs.mean_reward, total[[1]].mean(1) / 2)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("head", [HeadSpec(), MLP], ids=str)
def test_an_adapter_does_not_change_the_heads_initial_weights(
    head: HeadSpec, adapter: AdapterSpec
) -> None:
    plain = initialise(head, 20, 4)
    found = initialise(head.model_copy(update={"adapter": adapter}), 20, 4)
    for name, tensor in plain.items():
        assert torch.equal(found.pop(name), tensor)
    assert not found.pop(UP).any()
    assert {*found} == {DOWN} | ({DOWN_BIAS} if adapter.kind == "mlp" else set())
    for tensor in found.values():
        assert 0.5 / 20**0.5 < tensor.abs().max() <= 1 / 20**0.5
    X = torch.randn(5, 20)
    begun = initialise(head.model_copy(update={"adapter": adapter}), 20, 4)
    torch.testing.assert_close(rewards(begun, X), rewards(plain, X))


def _slot_bits(head: HeadSpec, width: int, rows: int, slots: int) -> list[list[bytes]]:
    """Bits of rewards and gradients of every slot: of the bank, then of each slot alone."""
    bank = _bank(head, width, slots)
    X = torch.from_numpy(np.random.default_rng(width).standard_normal((rows, width), np.float32))
    out = []
    for own in [slice(None), *(slice(slot, slot + 1) for slot in range(slots))]:
        parameters = {name: tensor[own].clone() for name, tensor in bank.items()}
        leaves = [tensor.requires_grad_() for tensor in parameters.values()]
        r = rewards(parameters, X)
        gradients = torch.autograd.grad(torch.tanh(r).sum(), leaves)
        # A gradient of zero may come as -0, which no update feels: adding 0 makes it +0.
        out += [
            [(t[slot].detach() + 0.0).numpy().tobytes() for t in (r, *gradients)]
            for slot in range(len(r))
        ]
    return out


@settings(max_examples=100, deadline=None)
@example(width=1, rows=1, slots=2, mlp=True, adapter=None)
@example(width=5, rows=1, slots=6, mlp=True, adapter=None)
@example(width=17, rows=3, slots=35, mlp=False, adapter=None)
@given(
    width=st.integers(1, 70),
    rows=st.integers(1, 90),
    slots=st.integers(1, 40),
    mlp=st.booleans(),
    adapter=st.sampled_from([None, *ADAPTERS]),
)
def test_rewards_and_gradients_of_a_slot_have_the_same_bits_alone(
    strict: Callable[..., Any],
    width: int,
    rows: int,
    slots: int,
    mlp: bool,
    adapter: AdapterSpec | None,
) -> None:
    slots = min(slots, 6) if mlp or adapter else slots
    head = (MLP if mlp else HeadSpec()).model_copy(update={"adapter": adapter})
    found = strict(_slot_bits, head, width, rows, slots)
    assert found[:slots] == found[slots:]


def test_standardizing_is_fitted_to_the_given_rows_only() -> None:
    states = torch.randn(40, 3).bfloat16()
    states[:, 1] = 2.5
    rows = torch.arange(0, 40, 2)
    known = states[rows].double()
    fitted = fit_preprocess("standardize", RowStore(states), rows)
    assert fitted.mean is not None
    assert fitted.scale is not None
    torch.testing.assert_close(fitted.mean, known.mean(0).float())
    torch.testing.assert_close(fitted.scale[[0, 2]], known.std(0, correction=0).float()[[0, 2]])
    assert fitted.scale[1] == 1  # never varies
    moved = fitted(states[rows].float())
    torch.testing.assert_close(moved.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert torch.equal(moved[:, 1], torch.zeros(20))


def test_centring_does_not_scale() -> None:
    states = torch.randn(20, 3) * 5 + 3
    fitted = fit_preprocess("center", RowStore(states), torch.arange(20))
    torch.testing.assert_close(fitted(states.clone()), states - states.mean(0), atol=1e-5, rtol=0)


def test_no_preprocessing_changes_nothing() -> None:
    X = torch.randn(5, 3)
    fitted = fit_preprocess("none", RowStore(X), torch.arange(5))
    assert torch.equal(fitted(X.clone()), X)


def test_scoring_takes_any_number_of_rows() -> None:
    states = torch.randn(5000, 3).bfloat16()
    bank = _bank(HeadSpec(), 3, 2)
    rows = torch.arange(5000).flip(0)
    whole = score_states(bank, Preprocess(None, None), RowStore(states), rows)
    assert whole.shape == (2, 5000)
    torch.testing.assert_close(whole.flip(1), bank["output.weight"] @ states.float().T)
    assert score_states(bank, Preprocess(None, None), RowStore(states), rows[:0]).shape == (2, 0)
