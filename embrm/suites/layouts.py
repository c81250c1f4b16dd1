"""Suites: published benchmarks in the layouts they come in, as rows of pairs or of groups.

What a suite's score needs beyond texts goes into fields that every pair has: `subset` is what the
suite averages over, and `chosen_model` and `rejected_model` tell apart what made the responses: a
model, RM-Bench's styles, or the id of an item of RewardBench 2's Ties.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embrm.core.errors import UserError
from embrm.core.text import listed, quoted

Row = dict[str, Any]
Columns = dict[str, list[Any]]

_STYLES = ("concise", "detailed", "markdown")
"""Of RM-Bench, in the order of its lists."""

_CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""JudgeBench's sources by the beginning of their names."""

_WINNERS = {"model_a": 0, "model_b": 1}

_TURNED = {"chosen": "rejected", "rejected": "chosen"}

_TRIO = ("prompt", "chosen", "rejected")
_MODELS = ("chosen_model", "rejected_model")
_GENERATORS = ("chosen_gen", "rejected_gen")


@dataclass(frozen=True)
class Layout:
    """needs: columns it is known by; also: those it uses where they are there; a name that ends in
    "_" stands for all that begin so. rows: from a row of the file to rows of pairs, or to the
    members of a group, subset None where it names none; ValueError for a row that does not fit."""

    needs: tuple[str, ...]
    also: tuple[str, ...]
    rows: Callable[[Row], Iterable[Row]]

    def columns(self, found: Sequence[str]) -> list[str]:
        """The columns it reads."""
        families = tuple(name for name in self.also if name.endswith("_"))
        return [
            name
            for name in found
            if name in self.needs or name in self.also or name.startswith(families or ("\0",))
        ]


@dataclass(frozen=True)
class Suite:
    """hub: where it is published, and which split of it is scored. merge: of rows of pairs that
    have the same texts, which a dataset holds once, makes one. groups: whether its rows are of
    groups, whose own metrics need no pairs."""

    hub: str
    hub_split: str | None
    layouts: tuple[Layout, ...]
    merge: Callable[[Sequence[Row]], Row] | None = None
    groups: bool = False


def layout_of(suite: str, name: str, found: Sequence[str]) -> Layout:
    """The layout of a file with the columns `found`. Raises: UserError where none fits."""
    layouts = SUITES[suite].layouts
    missing = {layout: [need for need in layout.needs if need not in found] for layout in layouts}
    closest = min(layouts, key=lambda layout: len(missing[layout]))
    if missing[closest]:
        raise UserError(
            f"{name}: not the layout of suite {suite!r}, which has {', '.join(closest.needs)}: "
            f"no column {missing[closest][0]!r} in {listed(found)}"
        )
    return closest


def arrange(
    suite: str, name: str, layout: Layout, raw: Columns, rows: Sequence[int], subset: str
) -> tuple[Columns, list[int], list[int]]:
    """Fields of pairs or members, the row of the file each is from, and the rows that give none:
    ties of votes, and groups where all responses are alike.

    subset: of those whose rows name none.
    Raises: UserError naming a row that does not fit the layout, or when no row gives a pair.
    """
    made: list[tuple[int, Row]] = []
    undecided = []
    for index, row in enumerate(rows):
        try:
            found = list(layout.rows({column: raw[column][index] for column in raw}))
        except (ValueError, TypeError) as error:  # a value of another type than the layout has
            raise UserError(
                f"{name}: row {row + 1} is not of suite {suite!r}: {error}: "
                "check the file, or read it without suite"
            ) from None
        made += [
            (row, one | {"subset": subset if one["subset"] is None else one["subset"]})
            for one in found
        ]
        if not found:
            undecided.append(row)
    merge = SUITES[suite].merge
    if merge:
        same: dict[str, list[tuple[int, Row]]] = {}
        for row, pair in made:
            same.setdefault(_texts(pair), []).append((row, pair))
        made = [(alike[0][0], merge([pair for _, pair in alike])) for alike in same.values()]
    if not made:
        raise UserError(f"{name}: every row is a tie, so there is no pair: name another split")
    columns = {field: [pair[field] for _, pair in made] for field in made[0][1]}
    return columns, [row for row, _ in made], undecided


def _texts(pair: Row) -> str:
    """What two rows of one pair have in common, whichever response either prefers."""
    sides = sorted(json.dumps(pair[side], sort_keys=True) for side in _TURNED)
    return json.dumps([pair["subset"], pair.get("prompt"), sides])


def _votes(votes: Sequence[Row]) -> Row:
    """chosen is what most votes prefer, label their share, weight the number of votes."""
    first, total = sum(vote["chosen"] == votes[0]["chosen"] for vote in votes), len(votes)
    pair = votes[0] if 2 * first >= total else _turned(votes[0])
    return pair | {"label": max(first, total - first) / total, "weight": total}


