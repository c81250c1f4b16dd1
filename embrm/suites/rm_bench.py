"""RM-Bench (Liu et al. 2024, arXiv 2410.16184): accuracy by the styles of the two responses.

Every item has a chosen and a rejected response in three styles, hence a 3-by-3 matrix of
accuracies A[chosen style, rejected style], with styles ordered from plain to fancy. Hard is the
mean of the three entries where the chosen response is plainer than the rejected one, Normal that of
the diagonal, Easy that of the other three. A total is the mean over these levels and over the
sections chat, code, math and safety. Safety has two halves, 284 items to refuse and 157 to answer:
    "total, safety pooled" pools their items, as the tool does;
    "mean of four sections" averages the two halves without weights.
RM-Bench's own script prints, for one file, each level over all its items: "LEVEL, all items
pooled". An item of which an entry of the matrix is missing is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from embrm.core.errors import UserError
from embrm.core.text import quoted
from embrm.suites.accuracies import (
    ALL,
    pair_terms,
    refuse_other_subsets,
    scorer_of_cells,
    tie_scores,
)
from embrm.suites.cells import Cells, Formula, mean_of, terms
from embrm.suites.items import Checked, whole_items
from embrm.suites.rows import MODELS, TRIO, list_of, pair_row
from embrm.suites.suite import Layout, Row, Suite

STYLES = ("concise", "detailed", "markdown")
"""RM-Bench's styles, from plain to fancy. The columns `chosen_model` and `rejected_model` hold
them, joined by "+" where a response has the same text in several styles."""

SECTIONS: dict[str, tuple[str, ...]] = {
    "chat": ("chat",),
    "code": ("code",),
    "math": ("math",),
    "safety": ("safety-refuse", "safety-response"),
}
"""Section → its domains."""

TOTAL = "total, safety pooled"
"""The mean of the four sections as the tool computes it."""


def _all_styles(row: Row) -> Iterator[Row]:
    chosen, rejected = list_of(row, "chosen", 3), list_of(row, "rejected", 3)
    for better, chosen_style in zip(chosen, STYLES, strict=True):
        for worse, rejected_style in zip(rejected, STYLES, strict=True):
            styles = chosen_style, rejected_style
            yield pair_row(row["prompt"], (better, worse), row["domain"], styles)


def _pair_of_styles(row: Row) -> Iterator[Row]:
    styles = row["chosen_style"], row["rejected_style"]
    numbers = [int(style) if str(style) in ("0", "1", "2") else None for style in styles]
    if None in numbers:
        raise ValueError(f"chosen_style, rejected_style = {quoted(styles)} are not 0, 1 or 2")
    first, second = (STYLES[number or 0] for number in numbers)
    yield pair_row(row["prompt"], (row["chosen"], row["rejected"]), row["domain"], (first, second))


def _styles_joined(pairs: Sequence[Row]) -> Row:
    """Merge pairs of the same texts, which differ in styles: "detailed+markdown" is both."""
    styles = {
        field: [style for style in STYLES if style in {pair[field] for pair in pairs}]
        for field in MODELS
    }
    entries = len(styles[MODELS[0]]) * len(styles[MODELS[1]])
    # The same item twice has every entry of the matrix twice: each pair counts double.
    joined = {field: "+".join(names) for field, names in styles.items()}
    return pairs[0] | joined | {"weight": len(pairs) / entries}


def _entries(pairs: pl.DataFrame) -> pl.DataFrame:
    """One row for every entry of the matrix that a pair belongs to."""
    several = pl.col("chosen_model", "rejected_model").cast(pl.String).str.split("+")
    cells = pairs.with_columns(several).explode("chosen_model").explode("rejected_model")
    styles = {*cells["chosen_model"], *cells["rejected_model"]} - set(STYLES)
    if styles:
        raise UserError(
            f"rm-bench: chosen_model or rejected_model is {str(styles.pop())[:60]!r}, not a style "
            f'({", ".join(STYLES)}): read the data with suite = "rm-bench"'
        )
    return cells


def _whole(pairs: pl.DataFrame) -> Checked:
    """Leave out prompts that do not have every entry of the matrix equally often. An item is known
    by its prompt, since one layout has a row for each of its pairs."""
    domains = [name for part in SECTIONS.values() for name in part]
    refuse_other_subsets("rm-bench", pairs["subset"], domains)
    weight = pl.col("weight") if "weight" in pairs.columns else pl.lit(1.0)
    key = ["subset", "prompt_id"]
    times = (
        _entries(pairs.with_columns(_times=weight))
        .group_by(*key, "chosen_model", "rejected_model")
        .agg(pl.col("_times").sum())
        .group_by(key)
        .agg(
            _full=(pl.len() == len(STYLES) ** 2)
            & ((pl.col("_times").max() - pl.col("_times").min()) < 1e-6)
        )
    )
    pairs = pairs.join(times, on=key, how="left", maintain_order="left")
    found = whole_items(pairs, key, pl.col("_full").first(), "without all pairs of their styles")
    return replace(found, table=found.table.drop("_full"))


def _cells(pairs: pl.DataFrame) -> Cells:
    cells = _entries(pairs)
    section = pl.col("subset").replace_strict(
        {domain: f"{name}, pooled" for name, part in SECTIONS.items() for domain in part},
        return_dtype=pl.String,
    )
    groups = (pl.col("subset"), pl.lit(ALL), section)
    matrix = [pl.format("{} {}/{}", group, "chosen_model", "rejected_model") for group in groups]
    right = pl.col("right")
    places = pl.concat([terms(cells, cell=cell, value=right) for cell in matrix])
    there = set(places["cell"])

    def level(domain: str, name: str) -> Formula:
        order = {"hard": -1, "normal": 0, "easy": 1}[name]
        corner = [
            f"{domain} {chosen}/{rejected}"
            for i, chosen in enumerate(STYLES)
            for j, rejected in enumerate(STYLES)
            if np.sign(i - j) == order
        ]
        return mean_of([{cell: 1.0} if cell in there else {} for cell in corner])

    levels = ("hard", "normal", "easy")
    by_level = {
        name: {
            section: mean_of([level(domain, name) for domain in domains])
            for section, domains in SECTIONS.items()
        }
        for name in levels
    }
    of_level = {name: mean_of(list(part.values())) for name, part in by_level.items()}
    # A section is there when all of its domains are, so that both totals are of the same items.
    pooled = {
        name: {
            section: level(f"{section}, pooled", name) if by_level[name][section] else {}
            for section in SECTIONS
        }
        for name in levels
    }
    of_pooled = {name: mean_of(list(part.values())) for name, part in pooled.items()}
    scores = {
        TOTAL: mean_of(list(of_pooled.values())),
        **{f"{name}, safety pooled": formula for name, formula in of_pooled.items()},
        "safety, items pooled": mean_of([pooled[name]["safety"] for name in levels]),
        "mean of four sections": mean_of(list(of_level.values())),
        **{f"{name}, mean of four": formula for name, formula in of_level.items()},
        **{section: mean_of([by_level[name][section] for name in levels]) for section in SECTIONS},
        **{f"{section} {name}": by_level[name][section] for section in SECTIONS for name in levels},
        **{f"{name}, all items pooled": level(ALL, name) for name in levels},
    }
    return Cells(pl.concat([places, pair_terms(pairs)]), scores | tie_scores())


SUITE = Suite(
    name="rm-bench",
    hub="THU-KEG/RM-Bench",
    hub_split="train",
    layouts=(
        Layout((*TRIO, "domain", "chosen_style", "rejected_style"), (), _pair_of_styles),
        Layout((*TRIO, "domain"), (), _all_styles),
    ),
    scores=scorer_of_cells(_cells),
    main=(
        TOTAL,
        *(f"{level}, safety pooled" for level in ("easy", "normal", "hard")),
        "mean of four sections",
        *(f"{level}, mean of four" for level in ("easy", "normal", "hard")),
        *(f"{level}, all items pooled" for level in ("easy", "normal", "hard")),
    ),
    merge=_styles_joined,
    needs=("chosen_model", "rejected_model"),
    check=_whole,
)
