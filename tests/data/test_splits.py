"""Tests of splits by prompt."""

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.data.splits import Holdout, holdout

ids = st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), max_size=40)


@given(ids, st.randoms(), st.integers(-5, 5))
def test_whether_a_prompt_is_held_out_depends_only_on_its_id(
    prompt_ids: list[str], random: Random, seed: int
) -> None:
    sides = dict(zip(prompt_ids, holdout(prompt_ids, 0.5, seed), strict=True))
    shuffled = prompt_ids[::-1][: len(prompt_ids) // 2]
    random.shuffle(shuffled)
    assert [sides[one] for one in shuffled] == holdout(shuffled, 0.5, seed).tolist()


@given(ids, st.floats(0.01, 0.5), st.floats(0.5, 0.99))
def test_a_larger_fraction_holds_out_a_superset(
    prompt_ids: list[str], small: float, large: float
) -> None:
    assert not np.any(holdout(prompt_ids, small, 0) & ~holdout(prompt_ids, large, 0))


def test_the_fraction_is_met_and_seeds_differ() -> None:
    prompt_ids = [f"{number:016x}" for number in range(20_000)]
    sides = holdout(prompt_ids, 0.2, 0)
    assert sides.dtype == np.bool_
    # 5 standard deviations of a binomial: 0.0028.
    assert abs(sides.mean() - 0.2) < 0.015
    assert abs((sides & holdout(prompt_ids, 0.2, 1)).mean() - 0.04) < 0.007


def test_purposes_draw_independently() -> None:
    """With the same draw for both, validation would be empty after a holdout."""
    prompt_ids = [f"{number:016x}" for number in range(20_000)]
    moved = holdout(prompt_ids, 0.2, 0, "holdout")
    rest = [one for one, gone in zip(prompt_ids, moved, strict=True) if not gone]
    assert abs(holdout(rest, 0.1, 0).mean() - 0.1) < 0.011


def test_no_prompts_give_an_empty_array() -> None:
    assert holdout([], 0.5, 0).shape == (0,)


def test_the_choice_equals_a_golden_value() -> None:
    """If a new version moved prompts between splits, earlier results would not be comparable."""
    assert holdout([f"{n:016x}" for n in range(12)], 0.3, 7).nonzero()[0].tolist() == [2, 9, 11]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_fraction_lies_between_0_and_1(fraction: float) -> None:
    with pytest.raises(UserError, match="fraction"):
        Holdout.parse({"fraction": fraction}, "spec.toml")