def _styles_joined(pairs: Sequence[Row]) -> Row:
    """A response that has the same text in two styles is of both: "detailed+markdown"."""
    joined = {
        field: "+".join(style for style in _STYLES if style in {pair[field] for pair in pairs})
        for field in _MODELS
    }
    return pairs[0] | joined


def _turned(pair: Row) -> Row:
    """The same pair with its sides exchanged, and what is known of them."""
    sides = {field: field.split("_")[0] for field in pair}
    return {
        field: pair[field.replace(side, _TURNED[side])] if side in _TURNED else pair[field]
        for field, side in sides.items()
    }


# Layouts: from a row of the file to rows of pairs.


def _plain(row: Row) -> Iterator[Row]:
    models = {name: row.get(name) for name in _MODELS}
    yield {field: row[field] for field in (*_TRIO, "subset")} | models


def _reward_bench_2(row: Row) -> Iterator[Row]:
    """Each rejected response against the chosen one. Of Ties, as few pairs as show every response
    once: its formula needs the rewards of all, but not all against all."""
    correct, wrong = _list(row, "chosen"), _list(row, "rejected")
    is_ties = str(row["subset"]).lower() == "ties"
    if len(correct) != 1 and not is_ties:
        raise ValueError(f"{len(correct)} chosen responses, and only Ties has more than one")
    identity = str(row["id"]) if is_ties else None
    for index in range(max(len(correct), len(wrong))):
        yield _pair(
            row["prompt"],
            (correct[index % len(correct)], wrong[index % len(wrong)]),
            "Ties" if is_ties else row["subset"],
            (identity, identity),
        )


def _rm_bench(row: Row) -> Iterator[Row]:
    chosen, rejected = _list(row, "chosen", 3), _list(row, "rejected", 3)
    for better, chosen_style in zip(chosen, _STYLES, strict=True):
        for worse, rejected_style in zip(rejected, _STYLES, strict=True):
            styles = chosen_style, rejected_style
            yield _pair(row["prompt"], (better, worse), row["domain"], styles)


def _rm_bench_pair(row: Row) -> Iterator[Row]:
    styles = row["chosen_style"], row["rejected_style"]
    numbers = [int(style) if str(style) in ("0", "1", "2") else None for style in styles]
    if None in numbers:
        raise ValueError(f"styles {quoted(styles)} are not 0, 1 or 2")
    first, second = (_STYLES[number or 0] for number in numbers)
    yield _pair(row["prompt"], (row["chosen"], row["rejected"]), row["domain"], (first, second))


def _judge_bench(row: Row) -> Iterator[Row]:
    category = next(
        (name for start, name in _CATEGORIES.items() if str(row["source"]).startswith(start)), None
    )
    if category is None:
        raise ValueError(f"source {quoted(row['source'])} begins with none of {[*_CATEGORIES]}")
    if row["label"] not in ("A>B", "B>A"):
        raise ValueError(f"label {quoted(row['label'])} is neither 'A>B' nor 'B>A'")
    texts = row["response_A"], row["response_B"]
    model = row.get("response_model")
    yield _pair(
        row["question"], texts if row["label"] == "A>B" else texts[::-1], category, (model, model)
    )


def _hhh(row: Row) -> Iterator[Row]:
    targets = row["targets"]
    whole = isinstance(targets, dict) and {"choices", "labels"} <= set(targets)
    if not whole or sorted(targets["labels"]) != [0, 1] or len(targets["choices"]) != 2:
        raise ValueError(f"targets {quoted(targets)} are not two choices labelled 1 and 0")
    best = targets["labels"].index(1)
    texts = targets["choices"][best], targets["choices"][1 - best]
    yield _pair(row["input"], texts, None, (None, None))


def _mt_bench(row: Row) -> Iterator[Row]:
    """Both turns of a conversation are stored beside a vote on the first one alone."""
    if row["turn"] not in (1, 2):
        raise ValueError(f"turn {quoted(row['turn'])} is neither 1 nor 2")
    sides = [_list(row, f"conversation_{side}", 4)[: 2 * row["turn"]] for side in "ab"]
    better = _winner(row)
    if better is not None:
        models = row["model_a"], row["model_b"]
        yield {
            "chosen": sides[better],
            "rejected": sides[1 - better],
            "subset": f"turn {row['turn']}",
            "chosen_model": models[better],
            "rejected_model": models[1 - better],
        }


def _mt_bench_turn_1(row: Row) -> Iterator[Row]:
    models = row.get("chosen_gen"), row.get("rejected_gen")
    yield _pair(row["prompt"], (row["chosen"], row["rejected"]), "turn 1", models)


def _mt_bench_turn_2(row: Row) -> Iterator[Row]:
    yield {
        "chosen": row["chosen_conversation"],
        "rejected": row["rejected_conversation"],
        "subset": "turn 2",
        "chosen_model": row.get("chosen_gen"),
        "rejected_model": row.get("rejected_gen"),
    }


