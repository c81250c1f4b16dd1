"""Tests of pairs derived from groups."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.data.groups import PairRule, derive_pairs, every_pair

members = st.lists(
    st.tuples(st.integers(-20, 20).map(float), st.integers(0, 9)), min_size=0, max_size=12
)


def _derive(group: list[tuple[float, int]], rule: PairRule) -> list[tuple[int, int]]:
    gold, lengths = [one[0] for one in group], [one[1] for one in group]
    chosen, rejected = derive_pairs(gold, lengths, rule, "p")
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


@given(members, st.integers(0, 10).map(float))
def test_pairs_are_exactly_those_above_the_gap(group: list[tuple[float, int]], gap: float) -> None:
    wanted = {
        (i, j)
        for i, (better, _) in enumerate(group)
        for j, (worse, _) in enumerate(group)
        if better - worse > gap
    }
    found = _derive(group, PairRule(gap=gap))
    assert set(found) == wanted
    assert len(found) == len(wanted)


@given(st.lists(members), st.integers(0, 10).map(float))
def test_every_pair_equals_derive_pairs_of_each_group(
    groups: list[list[tuple[float, int]]], gap: float
) -> None:
    wanted: list[tuple[int, int]] = []
    gold: list[float] = []
    for group in groups:
        own = _derive(group, PairRule(gap=gap))
        wanted += [(len(gold) + better, len(gold) + worse) for better, worse in own]
        gold += [one[0] for one in group]
    # As in an adopted array, groups are numbered by their first row.
    sizes = [len(group) for group in groups]
    numbers = np.repeat(np.cumsum([0, *sizes])[:-1], sizes)
    chosen, rejected = every_pair(np.array(gold), numbers, gap)
    assert [*zip(chosen.tolist(), rejected.tolist(), strict=True)] == wanted


def test_the_difference_must_exceed_the_gap() -> None:
    assert _derive([(1, 0), (1, 0)], PairRule()) == []
    assert _derive([(2, 0), (1, 0)], PairRule(gap=1)) == []
    assert _derive([(2.5, 0), (1, 0)], PairRule(gap=1)) == [(0, 1)]


@given(members, st.one_of(st.none(), st.integers(0, 20)))
def test_per_prompt_limits_the_number_of_pairs(
    group: list[tuple[float, int]], per_prompt: int | None
) -> None:
    everything = _derive(group, PairRule())
    some = _derive(group, PairRule(per_prompt=per_prompt))
    assert set(some) <= set(everything)
    assert len(some) == len(everything[:per_prompt])


@given(members, st.one_of(st.none(), st.integers(0, 20)), st.floats(0, 10))
def test_length_balanced_pairs_are_half_longer_half_shorter(
    group: list[tuple[float, int]], per_prompt: int | None, gap: float
) -> None:
    pairs = _derive(group, PairRule(gap=gap, per_prompt=per_prompt, length_balanced=True))
    everything = _derive(group, PairRule(gap=gap))
    sides = Counter(np.sign(group[i][1] - group[j][1]) for i, j in pairs)
    available = Counter(np.sign(group[i][1] - group[j][1]) for i, j in everything)
    assert set(pairs) <= set(everything)
    most = len(everything) if per_prompt is None else per_prompt // 2
    assert sides[1] == sides[-1] == min(available[1], available[-1], most)
    assert sides[0] == 0


def test_draws_differ_between_prompts_and_seeds_and_cover_all_candidates() -> None:
    gold, lengths = list(range(6)), [0] * 6
    draws = [
        tuple(zip(*map(np.ndarray.tolist, derive_pairs(gold, lengths, rule, prompt)), strict=True))
        for rule in (PairRule(per_prompt=1), PairRule(per_prompt=1, seed=1))
        for prompt in map(str, range(300))
    ]
    counts = Counter(pair for draw in draws for pair in draw)
    # 600 draws over 15 candidates: mean 40, 5 standard deviations 31.
    assert len(counts) == 15
    assert max(counts.values()) < 71
    assert draws[:300] != draws[300:]


def test_drawn_pairs_equal_a_golden_value() -> None:
    gold, lengths = list(range(8)), [3, 1, 4, 1, 5, 9, 2, 6]
    chosen, rejected = derive_pairs(gold, lengths, PairRule(per_prompt=3, seed=5), "p")
    assert (chosen.tolist(), rejected.tolist()) == ([3, 7, 7], [1, 1, 5])


@pytest.mark.parametrize(
    ("values", "message"), [({"gap": -1}, "gap = -1"), ({"per_prompt": -1}, "per_prompt = -1")]
)
def test_a_rule_is_checked(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairRule.parse(values, "spec.toml")


@given(members)
def test_by_rank_pairs_the_best_with_the_worst(group: list[tuple[float, int]]) -> None:
    found = _derive(group, PairRule(by_rank=True))
    gold = [one[0] for one in group]
    used = [position for pair in found for position in pair]
    assert len(used) == len(set(used))
    margins = sorted((gold[i] - gold[j] for i, j in found), reverse=True)
    ordered = sorted(gold, reverse=True)
    half = len(ordered) // 2
    wanted = [best - worst for best, worst in zip(ordered[:half], ordered[::-1], strict=False)]
    assert margins == [margin for margin in wanted if margin > 0]
    assert "by_rank" not in PairRule().model_dump()
