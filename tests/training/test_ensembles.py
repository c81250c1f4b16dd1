"""Ensembles: combinations against their formulas, and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrm.training.ensembles import Combination, Combine, Reference

PESSIMISTIC: tuple[Combine, ...] = ("min", "uwo", "lcb")
KINDS: tuple[Combine, ...] = ("mean", *PESSIMISTIC)


def drawn(members: int, responses: int, seed: int) -> torch.Tensor:
    """Rewards of members whose scales and means differ."""
    random = np.random.default_rng(seed)
    scale, mean = random.uniform(0.1, 9, (members, 1)), random.normal(0, 5, (members, 1))
    return torch.from_numpy(
        (mean + scale * random.standard_normal((members, responses))).astype(np.float32)
    )


def combined(kind: Combine, rewards: torch.Tensor, reference: Reference) -> np.ndarray:
    return Combination(kind, 0.7, reference)(rewards).numpy()


@given(members=st.integers(1, 6), responses=st.integers(1, 30), seed=st.integers(0, 999))
def test_the_formulas(members: int, responses: int, seed: int) -> None:
    training, rewards = drawn(members, 50, seed), drawn(members, responses, seed + 1)
    reference = Reference.of(training)
    mean, sd = (getattr(training.numpy().astype(float), name)(1) for name in ("mean", "std"))
    assert reference.mean.numpy() == pytest.approx(mean, rel=1e-6)
    assert reference.sd.numpy() == pytest.approx(sd, rel=1e-6)
    z = (rewards.numpy() - mean[:, None]) / sd[:, None]
    expected = {
        "min": z.min(0),
        "uwo": z.mean(0) - 0.7 * z.var(0),
        "lcb": z.mean(0) - 0.7 * z.std(0),
    }
    for kind in PESSIMISTIC:
        found = combined(kind, rewards, reference)
        assert found.dtype == np.float32
        assert found == pytest.approx(mean.mean() + sd.mean() * expected[kind], rel=1e-4, abs=1e-4)
    assert combined("mean", rewards, reference) == pytest.approx(rewards.numpy().mean(0), abs=1e-5)
    assert reference.disagreement(rewards).numpy() == pytest.approx(z.std(0), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("members", [1, 4])
def test_members_that_agree_combine_to_their_common_reward(kind: Combine, members: int) -> None:
    training, rewards = (drawn(1, size, 3).expand(members, -1) for size in (50, 20))
    reference = Reference.of(training)
    assert combined(kind, rewards, reference) == pytest.approx(rewards[0].numpy(), rel=1e-5)
    assert reference.disagreement(rewards).numpy() == pytest.approx(0, abs=1e-12)


@given(kind=st.sampled_from(KINDS), order=st.permutations(range(5)))
def test_the_order_of_members_does_not_matter(kind: Combine, order: list[int]) -> None:
    training, rewards = drawn(5, 50, 0), drawn(5, 20, 1)
    expected = combined(kind, rewards, Reference.of(training))
    found = combined(kind, rewards[order], Reference.of(training[order]))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", PESSIMISTIC)
def test_scale_and_offset_of_a_member_do_not_change_its_weight(kind: Combine) -> None:
    """Rescaled members change the result only by one common scale and offset."""
    training, rewards = drawn(3, 50, 0), drawn(3, 20, 1)
    stretch, shift = torch.tensor([[1.0], [8.0], [0.25]]), torch.tensor([[0.0], [5.0], [-3.0]])
    before = combined(kind, rewards, Reference.of(training))
    after = combined(kind, rewards * stretch + shift, Reference.of(training * stretch + shift))
    assert np.ptp(before)
    assert (after - after[0]) / np.ptp(after) == pytest.approx(
        (before - before[0]) / np.ptp(before), abs=1e-5
    )


def test_uwo_and_lcb_agree_only_without_a_penalty() -> None:
    rewards, reference = drawn(4, 20, 1), Reference.of(drawn(4, 50, 0))
    without = [Combination(kind, 0.0, reference)(rewards) for kind in ("uwo", "lcb")]
    assert torch.equal(*without)
    found = [combined(kind, rewards, reference) for kind in KINDS]
    assert all(
        not np.allclose(found[one], found[other]) for one in range(4) for other in range(one)
    )


def test_a_constant_member_is_only_centred() -> None:
    reference = Reference.of(torch.tensor([[2.0, 2.0], [0.0, 4.0]]))
    assert reference.sd.tolist() == [0.0, 2.0]
    assert reference.standardised(torch.tensor([[2.0], [6.0]])).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("kind", PESSIMISTIC)
def test_a_constant_member_does_not_change_the_scale(kind: Combine) -> None:
    """Nor does it make combined rewards NaN."""
    training, rewards = 1000 * drawn(2, 50, 0), 1000 * drawn(2, 20, 1)
    training[1], rewards[1] = 3, 3
    reference = Reference.of(training)
    mean, sd = training.double().mean(1), training[0].double().std(correction=0)
    z = torch.stack([(rewards[0].double() - mean[0]) / sd, torch.zeros(20, dtype=torch.float64)])
    spread = z.std(0, correction=0)
    expected = {
        "min": z.amin(0),
        "uwo": z.mean(0) - 0.7 * spread**2,
        "lcb": z.mean(0) - 0.7 * spread,
    }
    found = combined(kind, rewards, reference)
    assert found == pytest.approx((mean.mean() + sd * expected[kind]).numpy(), rel=1e-4)
