"""JudgeBench (arXiv 2410.12784)."""

from collections.abc import Iterator

from embrm.core.text import quoted
from embrm.suites.accuracies import of_cells, pooled
from embrm.suites.rows import pair_row
from embrm.suites.suite import Layout, Row, Suite

_CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
"""JudgeBench's sources by the beginning of their names."""


def _rows(row: Row) -> Iterator[Row]:
    category = next(
        (name for start, name in _CATEGORIES.items() if str(row["source"]).startswith(start)), None
    )
    if category is None:
        raise ValueError(f"source {quoted(row['source'])} begins with none of {[*_CATEGORIES]}")
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
    scores=of_cells(pooled),
    main=("accuracy",),
)
