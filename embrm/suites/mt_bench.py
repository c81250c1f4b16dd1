"""MT-Bench's human judgements (arXiv 2306.05685)."""

from collections.abc import Iterator, Sequence

from embrm.core.text import quoted
from embrm.suites.accuracies import of_cells, pooled
from embrm.suites.rows import GENERATORS, TRIO, list_of, pair_row, swapped, winner_of
from embrm.suites.suite import Layout, Row, Suite


def _votes_of_row(row: Row) -> Iterator[Row]:
    """Both turns of a conversation are stored beside a vote on the first one alone."""
    if row["turn"] not in (1, 2):
        raise ValueError(f"turn {quoted(row['turn'])} is neither 1 nor 2")
    sides = [list_of(row, f"conversation_{side}", 4)[: 2 * row["turn"]] for side in "ab"]
    better = winner_of(row)
    if better is not None:
        models = row["model_a"], row["model_b"]
        yield {
            "chosen": sides[better],
            "rejected": sides[1 - better],
            "subset": f"turn {row['turn']}",
            "chosen_model": models[better],
            "rejected_model": models[1 - better],
        }


def _turn_1(row: Row) -> Iterator[Row]:
    models = row.get("chosen_gen"), row.get("rejected_gen")
    yield pair_row(row["prompt"], (row["chosen"], row["rejected"]), "turn 1", models)


def _turn_2(row: Row) -> Iterator[Row]:
    yield {
        "chosen": row["chosen_conversation"],
        "rejected": row["rejected_conversation"],
        "subset": "turn 2",
        "chosen_model": row.get("chosen_gen"),
        "rejected_model": row.get("rejected_gen"),
    }


def _votes(votes: Sequence[Row]) -> Row:
    """chosen is what most votes prefer, label their share, weight the number of votes."""
    first, total = sum(vote["chosen"] == votes[0]["chosen"] for vote in votes), len(votes)
    pair = votes[0] if 2 * first >= total else swapped(votes[0])
    return pair | {"label": max(first, total - first) / total, "weight": total}


SUITE = Suite(
    name="mt-bench",
    hub="lmsys/mt_bench_human_judgments",
    hub_split="human",
    layouts=(
        Layout(
            ("model_a", "model_b", "winner", "conversation_a", "conversation_b", "turn"),
            (),
            _votes_of_row,
        ),
        Layout(TRIO, GENERATORS, _turn_1),
        Layout(("chosen_conversation", "rejected_conversation"), GENERATORS, _turn_2),
    ),
    scores=of_cells(pooled),
    main=("accuracy",),
    merge=_votes,
    needs=("label", "weight"),
)
