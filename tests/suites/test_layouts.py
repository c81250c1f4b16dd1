"""Read every published layout of the suites, from small made-up files, into pairs or groups."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from embrm.core.errors import UserError
from embrm.data.dataset import Dataset, load
from embrm.data.sources import SourceSpec, parse_source
from embrm.suites import scoring
from embrm.suites.registry import MODULES, SUITES

VOTE = {
    "question_id": 81,
    "model_a": "A",
    "model_b": "B",
    "judge": "author_0",
    "conversation_a": [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "a 1"},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "a 2"},
    ],
    "conversation_b": [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "b 1"},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "b 2"},
    ],
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "reward-bench": [
        {
            "prompt": "Sort.", "chosen": "sorted()", "chosen_model": "human", "rejected": "no",
            "rejected_model": "bug", "subset": "hep-python", "id": 1,
        }
    ],
    "reward-bench-2": [
        {"id": "7", "prompt": "1+1?", "chosen": ["2"], "rejected": ["1", "3", "4"],
         "subset": "Math"},
        {"id": "ref:0", "prompt": "Name the sun.", "chosen": ["Sol"], "rejected": ["Mars", "Io"],
         "subset": "Ties"},
        {"id": "tied:0", "prompt": "Name a planet.", "chosen": ["Mars", "Venus", "Earth"],
         "rejected": ["Io", "Sol"], "subset": "Ties"},
    ],
    "rm-bench": [
        {"id": "chat/1", "prompt": "Who?", "chosen": ["c0", "c1", "c2"],
         "rejected": ["r0", "r1", "r2"], "domain": "chat"}
    ],
    "judge-bench": [
        {"pair_id": "x", "source": "mmlu-pro-law", "question": "Why?", "response_model": "gpt",
         "response_A": "wrong", "response_B": "right", "label": "B>A"},
        {"pair_id": "y", "source": "livebench-math", "question": "2?", "response_model": "gpt",
         "response_A": "two", "response_B": "three", "label": "A>B"},
    ],
    "hhh": [{"input": "Hi", "targets": {"choices": ["rude", "kind"], "labels": [0, 1]}}],
    "mt-bench": [
        VOTE | {"winner": "model_b", "turn": 1},
        VOTE | {"winner": "model_a", "turn": 1},
        VOTE | {"winner": "model_b", "turn": 1},
        VOTE | {"winner": "model_a", "turn": 2},
        VOTE | {"winner": "tie", "turn": 2},
    ],
    "ppe-human": [
        {"question_id": "q", "prompt": "P", "response_1": "one", "response_2": "two",
         "model_a": "A", "model_b": "B", "winner": "model_b", "language": "English"},
        {"question_id": "r", "prompt": "P", "response_1": "one", "response_2": "three",
         "model_a": "A", "model_b": "B", "winner": "tie (bothbad)", "language": "English"},
    ],
    "ppe-correctness": [
        {"question_id": "q", "prompt": "P", "response_1": "no", "response_2": "yes",
         "response_3": "nope", "scores": [0, 1, 0], "sampled_conflict_pairs": [[0, 1], [1, 2]],
         "model_name": "gemma"},
        {"question_id": "r", "prompt": "Q", "response_1": "a", "response_2": "b",
         "response_3": "c", "scores": [1, 1, 1], "sampled_conflict_pairs": [],
         "model_name": "gemma"},
    ],
    "ppe-best-of-k": [
        {"question_id": "q", "prompt": "P", "response_1": "no", "response_2": "yes",
         "response_3": "nope", "scores": [False, True, False], "model_name": "gemma"},
        {"question_id": "r", "prompt": "Q", "response_1": "a", "response_2": "b",
         "response_3": "a", "scores": [1, 0, 1], "model_name": "gemma"},
    ],
}  # fmt: skip


def read(tmp_path: Path, suite: str, rows: list[dict[str, Any]] | None = None) -> Dataset:
    path = tmp_path / f"{suite}.jsonl"
    given = ROWS[suite] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in given))
    return load([SourceSpec.model_validate({"suite": suite, "path": str(path)})])


def pairs_of(dataset: Dataset) -> list[tuple[Any, ...]]:
    """subset, chosen, rejected, chosen_model, rejected_model, row"""
    texts = dataset.responses["response"]
    return [
        (subset, texts[chosen], texts[rejected], *rest)
        for subset, chosen, rejected, *rest in dataset.pairs.select(
            "subset", "chosen", "rejected", "chosen_model", "rejected_model", "row"
        ).rows()
    ]


def refused(tmp_path: Path, suite: str, rows: list[dict[str, Any]]) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, suite, rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_of_suites_are_unique() -> None:
    assert len(SUITES) == len(MODULES)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_read_into_its_own_split_and_can_be_scored(
    tmp_path: Path, suite: str
) -> None:
    dataset = read(tmp_path, suite)
    assert {*dataset.pairs["split"], *dataset.members["split"]} == {f"ood/{suite}"}
    assert dataset.rules["sources"][0]["suite"] == suite
    if SUITES[suite].groups:
        found = scoring.score_suite(suite, dataset.members.with_columns(score=pl.col("gold")), 20)
        assert found["estimate"][0] == 1.0
        return
    scored = dataset.pairs.with_columns(scores_chosen=pl.lit(1.0), scores_rejected=pl.lit(0.0))
    found = scoring.score_suite(suite, scored, 20)
    right = dict(zip(found["score"], found["estimate"], strict=True))
    expected = 3 / 4 if suite == "mt-bench" else 1.0  # one of four votes is against its pair
    assert right["accuracy of pairs, ties apart"] == pytest.approx(expected)


def test_reward_bench_rows_become_pairs_unchanged(tmp_path: Path) -> None:
    pairs = pairs_of(read(tmp_path, "reward-bench"))
    assert pairs == [("hep-python", "sorted()", "no", "human", "bug", 0)]


def test_every_response_of_a_reward_bench_2_item_is_in_a_pair(tmp_path: Path) -> None:
    assert pairs_of(read(tmp_path, "reward-bench-2")) == [
        ("Math", "2", "1", None, "of 3 pairs", 0),
        ("Math", "2", "3", None, "of 3 pairs", 0),
        ("Math", "2", "4", None, "of 3 pairs", 0),
        ("Ties", "Sol", "Mars", "ref:0", "of 2 pairs", 1),
        ("Ties", "Sol", "Io", "ref:0", "of 2 pairs", 1),
        ("Ties", "Mars", "Io", "tied:0", "of 3 pairs", 2),
        ("Ties", "Venus", "Sol", "tied:0", "of 3 pairs", 2),
        ("Ties", "Earth", "Io", "tied:0", "of 3 pairs", 2),
    ]


def test_rm_bench_reads_lists_of_styles_and_one_pair_per_row_alike(tmp_path: Path) -> None:
    lists = pairs_of(read(tmp_path, "rm-bench"))
    assert len(lists) == 9
    assert lists[5] == ("chat", "c1", "r2", "detailed", "markdown", 0)
    flat = [
        {"prompt": "Who?", "chosen": f"c{i}", "rejected": f"r{j}", "domain": "chat",
         "subset": "alpacaeval", "chosen_style": i, "rejected_style": j}
        for i in range(3) for j in range(3)
    ]  # fmt: skip
    assert [pair[:5] for pair in pairs_of(read(tmp_path, "rm-bench", flat))] == [
        pair[:5] for pair in lists
    ]


def test_rm_bench_counts_a_text_shared_by_two_styles_in_both_cells(tmp_path: Path) -> None:
    row = ROWS["rm-bench"][0] | {"chosen": ["c0", "c1", "c1"]}
    dataset = read(tmp_path, "rm-bench", [row])
    assert dataset.exclusions.is_empty()
    assert [pair[1:5] for pair in pairs_of(dataset)][3:5] == [
        ("c1", "r0", "detailed+markdown", "concise"),
        ("c1", "r1", "detailed+markdown", "detailed"),
    ]
    scored = dataset.pairs.with_columns(
        scores_chosen=pl.Series([0.0, 0.0, 0.0, 1.0, 1.0, 0.0]), scores_rejected=pl.lit(0.5)
    )
    found = scoring.score_suite("rm-bench", scored, 20)
    right = dict(zip(found["score"], found["estimate"], strict=True))
    assert right["chat hard"] == pytest.approx(0.0)
    assert right["chat normal"] == pytest.approx(1 / 3)  # detailed/detailed
    assert right["chat easy"] == pytest.approx(1.0)  # c1 twice against r0, once against r1


def test_judge_bench_labels_name_the_better_response(tmp_path: Path) -> None:
    assert pairs_of(read(tmp_path, "judge-bench")) == [
        ("Knowledge", "right", "wrong", "B", "A", 0),
        ("Math", "two", "three", "A", "B", 1),
    ]


def test_hhh_takes_its_subset_from_the_config_and_from_a_column(tmp_path: Path) -> None:
    assert pairs_of(read(tmp_path, "hhh"))[0][:3] == ("hhh", "kind", "rude")
    row = {"prompt": "Hi", "chosen": "kind", "rejected": "rude", "subset": "harmless"}
    assert pairs_of(read(tmp_path, "hhh", [row]))[0][:3] == ("harmless", "kind", "rude")


def test_mt_bench_counts_votes_and_lists_ties(tmp_path: Path) -> None:
    dataset = read(tmp_path, "mt-bench")
    columns = ("subset", "chosen_model", "rejected_model", "label", "weight", "row")
    assert dataset.pairs.select(columns).rows() == [
        ("turn 1", "B", "A", pytest.approx(2 / 3), 3.0, 0),
        ("turn 2", "A", "B", 1.0, 1.0, 3),
    ]
    assert dataset.pairs["prompt_id"].n_unique() == 1
    first, second = (json.loads(dataset.responses["response"][i]) for i in dataset.pairs["chosen"])
    assert [message["content"] for message in first] == ["b 1"]
    assert [message["content"] for message in second] == ["a 1", "Again.", "a 2"]
    assert dataset.exclusions.select("row", "reason").rows() == [(4, "no_preference")]


def test_mt_bench_votes_do_not_depend_on_their_order(tmp_path: Path) -> None:
    row = {"prompt": "P", "chosen": "x", "rejected": "y", "chosen_gen": "X", "rejected_gen": "Y"}
    other = {"prompt": "P", "chosen": "y", "rejected": "x", "chosen_gen": "Y", "rejected_gen": "X"}
    for votes in ([row, row, other], [other, row, row], [row, other, row]):
        dataset = read(tmp_path, "mt-bench", votes)
        assert pairs_of(dataset)[0][:5] == ("turn 1", "x", "y", "X", "Y")
        assert dataset.pairs.select("label", "weight").rows() == [(pytest.approx(2 / 3), 3.0)]


def test_ppe_takes_the_winner_and_the_sampled_pairs(tmp_path: Path) -> None:
    human = read(tmp_path, "ppe-human")
    assert pairs_of(human) == [("English", "two", "one", "B", "A", 0)]
    assert human.reason_counts() == {"no_preference": 1}
    correct = read(tmp_path, "ppe-correctness")
    assert [pair[1:4] for pair in pairs_of(correct)] == [
        ("yes", "no", "gemma"),
        ("yes", "nope", "gemma"),
    ]


def test_ppe_best_of_k_reads_every_sample_with_its_correctness(tmp_path: Path) -> None:
    dataset = read(tmp_path, "ppe-best-of-k")
    texts = dataset.responses["response"].gather(dataset.members["response"])
    assert dataset.members.with_columns(text=texts).select(
        "subset", "text", "gold", "model", "row"
    ).rows() == [
        ("ppe-best-of-k", "no", 0.0, "gemma", 0),
        ("ppe-best-of-k", "yes", 1.0, "gemma", 0),
        ("ppe-best-of-k", "nope", 0.0, "gemma", 0),
        ("ppe-best-of-k", "a", 1.0, "gemma", 1),
        ("ppe-best-of-k", "b", 0.0, "gemma", 1),
        ("ppe-best-of-k", "a", 1.0, "gemma", 1),
    ]
    assert dataset.pairs.is_empty()
    assert dataset.reason_counts() == {}
    some = SourceSpec.model_validate(
        {
            "suite": "ppe-best-of-k",
            "path": str(tmp_path / "ppe-best-of-k.jsonl"),
            "pairs": {"per_prompt": 1},
        }
    )
    assert load([some]).pairs.height == 2


@pytest.mark.parametrize(
    ("place", "subset"),
    [
        ("PPE-MATH-Best-of-K.jsonl", "MATH"),
        ("PPE-MATH-Best-of-K/train.jsonl", "MATH"),
        ("datasets--me--PPE-MMLU-Pro-Best-of-K/snapshots/0f/data/train-0.jsonl", "MMLU-Pro"),
        ("PPE-MATH-Best-of-K/PPE-GPQA-Best-of-K.jsonl", "GPQA"),
        ("own/train.jsonl", "train"),
    ],
)
def test_a_local_copy_of_a_ppe_benchmark_is_named_by_its_path(
    tmp_path: Path, place: str, subset: str
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS["ppe-correctness"]))
    for suite in ("ppe-best-of-k", "ppe-correctness"):
        dataset = load([SourceSpec.model_validate({"suite": suite, "path": str(path)})])
        found = dataset.members if suite == "ppe-best-of-k" else dataset.pairs
        assert set(found["subset"]) == {subset}


# Where suites come from.


def test_a_suite_alone_is_read_from_where_it_is_published() -> None:
    spec = SourceSpec.model_validate({"suite": "reward-bench"})
    assert (spec.hub, spec.hub_split, spec.split) == (
        "allenai/reward-bench", "filtered", "ood/reward-bench",
    )  # fmt: skip
    other = SourceSpec.model_validate({"suite": "rm-bench", "hub": "me/copy", "split": "test"})
    assert (other.hub, other.hub_split, other.split) == ("me/copy", None, "test")
    for given in (spec, other):
        assert SourceSpec.model_validate(given.model_dump(mode="json")) == given


def test_the_command_line_names_suites(tmp_path: Path) -> None:
    path = tmp_path / "rm.json"
    path.write_text(json.dumps(ROWS["rm-bench"]))
    local = parse_source(f"rm-bench@{path}")
    assert (local.suite, local.path, local.split) == ("rm-bench", str(path), "ood/rm-bench")
    assert load([local]).pairs.height == 9
    named = parse_source("test=hhh")
    assert (named.suite, named.hub, named.split) == ("hhh", SUITES["hhh"].hub, "test")
    hub = parse_source("ppe-correctness@lmarena-ai/PPE-MATH-Best-of-K")
    assert (hub.suite, hub.hub) == ("ppe-correctness", "lmarena-ai/PPE-MATH-Best-of-K")


def test_a_source_without_suite_records_no_suite() -> None:
    assert "suite" not in SourceSpec(path="x.jsonl").model_dump(mode="json")


def test_the_hub_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ROWS["ppe-correctness"]
    wanted: dict[str, object] = {}

    class Part:
        column_names = tuple(rows[0])
        num_rows = len(rows)

        def select_columns(self, names: list[str]) -> "Part":
            self.names = names
            return self

        def to_dict(self) -> dict[str, list[Any]]:
            return {name: [row[name] for row in rows] for name in self.names}

    def load_dataset(hub: str, **keys: object) -> Part:
        wanted.update(keys, hub=hub)
        return Part()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    values = {
        "suite": "ppe-correctness", "hub": "lmarena-ai/PPE-MATH-Best-of-K", "hub_split": "train",
    }  # fmt: skip
    dataset = load([SourceSpec.model_validate(values)])
    assert [pair[0] for pair in pairs_of(dataset)] == ["MATH", "MATH"]
    assert wanted["hub"] == "lmarena-ai/PPE-MATH-Best-of-K"


# Errors, each of one line.


@pytest.mark.parametrize("suite", SUITES)
def test_a_missing_column_is_named_beside_the_columns_found(tmp_path: Path, suite: str) -> None:
    for column in SUITES[suite].layouts[-1 if suite == "rm-bench" else 0].needs:
        rows = [{name: row[name] for name in row if name != column} for row in ROWS[suite]]
        message = refused(tmp_path, suite, rows)
        assert f"not the layout of suite {suite!r}" in message
        assert f"no column {column!r} in" in message


@pytest.mark.parametrize(
    ("suite", "change", "word"),
    [
        ("reward-bench-2", {"chosen": ["2", "two"]}, "2 chosen responses"),
        ("reward-bench-2", {"rejected": []}, "rejected [] is not a list"),
        ("rm-bench", {"chosen": ["a", "b"]}, "not a list of 3"),
        ("rm-bench", {"rejected": "text"}, "rejected 'text' is not a list of 3"),
        ("rm-bench", {"chosen_style": 3, "rejected_style": 0}, "not 0, 1 or 2"),
        ("judge-bench", {"label": "A=B"}, "'A=B' is neither"),
        ("judge-bench", {"source": "trivia"}, "source 'trivia'"),
        ("hhh", {"targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "not two choices"),
        ("hhh", {"targets": "x"}, "not two choices"),
        ("mt-bench", {"turn": 3}, "turn 3 is neither"),
        ("mt-bench", {"winner": "gpt"}, "winner 'gpt' is not model_a"),
        ("ppe-human", {"winner": None}, "winner 'None' is not model_a"),
        ("ppe-correctness", {"sampled_conflict_pairs": [[0, 9]]}, "pair [0, 9] is not two"),
        ("ppe-correctness", {"sampled_conflict_pairs": [[0, 2]]}, "equal scores"),
        ("ppe-correctness", {"sampled_conflict_pairs": [0, 1]}, "int"),
        ("ppe-correctness", {"scores": [None, 1, 0]}, "None"),
        ("ppe-best-of-k", {"scores": [0, 1, 0, 1]}, "sample 4 has no text"),
        ("ppe-best-of-k", {"scores": [0, 1, -1]}, "score -1 is not in 0 … 1"),
        ("ppe-best-of-k", {"scores": [0, 1, float("nan")]}, "score nan is not in 0 … 1"),
        ("ppe-best-of-k", {"scores": "010"}, "scores '010' is not a list"),
    ],
)
def test_a_row_that_does_not_fit_the_layout_is_named(
    tmp_path: Path, suite: str, change: dict[str, Any], word: str
) -> None:
    message = refused(tmp_path, suite, [ROWS[suite][0] | change])
    assert f"row 1 does not fit suite {suite!r}" in message
    assert word in message


def test_other_mistakes_are_refused(tmp_path: Path) -> None:
    ties = [row | {"winner": "tie"} for row in ROWS["ppe-human"]]
    assert "no row gives a pair" in refused(tmp_path, "ppe-human", ties)
    for values, word in (
        ({"suite": "rewardbench"}, "did you mean 'reward-bench'"),
        ({"suite": "hhh", "columns": {"prompt": "input"}}, "a suite knows its columns"),
        ({"suite": "hhh", "path": "x.json", "hub": "a/b"}, "either path or hub"),
    ):
        with pytest.raises(UserError, match=word):
            SourceSpec.parse(values, "spec.toml")


# Real data.


def test_real_suites_load_and_count_right(shared: Path) -> None:
    data = shared / "data"
    sources = [
        SourceSpec.model_validate({"suite": suite, "path": str(data / path)})
        for suite, path in (
            ("rm-bench", "rm_bench/pairs.parquet"),
            ("hhh", "hhh_alignment/pairs.parquet"),
            ("mt-bench", "mt_bench_human/pairs_turn1.parquet"),
            ("mt-bench", "mt_bench_human/pairs_turn2.parquet"),
        )
    ]
    dataset = load(sources)
    rm, hhh, mt = (
        dataset.pairs.filter(pl.col("split") == f"ood/{suite}")
        for suite in ("rm-bench", "hhh", "mt-bench")
    )
    styles = rm.select(
        pl.col("chosen_model").str.count_matches(r"\+") + 1,
        pl.col("rejected_model").str.count_matches(r"\+") + 1,
    )
    assert (styles["chosen_model"] * styles["rejected_model"]).sum() == 7182
    assert dataset.exclusions.filter(pl.col("split") == "ood/rm-bench").is_empty()
    assert set(rm["subset"]) == {"chat", "code", "safety-refuse", "safety-response"}
    assert hhh.height == 221
    assert dict(hhh.group_by("subset").len().rows()).keys() == {
        "harmless", "helpful", "honest", "other",
    }  # fmt: skip
    votes = dict(mt.group_by("subset").agg(pl.col("weight").sum()).rows())
    # Three pairs, of five votes, have an empty response or two that are the same.
    assert votes == {"turn 1": 662.0 - 5, "turn 2": 672.0}
    assert dict(mt.group_by("subset").agg(pl.col("label").min()).rows())["turn 2"] == 0.5
    assert mt.filter(pl.col("subset") == "turn 1")["prompt_id"].n_unique() == 80
    lengths = dataset.responses["response"].str.len_chars()
    for suite, pairs, expected in (("rm-bench", rm, 0.47), ("hhh", hhh, 0.63)):
        scored = pairs.with_columns(
            scores_chosen=lengths.gather(pairs["chosen"]).cast(pl.Float64),
            scores_rejected=lengths.gather(pairs["rejected"]).cast(pl.Float64),
        )
        found = scoring.score_suite(suite, scored, 20)
        right = dict(zip(found["score"], found["estimate"], strict=True))
        assert right["accuracy of pairs, ties apart"] == pytest.approx(expected, abs=0.01)
