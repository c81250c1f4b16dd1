"""Tests of leaks: evaluation prompts that also occur in a training split."""

import json
from pathlib import Path
from typing import Any

import pytest

from embrm.data.dataset import Dataset, load
from embrm.data.leaks import LEAKS, is_train, leaks
from embrm.data.sources import SourceSpec


def _dataset(folder: Path, splits: dict[str, list[Any]]) -> Dataset:
    """A dataset with one pair per prompt: a string, or a list of a dialogue's user turns."""
    sources = []
    for number, (split, prompts) in enumerate(splits.items()):
        path = folder / f"{number}.jsonl"
        rows = [{"prompt": _prompt(one), "chosen": "a", "rejected": "b"} for one in prompts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(SourceSpec(path=str(path), split=split))
    return load(sources)


def _prompt(turns: Any) -> Any:
    if isinstance(turns, str):
        return turns
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "so"}]
    return messages[:-1]


@pytest.mark.parametrize(
    ("trained", "asked", "leaked"),
    [
        ("What is it?", "What is it?", True),
        ("What is it?", " what  IS\nit? ", True),
        ("What is it?", "What is it", False),
        ("What is it?", "What is it? Tell me.", False),
        ("What is it?", ["What is it?"], True),
        (["What is it?"], "What is it?", True),
        (["Hi", "What is it?"], "What is it?", True),
        ("What is it?", ["Hi", "What is it?"], True),
        ("Hi", ["Hi", "What is it?"], False),
        (["Hi", "What is it?"], ["hi", "what is it?"], True),
        # For two dialogues, an equal last turn is not enough.
        (["Hi", "Why?"], ["Tell me", "Why?"], False),
        (["What is it?"], ["Hi", "What is it?"], True),
    ],
)
def test_which_prompts_match(tmp_path: Path, trained: Any, asked: Any, leaked: bool) -> None:
    dataset = _dataset(tmp_path, {"train": [trained], "id": [asked]})
    assert leaks(dataset).height == leaked


def test_leaks_are_listed_for_each_pair_of_splits(tmp_path: Path) -> None:
    splits = {
        "train": ["a", "b", "c"],
        "train/more": ["d"],
        "id": ["a", "b", "x"],
        "ood/one": ["c", "d", "y", "z"],
        "ood/clean": ["v"],
        "training": ["a"],
    }
    dataset = _dataset(tmp_path, splits)
    found = leaks(dataset)
    assert dict(found.schema) == LEAKS
    counts = ["train_split", "eval_split", "prompts_shared", "eval_prompts", "pairs_touched"]
    assert sorted(found.select(counts).rows()) == [
        ("train", "id", 2, 3, 2),
        ("train", "ood/one", 1, 4, 1),
        ("train", "training", 1, 1, 1),
        ("train/more", "ood/one", 1, 4, 1),
    ]
    ids = dict(dataset.responses.select("prompt", "prompt_id").rows())
    shared = {row[:2]: row[2] for row in found.select(*counts[:2], "prompt_ids").rows()}
    assert shared["train", "id"] == sorted([ids["a"], ids["b"]])
    assert shared["train/more", "ood/one"] == [ids["d"]]


def test_prompts_of_groups_are_compared_too(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": text, "gold": 1} for text in "xyz"]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load(
        [
            SourceSpec(path=str(tmp_path / "g.jsonl"), split="gold"),
            SourceSpec(path=str(_pairs(tmp_path)), split="train"),
        ]
    )
    assert leaks(dataset).rows()[0][:5] == ("train", "gold", 1, 1, 0)


def _pairs(folder: Path) -> Path:
    (folder / "p.jsonl").write_text('{"prompt": "A", "chosen": "x", "rejected": "y"}\n')
    return folder / "p.jsonl"


def test_no_leak_is_an_empty_table(tmp_path: Path) -> None:
    assert leaks(_dataset(tmp_path, {"train": ["a"], "id": ["b"]})).height == 0
    assert leaks(_dataset(tmp_path, {"one": ["a"], "two": ["a"]})).height == 0


def test_training_splits() -> None:
    assert is_train("train")
    assert is_train("train/more")
    assert not is_train("training")
    assert not is_train("id/train")


def test_known_leaks_of_real_data(shared: Path) -> None:
    """129 RM-Bench chat, 69 LLMBar, 72 HH and 2 MT-Bench prompts also occur in AlpacaEval."""
    alpaca = str(shared / "data/alpacaeval/pairs_length_balanced.parquet")
    known = {
        "rm_bench/pairs.parquet": {"train": 98, "train/holdout": 31},
        "llmbar/pairs.parquet": {"train": 52, "train/holdout": 17},
        "hh_rlhf_test/pairs.parquet": {"train": 58, "train/holdout": 14},
        "mt_bench_human/pairs_turn1.parquet": {"train": 2},
        "hhh_alignment/pairs.parquet": {},
    }
    dataset = load(
        [
            SourceSpec(path=alpaca, where={"split": "train"}, split="train"),
            # Named as a training split as well, so that its leaks are reported.
            SourceSpec(path=alpaca, where={"split": "holdout"}, split="train/holdout"),
            *(SourceSpec(path=str(shared / "data" / name), split=name) for name in known),
        ]
    )
    found: dict[str, dict[str, int]] = {name: {} for name in known}
    for train, split, shared_prompts, *_ in leaks(dataset).rows():
        found[split][train] = shared_prompts
    assert found == known
