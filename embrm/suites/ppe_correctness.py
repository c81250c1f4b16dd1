"""PPE's correctness sets as pairs (arXiv 2410.14872)."""

from collections.abc import Iterator

from embrm.core.text import quoted
from embrm.suites.accuracies import of_cells, pooled_and_mean
from embrm.suites.rows import list_of, pair_row
from embrm.suites.suite import Layout, Row, Suite


def _rows(row: Row) -> Iterator[Row]:
    scores = list_of(row, "scores")
    model = row.get("model_name")
    for pair in row["sampled_conflict_pairs"] or ():
        if not (len(pair) == 2 and all(0 <= end < len(scores) for end in pair)):
            raise ValueError(f"pair {quoted(pair)} is not two of its {len(scores)} responses")
        better, worse = sorted(pair, key=lambda end: -float(scores[end]))
        texts = tuple(row.get(f"response_{end + 1}") for end in (better, worse))
        if scores[better] == scores[worse] or None in texts:
            raise ValueError(f"pair {quoted(pair)} has equal scores, or a response is missing")
        yield pair_row(row["prompt"], texts, None, (model, model))


SUITE = Suite(
    name="ppe-correctness",
    hub="lmarena-ai/PPE-MMLU-Pro-Best-of-K",
    hub_split="train",
    layouts=(
        Layout(("prompt", "scores", "sampled_conflict_pairs"), ("response_", "model_name"), _rows),
    ),
    scores=of_cells(pooled_and_mean),
    main=("mean of subsets", "accuracy"),
)
