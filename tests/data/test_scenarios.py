"""Tests of scenarios: what splits share, choice by hash, pairs within a split, refusals."""

from typing import Any

import polars as pl
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.data.collector import MEMBERS, PAIRS
from embrm.data.dataset import load
from embrm.data.scenarios import SCENARIOS, Scenarios, divide
from embrm.data.sources import SourceSpec
from embrm.data.splits import holdout


def _groups(
    prompts: int = 40, models: int = 20, gold: Any = lambda row: (row * 37) % 101
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Members and responses: every model answers every prompt."""
    rows = range(prompts * models)
    members = pl.DataFrame(
        [
            (
                "train",
                None,
                f"p{row // models}",
                row,
                f"m{row % models}",
                float(gold(row)),
                "s",
                row,
            )
            for row in rows
        ],
        schema=MEMBERS,
        orient="row",
    )
    responses = pl.DataFrame({"response_id": [f"r{row}" for row in rows], "n_response": 7})
    return members, responses


def _sides(members: pl.DataFrame, column: str, *splits: str) -> set[Any]:
    return set(members.filter(pl.col("split").is_in(splits))[column])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.2, 0.4, 0.6]))
@example(seed=30, share=0.6)
def test_each_split_shares_only_what_its_scenario_allows(seed: int, share: float) -> None:
    members, responses = _groups()
    rule = Scenarios(prompts=share, models=share, responses=share, seed=seed)
    try:
        pairs, divided = divide(members, responses, rule)
    except UserError:  # with few models, one of the shares may come out empty
        assume(False)
    assert set(divided["split"]) == set(SCENARIOS)
    assert divided.columns == members.columns
    assert pairs.columns == list(PAIRS)
    assert divided["row"].is_unique().all()
    prompts, models, texts = (
        {split: _sides(divided, column, split) for split in SCENARIOS}
        for column in ("prompt_id", "model", "response")
    )
    for unseen in ("prompt", "mutual"):
        assert not prompts[unseen] & (prompts["train"] | prompts["id"] | prompts["model"])
    for unseen in ("model", "mutual"):
        assert not models[unseen] & (models["train"] | models["id"] | models["prompt"])
    # Each response is drawn to id or train by itself, so that a larger share holds out a superset.
    # All of a model's responses to training prompts may then be drawn to id (here m7's 13 with seed
    # 30 and share 0.6). Keeping one in train would change the data of stored runs under their ids.
    for model in models["id"] - models["train"]:
        own = divided.filter(pl.col("model") == model, pl.col("split") != "prompt")
        assert set(own["split"]) == {"id"}
    trained_on = set(pairs.filter(split="train")["prompt_id"])
    assert prompts["id"] | prompts["model"] <= trained_on
    assert sum(map(len, texts.values())) == divided.height  # no response is in two splits
    left_out = members.join(divided, on="row", how="anti")
    assert not set(left_out["prompt_id"]) & trained_on
    # Pairs stay within their split and prompt, the better one first.
    of = dict(divided.select("response", pl.struct("split", "prompt_id", "gold", "model")).rows())
    for row in pairs.iter_rows(named=True):
        chosen, rejected = of[row["chosen"]], of[row["rejected"]]
        assert row["split"] == chosen["split"] == rejected["split"]
        assert row["prompt_id"] == chosen["prompt_id"] == rejected["prompt_id"]
        assert row["margin"] == chosen["gold"] - rejected["gold"] > 0
        assert (row["chosen_model"], row["rejected_model"]) == (chosen["model"], rejected["model"])
    assert pairs["pair_id"].is_unique().all()


def test_splits_depend_only_on_ids_and_seed_and_larger_shares_contain_smaller_ones() -> None:
    members, responses = _groups()
    whole = dict(divide(members, responses, Scenarios())[1].select("row", "split").rows())
    shuffled = members.sample(fraction=1.0, shuffle=True, seed=1)
    again, divided = divide(shuffled, responses, Scenarios())
    assert dict(divided.select("row", "split").rows()) == whole
    assert set(again["pair_id"]) == set(divide(members, responses, Scenarios())[0]["pair_id"])
    some = members.filter(pl.col("prompt_id") != "p3")
    assert dict(divide(some, responses, Scenarios())[1].select("row", "split").rows()).items() <= (
        whole.items()
    )
    other = divide(members, responses, Scenarios(seed=1))[1]
    assert dict(other.select("row", "split").rows()) != whole
    larger = divide(members, responses, Scenarios(prompts=0.5, models=0.5, responses=0.5))[1]
    smaller = divide(members, responses, Scenarios())[1]
    assert _sides(smaller, "prompt_id", "prompt") < _sides(larger, "prompt_id", "prompt")
    assert _sides(smaller, "model", "model") < _sides(larger, "model", "model")


def test_shares_are_met() -> None:
    members, responses = _groups(prompts=2000, models=10)
    _, divided = divide(members, responses, Scenarios(prompts=0.3, responses=0.4))
    of_prompts = len(_sides(divided, "prompt_id", "prompt")) / 2000
    seen = divided.filter(pl.col("split").is_in(["train", "id"]))
    assert of_prompts == pytest.approx(0.3, abs=0.05)
    assert (seen["split"] == "id").mean() == pytest.approx(0.4, abs=0.03)


def test_a_response_by_seen_and_unseen_models_is_left_out_of_the_unseen_models_groups() -> None:
    members, responses = _groups()
    sides = divide(members, responses, Scenarios())[1]
    unseen = sorted(_sides(sides, "model", "model"))[0]
    seen = sorted(_sides(sides, "model", "train"))[0]
    # Let the unseen model give the same responses as a seen one.
    said = dict(members.filter(pl.col("model") == seen).select("prompt_id", "response").rows())
    repeated = (
        pl.when(pl.col("model") == unseen)
        .then(pl.col("prompt_id").replace_strict(said, return_dtype=pl.Int32))
        .otherwise("response")
    )
    _, divided = divide(members.with_columns(response=repeated), responses, Scenarios())
    assert unseen not in set(divided["model"])
    assert divided.height == members.height - 40
    of_response = divided.group_by("response").agg(pl.col("split").n_unique())
    assert of_response["split"].max() == 1


def test_pairs_follow_their_rule() -> None:
    members, responses = _groups()
    few, _ = divide(members, responses, Scenarios(pairs={"per_prompt": 3, "gap": 10}))
    assert few["margin"].min() > 10
    assert few.group_by("split", "prompt_id").len()["len"].max() == 3


def test_pairs_equal_those_of_loading_the_same_groups(tmp_path: Any) -> None:
    """A split has the same pair ids, margins and models as `load` derives from its rows."""
    rows = [
        {"prompt": f"p{row // 20}", "response": f"r{row}", "model": f"m{row % 20}"}
        | {"gold": row * 37 % 101}
        for row in range(800)
    ]
    pl.DataFrame(rows).write_ndjson(tmp_path / "groups.jsonl")
    source = {"path": str(tmp_path / "groups.jsonl"), "split": "train", "pairs": {"per_prompt": 4}}
    loaded = load([SourceSpec.parse(source, "test")])
    responses = loaded.responses.select(
        "response_id", n_response=pl.col("response").str.len_chars()
    )
    pairs, divided = divide(loaded.members, responses, Scenarios())
    trained = divided.filter(split="train")["row"]
    pl.DataFrame([rows[row] for row in trained]).write_ndjson(tmp_path / "part.jsonl")
    part = load(
        [SourceSpec.parse({**source, "path": str(tmp_path / "part.jsonl"), "pairs": {}}, "")]
    )
    columns = ["pair_id", "prompt_id", "margin", "chosen_model", "rejected_model"]
    own = pairs.filter(split="train").select(columns).sort("pair_id")
    assert own.equals(part.pairs.select(columns).sort("pair_id"))


@pytest.mark.parametrize(
    ("groups", "rule", "line"),
    [
        ({}, {"splits": ["id"]}, "there are no groups in 'id': extract data with the columns"),
        ({"models": 1}, {}, "models = 0.25 holds out none of 1 models: change it, or take"),
        ({"prompts": 1}, {}, "prompts = 0.2 holds out none of 1 prompts: change it, or take"),
        ({"gold": lambda _: 1}, {}, "split 'train' has no pairs, from .* whose gold scores"),
        ({}, {"pairs": {"gap": 1000}}, "differ by more than 1000: hold out another share"),
    ],
)
def test_groups_that_cannot_be_divided_are_refused(
    groups: dict[str, Any], rule: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        divide(*_groups(**groups), Scenarios.parse(rule, "test"))
    assert "\n" not in str(caught.value)


def test_groups_of_one_response_have_no_pairs() -> None:
    members, responses = _groups()
    single = members.unique("prompt_id", keep="any").with_columns(
        model=pl.lit("m") + pl.col("row").cast(pl.String)
    )
    with pytest.raises(UserError, match="has no pairs"):
        divide(single, responses, Scenarios())


def test_a_missing_model_is_refused() -> None:
    members, responses = _groups()
    nameless = members.with_columns(model=pl.when(pl.col("row") > 10).then(pl.col("model")))
    with pytest.raises(UserError, match="11 of 800 responses in 'train' have no model, and"):
        divide(nameless, responses, Scenarios())


def test_cross_prompt_pairs_neighbouring_prompts_in_training_only() -> None:
    members, responses = _groups()
    plain, divided = divide(members, responses, Scenarios(pairs={"per_prompt": 30}))
    rule = Scenarios(pairs={"per_prompt": 30}, cross_prompt=True)
    pairs, same = divide(members, responses, rule)
    assert same.equals(divided)
    evaluated = pl.col("split") != "train"
    assert pairs.filter(evaluated).equals(plain.filter(evaluated))
    trained = pairs.filter(split="train")
    of = dict(divided.select("response", pl.struct("split", "prompt_id", "gold")).rows())
    joined: dict[str, set[str]] = {}
    for row in trained.iter_rows(named=True):
        chosen, rejected = of[row["chosen"]], of[row["rejected"]]
        assert chosen["split"] == rejected["split"] == "train"
        assert chosen["prompt_id"] != rejected["prompt_id"]
        assert row["prompt_id"] == chosen["prompt_id"]
        assert row["margin"] == chosen["gold"] - rejected["gold"] > 0
        joined.setdefault(chosen["prompt_id"], set()).add(rejected["prompt_id"])
        joined.setdefault(rejected["prompt_id"], set()).add(chosen["prompt_id"])
    assert len(joined) == len(_sides(divided, "prompt_id", "train"))
    # The prompts form a chain: two neighbours each, and one for the first and the last.
    assert sorted(len(others) for others in joined.values())[:3] == [1, 1, 2]
    assert max(map(len, joined.values())) == 2
    assert trained.height == 30 * (len(joined) - 1)
    # Only one pair of neighbours has one prompt in validation and the other in training.
    held = dict(zip(joined, holdout(joined, 0.3, 0), strict=True))
    assert sum(held[one] != held[other] for one in joined for other in joined[one]) == 2


def test_cross_prompt_by_rank_is_refused() -> None:
    with pytest.raises(UserError, match="by_rank ranks within a prompt: leave"):
        Scenarios.parse({"cross_prompt": True, "pairs": {"by_rank": True}}, "test")
