"""MT-Bench's human judgements (Zheng et al. 2023, arXiv 2306.05685): votes on pairs of responses.

Score: the agreement with single votes, Σ votes for the response with the higher reward / Σ votes,
over all pairs and by turn. Tied votes are left out; equal rewards agree with no vote. Votes on the
same two responses are one pair, whose label is the share of the majority.
"""

from collections.abc import Iterator, Sequence

from embrm.core.text import quoted
from embrm.suites.accuracies import pooled, scorer_of_cells
from embrm.suites.rows import GENERATORS, TRIO, list_of, pair_row, swapped, winner_of
from embrm.suites.suite import Layout, Row, Suite


def _votes_of_row(row: Row) -> Iterator[Row]:
    """Keep the turns voted on: a row holds both turns even where its vote is on the first."""
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
    """Merge votes on the same two responses: chosen is what most votes prefer, label the share of
    these votes, and weight the number of all votes."""
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
    scores=scorer_of_cells(pooled),
    main=("accuracy",),
    merge=_votes,
    needs=("label", "weight"),
)
