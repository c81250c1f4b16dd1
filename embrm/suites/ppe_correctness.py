"""PPE's correctness benchmarks (Frick et al. 2024, arXiv 2410.14872) as pairs of a correct and a
wrong response to one question, those sampled in the files' `sampled_conflict_pairs`.

Scores: the accuracy of each benchmark (a subset here), their unweighted mean, and the accuracy over
all pairs.
"""

from collections.abc import Iterator

from embrm.core.text import quoted
from embrm.suites.accuracies import pooled_and_mean, scorer_of_cells
from embrm.suites.rows import FAILED, list_of, pair_row
from embrm.suites.suite import Layout, Row, Suite


def _rows(row: Row) -> Iterator[Row]:
    scores = list_of(row, "scores")
    model = row.get("model_name")
    for pair in row["sampled_conflict_pairs"] or ():
        if not (len(pair) == 2 and all(0 <= end < len(scores) for end in pair)):
            raise ValueError(
                f"sampled pair {quoted(pair)} is not two numbers of its {len(scores)} responses"
            )
        better, worse = sorted(pair, key=lambda end: -float(scores[end]))
        texts = tuple(row.get(f"response_{end + 1}") for end in (better, worse))
        if scores[better] == scores[worse] or None in texts:
            raise ValueError(
                f"sampled pair {quoted(pair)} has equal scores, or one of its responses is missing"
            )
        yield pair_row(row["prompt"], texts, None, (model, model))


SUITE = Suite(
    name="ppe-correctness",
    hub="lmarena-ai/PPE-MMLU-Pro-Best-of-K",
    hub_split="train",
    layouts=(
        Layout(("prompt", "scores", "sampled_conflict_pairs"), ("response_", "model_name"), _rows),
    ),
    scores=scorer_of_cells(pooled_and_mean),
    main=("mean of subsets", "accuracy"),
    failed=FAILED,
)
