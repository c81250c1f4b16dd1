"""Accuracy scores that several benchmarks share: of each subset, of all pairs, and of votes.

A pair is right when r_chosen > r_rejected, so a tie counts as wrong, as in the benchmarks' own
code. Every suite also gets the accuracy without ties and the share of tied pairs.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import polars as pl

from embrm.core.errors import UserError
from embrm.metrics.intervals import Replicates
from embrm.suites.cells import Cells, Formula, mean_of, replicated, terms
from embrm.suites.suite import Scorer

_APART = "accuracy of pairs, ties apart"
_TIED = "tied pairs"
ALL = "all pairs"


def voted(pairs: pl.DataFrame) -> pl.DataFrame:
    """Add the columns right and tied, and label and weight (1 each) where they are missing.

    right is the share of a pair's votes that the rewards agree with: label q where
    r_chosen > r_rejected, 1 - q where r_chosen < r_rejected, and 0 where they tie.
    """
    given = [
        pl.lit(1.0).alias(name) if name not in pairs.columns else pl.col(name).cast(pl.Float64)
        for name in ("label", "weight")
    ]
    # Compared, not subtracted: two failed rewards, of -inf, are a tie.
    chosen, rejected = pl.col("scores_chosen"), pl.col("scores_rejected")
    right = pl.when(chosen > rejected).then("label").when(chosen < rejected)
    return pairs.with_columns(given).with_columns(
        right=right.then(1 - pl.col("label")).otherwise(0.0),
        tied=(chosen == rejected).cast(pl.Float64),
    )


def pooled(pairs: pl.DataFrame) -> Cells:
    """Accuracy over all pairs (or votes), each counting once, and the accuracy of every subset."""
    return with_subsets(pairs, {"accuracy": {ALL: 1.0}})


def pooled_and_mean(pairs: pl.DataFrame) -> Cells:
    """Accuracy over all pairs, the unweighted mean of the subsets, and every subset."""
    subsets = sorted(set(pairs["subset"]))
    scores = {"accuracy": {ALL: 1.0}, "mean of subsets": mean_of([{name: 1.0} for name in subsets])}
    return with_subsets(pairs, scores)


def scorer_of_cells(cells_of: Callable[[pl.DataFrame], Cells]) -> Scorer:
    """Make a `Scorer` from a function that gives the cells of pairs; it gets pairs from `voted`."""

    def scores(
        pairs: pl.DataFrame, replicates: int, only: Collection[str] | None
    ) -> dict[str, Replicates]:
        return replicated(cells_of(voted(pairs)), replicates, only)

    return scores


def with_subsets(pairs: pl.DataFrame, scores: dict[str, Formula]) -> Cells:
    """Cells of every subset and of all pairs, with `scores` first and the subsets after them."""
    right = pl.col("right")
    parts = [
        terms(pairs, cell=pl.col("subset"), value=right),
        terms(pairs, cell=pl.lit(ALL), value=right),
        pair_terms(pairs),
    ]
    subsets = {name: {name: 1.0} for name in sorted(set(pairs["subset"])) if name}
    return Cells(pl.concat(parts), scores | subsets | tie_scores())


def pair_terms(pairs: pl.DataFrame) -> pl.DataFrame:
    """Terms of the two cells of `tie_scores`, over all pairs."""
    decided = pl.col("weight") * (1 - pl.col("tied"))
    return pl.concat(
        [
            terms(pairs, cell=pl.lit(_APART), value=pl.col("right"), weight=decided),
            terms(pairs, cell=pl.lit(_TIED), value=pl.col("tied")),
        ]
    )


def tie_scores() -> dict[str, Formula]:
    """Formulas of the accuracy without ties and of the share of ties; see `pair_terms`."""
    return {name: {name: 1.0} for name in (_APART, _TIED)}


def refuse_other_subsets(suite: str, found: Iterable[str], known: Sequence[str]) -> None:
    """Raises: UserError when `found` has a subset that is not in `known`."""
    others = sorted(set(found) - set(known))
    if others:
        raise UserError(
            f"{suite}: subset {others[0][:60]!r} is not one of its subsets ({', '.join(known)}): "
            "choose the split that holds this benchmark's pairs"
        )
