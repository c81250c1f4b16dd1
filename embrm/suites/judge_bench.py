"""JudgeBench (Tan et al. 2024, arXiv 2410.12784): pairs of a correct and an incorrect response.

Scores: the accuracy over all pairs, and that of each category (knowledge, reasoning, math, coding).
Every pair is scored once, since a reward does not depend on the order of the two responses.
"""

from collections.abc import Iterator

from embrm.core.text import quoted
from embrm.suites.accuracies import pooled, scorer_of_cells
from embrm.suites.rows import pair_row
from embrm.suites.suite import Layout, Row, Suite

_CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""Beginning of a pair's `source` → its category."""


def _rows(row: Row) -> Iterator[Row]:
    category = next(
        (name for start, name in _CATEGORIES.items() if str(row["source"]).startswith(start)), None
    )
    if category is None:
        raise ValueError(
            f"source {quoted(row['source'])} does not begin with {' or '.join(_CATEGORIES)}"
        )
    if row["label"] not in ("A>B", "B>A"):
        raise ValueError(f"label {quoted(row['label'])} is neither 'A>B' nor 'B>A'")
    texts = row["response_A"], row["response_B"]
    model = row.get("response_model")
    yield pair_row(
        row["question"], texts if row["label"] == "A>B" else texts[::-1], category, (model, model)
    )


SUITE = Suite(
    name="judge-bench",
    hub="ScalerLab/JudgeBench",
    hub_split="gpt",
    layouts=(
        Layout(
            ("question", "response_A", "response_B", "label", "source"), ("response_model",), _rows
        ),
    ),
    scores=scorer_of_cells(pooled),
    main=("accuracy",),
)
