"""HHH Alignment (Askell et al. 2021, arXiv 2112.00861): pairs of a helpful, honest or harmless
response and a worse one.

Scores: the accuracy of each subset, their unweighted mean, and the accuracy over all pairs.
"""

from collections.abc import Iterator

from embrm.core.text import quoted
from embrm.suites.accuracies import pooled_and_mean, scorer_of_cells
from embrm.suites.rows import MODELS, TRIO, pair_row, plain_pair
from embrm.suites.suite import Layout, Row, Suite


def _rows(row: Row) -> Iterator[Row]:
    targets = row["targets"]
    whole = isinstance(targets, dict) and {"choices", "labels"} <= set(targets)
    if not whole or sorted(targets["labels"]) != [0, 1] or len(targets["choices"]) != 2:
        raise ValueError(f"targets {quoted(targets)} are not two choices, labelled 1 and 0")
    best = targets["labels"].index(1)
    texts = targets["choices"][best], targets["choices"][1 - best]
    yield pair_row(row["input"], texts, None, (None, None))


SUITE = Suite(
    name="hhh",
    hub="HuggingFaceH4/hhh_alignment",
    hub_split="test",
    layouts=(
        Layout(("input", "targets"), (), _rows),
        Layout((*TRIO, "subset"), MODELS, plain_pair),
    ),
    scores=scorer_of_cells(pooled_and_mean),
    main=("accuracy", "mean of subsets"),
)
