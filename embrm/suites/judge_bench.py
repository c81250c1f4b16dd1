"""JudgeBench (Tan et al. 2024, arXiv 2410.12784): pairs of a correct and an incorrect response.

Scores: the accuracy over all pairs, and that of each category (knowledge, reasoning, math, coding).
The tool judges a pair in both orders by default, and reads equal rewards as "B>A" in each, so that
over both orders a tie is never correct: "accuracy". In one order (its option --single_game) a tie
is correct where the label is "B>A": "accuracy, one order".
"""

from collections.abc import Iterator

import polars as pl

from embrm.core.text import quoted
from embrm.suites.accuracies import pooled, scorer_of_cells
from embrm.suites.cells import Cells, Formula, terms
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
    texts, places = (row["response_A"], row["response_B"]), ("A", "B")
    if row["label"] == "B>A":
        texts, places = texts[::-1], places[::-1]
    yield pair_row(row["question"], texts, category, places)


def _cells(pairs: pl.DataFrame) -> Cells:
    found = pooled(pairs)
    names: dict[str, Formula] = {"accuracy": {}}
    names |= {name: {} for name in sorted(set(pairs["subset"])) if name}
    one_order = {f"{name}, one order": formula for name, formula in names.items()}
    parts = [found.terms]
    if "chosen_model" in pairs.columns and set(pairs["chosen_model"]) <= {"A", "B"}:
        second = (pl.col("chosen_model") == "B") & (pl.col("tied") == 1)
        right = pl.when(second).then(1.0).otherwise("right")
        one_order = {name: {name: 1.0} for name in one_order}
        parts.append(terms(pairs, cell=pl.lit("accuracy, one order"), value=right))
        if any(pairs["subset"]):
            cell = pl.format("{}, one order", "subset")
            parts.append(terms(pairs, cell=cell, value=right))
    return Cells(pl.concat(parts), found.scores | one_order)


SUITE = Suite(
    name="judge-bench",
    hub="ScalerLab/JudgeBench",
    hub_split="gpt",
    layouts=(Layout(("question", "response_A", "response_B", "label", "source"), (), _rows),),
    scores=scorer_of_cells(_cells),
    main=("accuracy", "accuracy, one order"),
)
