"""Tests of the canonical dataset: stored once, exclusions listed, independent of row order."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from counted_calls import calls_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrm.core.errors import UserError
from embrm.data.collector import EXCLUSIONS, MEMBERS, PAIRS, RESPONSES
from embrm.data.dataset import Dataset, load
from embrm.data.sources import SourceSpec
from embrm.data.splits import holdout

NAN = float("nan")
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def _source(
    folder: Path, rows: list[dict[str, Any]], name: str = "mine", **spec: Any
) -> SourceSpec:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec.parse({"path": str(path), **spec}, "test")


def _pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def _member(prompt: str, response: str, gold: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "gold": gold, **more}


def _spelled(dataset: Dataset) -> pl.DataFrame:
    """Pairs with the texts of chosen and rejected instead of their row numbers."""
    texts = dataset.responses["response"]
    return dataset.pairs.with_columns(
        texts.gather(dataset.pairs[side]).alias(side) for side in ("chosen", "rejected")
    )


def _sound(dataset: Dataset) -> None:
    """Assert the invariants of every dataset."""
    responses, pairs, members = dataset.responses, dataset.pairs, dataset.members
    assert dict(responses.schema) == RESPONSES
    assert dict(pairs.schema) == PAIRS
    assert dict(members.schema) == MEMBERS
    assert dict(dataset.exclusions.schema) == EXCLUSIONS
    assert responses["response_id"].is_unique().all()
    assert responses.select("kind", "prompt", "response").is_unique().all()
    assert pairs["pair_id"].is_unique().all()
    used = {*pairs["chosen"], *pairs["rejected"], *members["response"]}
    assert used == set(range(responses.height))
    for table, column in ((pairs, "chosen"), (pairs, "rejected"), (members, "response")):
        assert (
            table["prompt_id"].to_list() == responses["prompt_id"].gather(table[column]).to_list()
        )
    assert (pairs["chosen"] != pairs["rejected"]).all()


def test_pairs_become_indices_into_responses(tmp_path: Path) -> None:
    rows = [
        _pair("p", "a", "b", margin=0.5, chosen_gen="m1", rejected_gen="m2", domain="x"),
        _pair("p", "a", "c", margin=None, chosen_gen="m1", rejected_gen=None, domain=None),
        _pair("q", "a", "b", margin=-1),
    ]
    dataset = load([_source(tmp_path, rows)])
    _sound(dataset)
    assert dataset.responses.select("kind", "prompt", "response").rows() == [
        ("text", "p", "a"),
        ("text", "p", "b"),
        ("text", "p", "c"),
        ("text", "q", "a"),
        ("text", "q", "b"),
    ]
    columns = ["split", "subset", "chosen", "rejected", "margin", "label", "weight"]
    assert dataset.pairs.select(columns).rows() == [
        ("mine", "x", 0, 1, 0.5, 1.0, 1.0),
        ("mine", None, 0, 2, None, 1.0, 1.0),
        ("mine", None, 3, 4, -1.0, 1.0, 1.0),
    ]
    assert dataset.pairs.select("chosen_model", "rejected_model", "source", "row").rows() == [
        ("m1", "m2", f"{tmp_path.name}/mine.jsonl", 0),
        ("m1", None, f"{tmp_path.name}/mine.jsonl", 1),
        (None, None, f"{tmp_path.name}/mine.jsonl", 2),
    ]
    assert dataset.members.is_empty()
    assert dataset.exclusions.is_empty()


def test_labels_and_weights_are_kept(tmp_path: Path) -> None:
    rows = [_pair("p", "a", "b", label=0.3, weight=2), _pair("p", "a", "c", label=1, weight=0)]
    pairs = load([_source(tmp_path, rows)]).pairs
    assert pairs.select("label", "weight").rows() == [(0.3, 2.0), (1.0, 0.0)]


def test_every_exclusion_is_listed_with_its_row(tmp_path: Path) -> None:
    good = _pair("p", "a", "b", label=1, split="train")
    rows = [
        good,
        good | {"prompt": "  "},
        good | {"chosen": ""},
        good | {"rejected": "a"},
        good,
        good | {"rejected": None},
        good | {"label": NAN},
        good | {"label": 2},
        good | {"chosen": ["x"]},
        good | {"split": None},
        good | {"split": "test"},
        good | {"chosen": "b", "rejected": "a"},
    ]
    dataset = load([_source(tmp_path, rows)])
    _sound(dataset)
    # The same pair in another split, or with chosen and rejected swapped, is no duplicate.
    assert dataset.pairs["row"].to_list() == [0, 10, 11]
    assert dataset.exclusions.select("row", "split", "reason").rows() == [
        (1, "train", "empty_prompt"),
        (2, "train", "empty_response"),
        (3, "train", "identical"),
        (4, "train", "duplicate"),
        (5, "train", "missing_value"),
        (6, "train", "nan_label"),
        (7, "train", "nan_label"),
        (8, "train", "wrong_form"),
        (9, "", "missing_value"),
    ]
    assert dataset.exclusions["source"].unique().to_list() == [f"{tmp_path.name}/mine.jsonl"]


def test_members_with_invalid_gold_are_excluded(tmp_path: Path) -> None:
    rows = [
        _member("p", "a", 1, model="m"),
        _member("p", "b", NAN),
        _member("p", "c", "x"),
        _member("p", "d", None),
        _member("p", "a", 1, model="m"),
        _member("p", "a", 1, model="n"),
        _member("p", "e", 0, model="m"),
    ]
    dataset = load([_source(tmp_path, rows)])
    _sound(dataset)
    assert dataset.exclusions.select("row", "reason").rows() == [
        (1, "nan_gold"),
        (2, "nan_gold"),
        (3, "missing_value"),
        (4, "duplicate"),
    ]
    assert dataset.members.select("response", "model", "gold").rows() == [
        (0, "m", 1.0),
        (0, "n", 1.0),
        (1, "m", 0.0),
    ]


def test_invalid_unicode_is_excluded_in_texts_and_replaced_in_names(tmp_path: Path) -> None:
    rows = [_pair("p\ud800", "a", "b"), _pair("p", "a", "b", subset="s\ud800")]
    dataset = load([_source(tmp_path, rows)])
    assert dataset.exclusions["reason"].to_list() == ["wrong_form"]
    assert dataset.pairs["subset"].to_list() == ["s?"]


def test_pairs_of_groups_have_gold_differences_as_margins(tmp_path: Path) -> None:
    rows = [
        _member("p", "a", 1.0, model="m1", subset="s"),
        _member("p", "b", 3.5, model="m2", subset="s"),
        _member("p", "c", 1.5, model="m3", subset="s"),
        # The same text by another model counts once in pairs, with the mean gold score 2.5.
        _member("p", "c", 3.5, model="m4", subset="s"),
        _member("q", "a", 1.0),
    ]
    dataset = load([_source(tmp_path, rows, pairs={"gap": 1})])
    _sound(dataset)
    spelled = _spelled(dataset).sort("margin")
    assert spelled.select("chosen", "rejected", "margin", "chosen_model", "row").rows() == [
        ("c", "a", 1.5, "m3", 2),
        ("b", "a", 2.5, "m2", 1),
    ]
    assert spelled["subset"].to_list() == ["s", "s"]
    assert dataset.members.height == 5
    assert dataset.responses.height == 4
    [rules] = dataset.rules["sources"]
    assert rules["pairs"] == {"gap": 1.0, "per_prompt": None, "length_balanced": False, "seed": 0}


def test_per_prompt_zero_derives_no_pairs(tmp_path: Path) -> None:
    rows = [_member("p", "a", 1.0), _member("p", "b", 2.0)]
    dataset = load([_source(tmp_path, rows, pairs={"per_prompt": 0})])
    _sound(dataset)
    assert dataset.pairs.is_empty()
    assert dataset.members.height == 2


def test_best_of_n_pairs_the_best_with_each_loser(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "p",
            "best": "a",
            "best_gen": "m",
            "losers": ["b", "", "a", "c"],
            "loser_gens": ["n", "o", "p", None],
        },
        {"prompt": "p", "best": "a", "losers": ["d"]},
        {"prompt": "p", "best": "a", "losers": []},
        {"prompt": "p", "best": "a", "losers": None},
        {"prompt": "p", "best": "a", "losers": ["e", "f"], "loser_gens": ["n"]},
    ]
    dataset = load([_source(tmp_path, rows)])
    _sound(dataset)
    spelled = _spelled(dataset)
    assert spelled.select("chosen", "rejected", "chosen_model", "rejected_model").rows() == [
        ("a", "b", "m", "n"),
        ("a", "c", "m", None),
        ("a", "d", None, None),
    ]
    assert dataset.exclusions.select("row", "reason", "detail").rows() == [
        (0, "empty_response", "loser 1: ''"),
        (0, "identical", "loser 2: 'a'"),
        (2, "wrong_form", "losers is [], not a list of responses"),
        (3, "missing_value", "losers is null"),
        (4, "wrong_form", "2 losers, but loser_models is ['n']"),
    ]


def test_best_of_n_with_an_implicit_prompt_has_one_prompt(tmp_path: Path) -> None:
    row = {"best": "Say it: loud now", "losers": ["Say it: loud later", "Say it: low"]}
    dataset = load([_source(tmp_path, [row])])
    assert dataset.responses["prompt"].unique().to_list() == ["Say it: "]
    assert dataset.pairs.height == 2


def test_a_response_is_stored_once_across_sources_and_splits(tmp_path: Path) -> None:
    dataset = load(
        [
            _source(tmp_path, [_pair("p", "a", "b")], "one", split="train"),
            _source(tmp_path, [_pair("p", "b", "c")], "two", split="id"),
            _source(tmp_path, [_member("p", "a", 1), _member("p", "c", 2)], "three", split="gold"),
        ]
    )
    _sound(dataset)
    assert dataset.responses["response"].to_list() == ["a", "b", "c"]
    assert dataset.responses["prompt_id"].n_unique() == 1
    assert dataset.pairs.select("split", "chosen", "rejected").rows() == [
        ("train", 0, 1),
        ("id", 1, 2),
        ("gold", 2, 0),
    ]


def test_text_and_conversation_are_not_merged(tmp_path: Path) -> None:
    dataset = load(
        [
            _source(tmp_path, [_pair("p", "a", "b")], "one"),
            _source(tmp_path, [_pair("Human: p", "a", "b")], "two"),
        ]
    )
    _sound(dataset)
    assert dataset.responses["kind"].to_list() == ["text", "text", "chat", "chat"]
    assert dataset.responses["prompt_id"].n_unique() == 2
    assert dataset.responses["prompt"][2] == '[{"role":"user","content":"p"}]'


def test_the_split_is_that_of_the_spec_or_of_the_file(tmp_path: Path) -> None:
    two = [_pair("p", "a", "b", split="train"), _pair("q", "a", "b", split="ood/x")]
    assert load([_source(tmp_path, two)]).pairs["split"].to_list() == ["train", "ood/x"]
    with pytest.raises(UserError) as caught:
        load([_source(tmp_path, two, split="id")])
    message = str(caught.value)
    assert "its split column has 'ood/x', 'train': leave the split out, or select one in" in message
    assert 'where = { split = "ood/x" }' in message
    renamed = load([_source(tmp_path, two, split="id", where={"split": "train"})])
    assert renamed.pairs["split"].to_list() == ["id"]
    fold = [_pair("p", "a", "b", fold="f")]
    assert load([_source(tmp_path, fold, columns={"split": "fold"})]).pairs["split"][0] == "f"


def test_limit_counts_rows_or_prompts_of_groups_per_split(tmp_path: Path) -> None:
    rows = [_pair(f"p{n}", "a", "b", split="xy"[n % 2]) for n in range(10)]
    assert load([_source(tmp_path, rows, limit=2)]).pairs["row"].to_list() == [0, 1, 2, 3]
    rows = [_member(f"p{n % 3}", f"a{n}", n, split="x") for n in range(9)]
    members = load([_source(tmp_path, rows, limit=2)]).members
    assert members["row"].to_list() == [0, 1, 3, 4, 6, 7]


def test_holdout_moves_whole_prompts(tmp_path: Path) -> None:
    rows = [_pair(f"p{n % 40}", f"a{n}", "b", split="train") for n in range(120)]
    rule = {"fraction": 0.3, "split": "held"}
    pairs = load([_source(tmp_path, rows, holdout=rule)]).pairs
    train, held = (set(pairs.filter(split=name)["prompt_id"]) for name in ("train", "held"))
    assert not train & held
    assert len(train) + len(held) == 40
    assert 4 <= len(held) <= 22
    groups = [_member(f"p{n % 40}", f"a{n}", n, split="train") for n in range(120)]
    grouped = load([_source(tmp_path, groups, holdout=rule)])
    assert set(grouped.members.filter(split="held")["prompt_id"]) == held
    assert set(grouped.pairs.filter(split="held")["prompt_id"]) == held


def test_a_validation_split_after_a_holdout_is_not_empty(tmp_path: Path) -> None:
    rows = [_pair(f"p{n}", "a", "b") for n in range(200)]
    dataset = load([_source(tmp_path, rows, holdout={"fraction": 0.3})])
    left = dataset.pairs.filter(split="mine")["prompt_id"]
    # 5 standard deviations around 10 % of about 140.
    assert 0 < holdout(left, 0.1, 0).sum() < 32


def test_identical_responses_without_a_prompt_column_are_excluded_as_identical(
    tmp_path: Path,
) -> None:
    rows = [{"chosen": "same", "rejected": "same"}, {"chosen": "q a", "rejected": "q b"}]
    assert load([_source(tmp_path, rows)]).exclusions["reason"].to_list() == ["identical"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [_pair("p", "a", "a")] * 2 + [_pair("", "a", "b")],
            "2 identical, 1 empty_prompt (first: 'a'); check columns and where",
        ),
        (
            [_member("p", "a", NAN)],
            "1 nan_gold (first: gold is nan, not a finite float32); check columns and where",
        ),
        (
            [_pair("p", "a", str(n), label="x\n" * 99) for n in range(6)],
            "6 nan_label (first: label '" + "x\\n" * 19 + "x… is not a number); "
            'fix that column, or leave it out, in a spec: [[data]] path = "PATH", columns = '
            '{ label = "" }',
        ),
        (
            [_pair("p", "a", "b", weight=-1), _pair("p", "a", "c", weight=NAN)],
            "2 nan_label (first: weight out of range: -1.0 is not at least 0); "
            'fix that column, or leave it out, in a spec: [[data]] path = "PATH", columns = '
            '{ weight = "" }',
        ),
        (
            [_pair("p", "a", "b", label="good"), _pair("p", "a", "a")],
            "1 nan_label, 1 identical (first: label 'good' is not a number); "
            "check columns and where",
        ),
    ],
)
def test_a_source_without_usable_rows_is_an_error_with_counts(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        load([_source(tmp_path, rows)])
    assert str(
        caught.value
    ) == f"{tmp_path.name}/mine.jsonl: every row was excluded: {message}".replace(
        "PATH", str(tmp_path / "mine.jsonl")
    )


def test_the_suggested_columns_setting_for_unusable_labels_works(tmp_path: Path) -> None:
    rows = [_pair("p", "a", "b", label="good", weight="heavy", margin="wide")]
    columns = {"label": "", "weight": "", "margin": ""}
    pairs = load([_source(tmp_path, rows, columns=columns)]).pairs
    assert pairs.select("margin", "label", "weight").rows() == [(None, 1.0, 1.0)]


def test_a_source_given_twice_is_an_error(tmp_path: Path) -> None:
    source = _source(tmp_path, [_pair("p", "a", "b")])
    with pytest.raises(UserError, match="every row was excluded: 1 duplicate"):
        load([source, source])


def test_no_source_is_an_error() -> None:
    with pytest.raises(UserError, match="name at least one"):
        load([])


pairs_of_words = st.lists(
    st.tuples(st.sampled_from("pqr"), st.sampled_from("abcd"), st.sampled_from("abcd")),
    min_size=1,
    max_size=15,
).filter(lambda rows: any(chosen != rejected for _, chosen, rejected in rows))


@one_folder
@given(rows=pairs_of_words, data=st.data())
def test_row_order_does_not_change_the_pairs(
    tmp_path: Path, rows: list[tuple[str, str, str]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    one = load([_source(tmp_path, [_pair(*row) for row in rows])])
    two = load([_source(tmp_path, [_pair(*row) for row in shuffled])])
    _sound(one)
    assert set(one.pairs["pair_id"]) == set(two.pairs["pair_id"])
    assert set(one.responses["response_id"]) == set(two.responses["response_id"])
    reasons = [Counter(dataset.exclusions["reason"]) for dataset in (one, two)]
    assert reasons[0] == reasons[1]
    assert one.pairs.height + one.exclusions.height == len(rows)


@one_folder
@given(rows=pairs_of_words)
def test_loading_a_canonical_dataset_again_changes_nothing(
    tmp_path: Path, rows: list[tuple[str, str, str]]
) -> None:
    once = load([_source(tmp_path, [_pair(*row) for row in rows])])
    prompts = once.responses["prompt"].gather(once.pairs["chosen"])
    again = _spelled(once).with_columns(prompts.alias("prompt")).drop("source", "row")
    twice = load([_source(tmp_path, again.to_dicts())])
    assert twice.exclusions.is_empty()
    assert twice.digest() == once.digest()


groups = st.lists(
    st.tuples(
        st.sampled_from("pq"),
        st.text("ab", min_size=1, max_size=4),
        st.sampled_from(["m", "n"]),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=14,
)


@one_folder
@given(
    rows=groups,
    per_prompt=st.sampled_from([None, 1, 2, 5]),
    balanced=st.booleans(),
    data=st.data(),
)
def test_derived_pairs_depend_only_on_their_group(
    tmp_path: Path,
    rows: list[tuple[str, str, str, int]],
    per_prompt: int | None,
    balanced: bool,
    data: st.DataObject,
) -> None:
    rule = {"length_balanced": balanced} | ({"per_prompt": per_prompt} if per_prompt else {})

    def pairs(chosen: list[tuple[str, str, str, int]]) -> set[tuple[Any, ...]]:
        listed = [_member(p, text, gold, model=model) for p, text, model, gold in chosen]
        dataset = load([_source(tmp_path, listed, pairs=rule)])
        _sound(dataset)
        columns = ("pair_id", "prompt_id", "margin", "chosen_model", "rejected_model")
        return set(dataset.pairs.select(columns).rows())

    everything = pairs(rows)
    assert pairs(data.draw(st.permutations(rows))) == everything
    alone = [row for row in rows if row[0] == rows[0][0]]
    assert pairs(alone) <= everything
    others = [row for row in rows if row[0] != rows[0][0]]
    assert everything == pairs(alone) | (pairs(others) if others else set())


words = st.sampled_from(["", " ", "Human: q", "Human: q\n\nAssistant: a", "q", "q a", "\ud800"])
message = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", 1]), "content": words | st.none()}
)
cell = st.one_of(
    words, st.none(), st.integers(), st.floats(), st.booleans(), message, st.lists(message | words)
)
rows_of_anything = st.lists(
    st.dictionaries(st.sampled_from(["prompt", "subset", "split", "margin", "label"]), cell),
    min_size=1,
    max_size=5,
)
shapes = st.sampled_from([("chosen", "rejected"), ("response", "gold"), ("best", "losers")])


@one_folder
@given(rows=rows_of_anything, shape=shapes, data=st.data())
def test_arbitrary_content_of_rows_raises_nothing_but_user_errors(
    tmp_path: Path, rows: list[dict[str, Any]], shape: tuple[str, str], data: st.DataObject
) -> None:
    rows = [row | {name: data.draw(cell) for name in shape} for row in rows]
    try:
        dataset = load([_source(tmp_path, rows)])
    except UserError:
        return
    _sound(dataset)
    assert all(detail.isprintable() for detail in dataset.exclusions["detail"])


def _three_sources(folder: Path) -> Dataset:
    members = [_member("p", "d", 1), _member("p", "a", 2)]
    return load(
        [
            _source(folder, [_pair("p", "a", "b"), _pair("p", "c", "a")], "one", split="train"),
            _source(folder, [_pair("q", "x", "y")], "two", split="id"),
            _source(folder, members, "three", pairs={"per_prompt": 0}),
        ]
    )


def _reasons(key: str, rows: list[tuple[int, str, str]]) -> pl.DataFrame:
    schema = {key: pl.Int32, "reason": pl.String, "detail": pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_without_a_response_removes_its_pairs_and_members(tmp_path: Path) -> None:
    dataset = _three_sources(tmp_path)
    assert dataset.responses["response"].to_list() == ["a", "b", "c", "x", "y", "d"]
    reasons = [(0, "over_long", "600 tokens"), (0, "wrong_form", "a later reason")]
    left = dataset.without(_reasons("response", reasons))
    _sound(left)
    assert left.responses["response"].to_list() == ["x", "y", "d"]
    assert left.pairs.select("split", "chosen", "rejected").rows() == [("id", 0, 1)]
    assert left.members["response"].to_list() == [2]
    assert left.exclusions.select("row", "split", "reason", "detail").rows() == [
        (0, "train", "over_long", "600 tokens"),
        (1, "train", "over_long", "600 tokens"),
        (1, "three", "over_long", "600 tokens"),
    ]
    assert left.rules == dataset.rules


def test_without_a_pair_keeps_responses_that_are_still_used(tmp_path: Path) -> None:
    dataset = _three_sources(tmp_path)
    left = dataset.without(pairs=_reasons("pair", [(1, "truncated_to_identical", "5 tokens")]))
    _sound(left)
    assert left.responses["response"].to_list() == ["a", "b", "x", "y", "d"]
    assert left.pairs["row"].to_list() == [0, 0]
    assert left.exclusions.rows()[-1][1:] == (1, "train", "truncated_to_identical", "5 tokens")


def test_without_arguments_changes_nothing(tmp_path: Path) -> None:
    dataset = _three_sources(tmp_path)
    assert dataset.without().digest() == dataset.digest()


@pytest.mark.parametrize(
    ("reason", "remedy"), [("over_long", "raise max_length"), ("wrong_form", "check the texts")]
)
def test_without_everything_is_an_error(tmp_path: Path, reason: str, remedy: str) -> None:
    every = _reasons("response", [(row, reason, f"{row} tokens") for row in range(6)])
    with pytest.raises(UserError) as caught:
        _three_sources(tmp_path).without(every)
    assert str(caught.value) == f"every row was excluded: 5 {reason} (first: 0 tokens); {remedy}"


@one_folder
@given(
    rows=pairs_of_words, gone=st.sets(st.integers(0, 11)), pairs_gone=st.sets(st.integers(0, 14))
)
def test_without_renumbers_the_responses(
    tmp_path: Path, rows: list[tuple[str, str, str]], gone: set[int], pairs_gone: set[int]
) -> None:
    dataset = load([_source(tmp_path, [_pair(*row) for row in rows])])
    gone = {row for row in gone if row < dataset.responses.height}
    pairs_gone = {row for row in pairs_gone if row < dataset.pairs.height}
    wanted = _spelled(dataset).filter(
        [
            index not in pairs_gone and not {chosen, rejected} & gone
            for index, (chosen, rejected) in enumerate(
                dataset.pairs.select("chosen", "rejected").rows()
            )
        ]
    )
    drops = (
        _reasons("response", [(row, "over_long", "") for row in gone]),
        _reasons("pair", [(row, "truncated_to_identical", "") for row in pairs_gone]),
    )
    if wanted.is_empty():
        with pytest.raises(UserError):
            dataset.without(*drops)
        return
    left = dataset.without(*drops)
    _sound(left)
    assert _spelled(left).equals(wanted)
    lost = left.exclusions.height - dataset.exclusions.height
    assert lost == dataset.pairs.height - wanted.height


def test_the_digest_covers_the_content_but_no_paths(tmp_path: Path) -> None:
    rows = [_pair("p", "a", "b", margin=1, label=1, weight=1, split="train", subset="s")]

    def digest(name: str = "mine", **change: Any) -> str:
        return load([_source(tmp_path, [rows[0] | change], name)]).digest()

    assert digest() == digest("other")
    changes = [
        {"prompt": "q"},
        {"chosen": "c"},
        {"rejected": "c"},
        {"margin": 2},
        {"margin": None},
        {"label": 0.5},
        {"weight": 2},
        {"split": "id"},
        {"subset": "t"},
        {"chosen_model": "m"},
    ]
    digests = {digest(**change) for change in changes} | {digest()}
    assert len(digests) == len(changes) + 1
    gold = [_member("p", "a", 1), _member("p", "b", 2)]
    one, two = (
        load([_source(tmp_path, [gold[0], gold[1] | {"gold": value}], pairs={"per_prompt": 0})])
        for value in (2, 3)
    )
    assert one.digest() != two.digest()


def test_ids_equal_golden_values(tmp_path: Path) -> None:
    """Cache identities depend on these ids, so a change would orphan every existing cache."""
    dataset = load([_source(tmp_path, [_pair("p", "a", "b")], split="train")])
    assert dataset.responses.row(0)[:2] == ("763e55312fe004b1", "2d3c8d8ef7e05326")
    assert dataset.pairs["pair_id"][0] == "ddc2f95ab318a99b"


def test_work_per_row_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    def calls_a_row(rows: int) -> float:
        rng = np.random.default_rng(0)
        path = tmp_path / f"{rows}.parquet"
        pl.DataFrame(
            {
                "prompt": [f"prompt {n // 10}" for n in range(rows)],
                "chosen": [f"yes {n} " * 40 for n in rng.permutation(rows)],
                "rejected": [f"no {n} " * 40 for n in rng.permutation(rows)],
            }
        ).write_parquet(path)
        found = []
        calls = calls_of(lambda: found.append(load([SourceSpec(path=str(path))])))
        assert found[0].pairs.height == rows
        return calls / rows

    assert calls_a_row(30_000) < 1.1 * calls_a_row(3_000)


def test_real_data(shared: Path) -> None:
    """Every row becomes a pair or an exclusion, and the detected forms are as documented."""
    wanted = {
        "hhh_alignment/pairs.parquet": (221, "text", "explicit"),
        "hh_rlhf_test/pairs.parquet": (4642, "transcript", "explicit"),
        "mt_bench_human/pairs_turn1.parquet": (662, "text", "explicit"),
        "mt_bench_human/pairs_turn2.parquet": (672, "transcript", "implicit"),
        "llmbar/pairs.parquet": (1200, "text", "explicit"),
        "rm_bench/pairs.parquet": (7182, "text", "explicit"),
        "rmb/pairs.parquet": (14543, "text", "explicit"),
    }
    paths = [str(shared / "data" / name) for name in wanted]
    names = [f"s{index}" for index in range(len(paths))]
    dataset = load(
        [SourceSpec(path=path, split=name) for path, name in zip(paths, names, strict=True)]
    )
    _sound(dataset)
    for name, rules, facts in zip(names, dataset.rules["sources"], wanted.values(), strict=True):
        pairs = dataset.pairs.filter(split=name).height
        excluded = dataset.exclusions.filter(split=name).height
        assert pairs + excluded == facts[0]
        assert (rules["rows"], rules["format"], rules["prompt"]) == facts
    second_turns = dataset.pairs.filter(split="s3")["chosen"]
    roles = [
        [message["role"] for message in json.loads(text)]
        for text in dataset.responses["response"].gather(second_turns)
    ]
    # At most two pairs also share the first answer, which is then part of the prompt.
    assert Counter(map(len, roles)).most_common(1)[0] == (
        3,
        len(roles) - roles.count(["assistant"]),
    )
    assert roles.count(["assistant"]) <= 2


def test_derived_pairs_are_as_many_as_the_published_ones(shared: Path) -> None:
    """AlpacaEval pairs: logit gap 1, at most 70 per prompt, length-balanced."""
    groups = SourceSpec.parse(
        {
            "path": str(shared / "data/alpacaeval/groups_gold_logit.parquet"),
            "columns": {"gold": "logit"},
            "pairs": {"gap": 1, "per_prompt": 70, "length_balanced": True},
        },
        "test",
    )
    dataset = load([groups])
    lengths = dataset.responses["response"].str.len_chars()
    pairs = dataset.pairs.with_columns(
        longer=lengths.gather(dataset.pairs["chosen"]) > lengths.gather(dataset.pairs["rejected"])
    )
    counts = pairs.group_by("split", "prompt_id").agg(pl.len(), pl.col("longer").sum())
    assert (counts["len"] == 2 * counts["longer"]).all()
    published = pl.read_parquet(shared / "data/alpacaeval/pairs_length_balanced.parquet")
    assert Counter(pairs["split"]) == Counter(published["split"])
    assert pairs["margin"].min() > 1