def _ppe_human(row: Row) -> Iterator[Row]:
    better = _winner(row)
    if better is not None:
        texts = row["response_1"], row["response_2"]
        models = row.get("model_a"), row.get("model_b")
        yield _pair(
            row["prompt"],
            (texts[better], texts[1 - better]),
            row.get("language"),
            (models[better], models[1 - better]),
        )


def _ppe_correctness(row: Row) -> Iterator[Row]:
    scores = _list(row, "scores")
    model = row.get("model_name")
    for pair in row["sampled_conflict_pairs"] or ():
        if not (len(pair) == 2 and all(0 <= end < len(scores) for end in pair)):
            raise ValueError(f"pair {quoted(pair)} is not two of its {len(scores)} responses")
        better, worse = sorted(pair, key=lambda end: -float(scores[end]))
        texts = tuple(row.get(f"response_{end + 1}") for end in (better, worse))
        if scores[better] == scores[worse] or None in texts:
            raise ValueError(f"pair {quoted(pair)} has equal scores, or a response is missing")
        yield _pair(row["prompt"], texts, None, (model, model))


def _ppe_best_of_k(row: Row) -> Iterator[Row]:
    """Every sample of a question, with its correctness."""
    for place, score in enumerate(_list(row, "scores"), start=1):
        text = row.get(f"response_{place}")
        if text is None or not 0 <= float(score) <= 1:
            raise ValueError(
                f"sample {place}, of score {quoted(score)}, is no correct or wrong text"
            )
        yield {
            "prompt": row["prompt"],
            "response": text,
            "model": row.get("model_name"),
            "gold": float(score),
            "subset": None,
        }


def _pair(prompt: object, texts: Sequence[object], subset: object, models: Sequence[object]) -> Row:
    return {
        "prompt": prompt,
        "chosen": texts[0],
        "rejected": texts[1],
        "subset": subset,
        "chosen_model": models[0],
        "rejected_model": models[1],
    }


def _list(row: Row, column: str, count: int | None = None) -> list[Any]:
    value = row[column]
    if not isinstance(value, list) or not value or count not in (None, len(value)):
        raise ValueError(f"{column} {quoted(value)} is not a list of {count or 'some'}")
    return value


def _winner(row: Row) -> int | None:
    """0 or 1, None for a tie."""
    winner = str(row["winner"])
    if winner not in _WINNERS and not winner.startswith("tie"):
        raise ValueError(f"winner {quoted(winner)} is neither model_a, model_b nor a tie")
    return _WINNERS.get(winner)


SUITES: Mapping[str, Suite] = {
    "reward-bench": Suite(
        "allenai/reward-bench", "filtered", (Layout((*_TRIO, "subset"), _MODELS, _plain),)
    ),
    "reward-bench-2": Suite(
        "allenai/reward-bench-2", "test", (Layout((*_TRIO, "subset", "id"), (), _reward_bench_2),)
    ),
    "rm-bench": Suite(
        "THU-KEG/RM-Bench",
        "train",
        (
            Layout((*_TRIO, "domain", "chosen_style", "rejected_style"), (), _rm_bench_pair),
            Layout((*_TRIO, "domain"), (), _rm_bench),
        ),
        merge=_styles_joined,
    ),
    "judge-bench": Suite(
        "ScalerLab/JudgeBench",
        "gpt",
        (
            Layout(
                ("question", "response_A", "response_B", "label", "source"),
                ("response_model",),
                _judge_bench,
            ),
        ),
    ),
    "hhh": Suite(
        "HuggingFaceH4/hhh_alignment",
        "test",
        (Layout(("input", "targets"), (), _hhh), Layout((*_TRIO, "subset"), _MODELS, _plain)),
    ),
    "mt-bench": Suite(
        "lmsys/mt_bench_human_judgments",
        "human",
        (
            Layout(
                ("model_a", "model_b", "winner", "conversation_a", "conversation_b", "turn"),
                (),
                _mt_bench,
            ),
            Layout(_TRIO, _GENERATORS, _mt_bench_turn_1),
            Layout(("chosen_conversation", "rejected_conversation"), _GENERATORS, _mt_bench_turn_2),
        ),
        merge=_votes,
    ),
    "ppe-human": Suite(
        "lmarena-ai/PPE-Human-Preference-V1",
        "test",
        (
            Layout(
                ("prompt", "response_1", "response_2", "winner"),
                ("model_a", "model_b", "language"),
                _ppe_human,
            ),
        ),
    ),
    "ppe-correctness": Suite(
        "lmarena-ai/PPE-MMLU-Pro-Best-of-K",
        "train",
        (
            Layout(
                ("prompt", "scores", "sampled_conflict_pairs"),
                ("response_", "model_name"),
                _ppe_correctness,
            ),
        ),
    ),
    "ppe-best-of-k": Suite(
        "lmarena-ai/PPE-MMLU-Pro-Best-of-K",
        "train",
        (Layout(("prompt", "scores"), ("response_", "model_name"), _ppe_best_of_k),),
        groups=True,
    ),
}
"""Suite → where it is published and its layouts, the first that fits."""
