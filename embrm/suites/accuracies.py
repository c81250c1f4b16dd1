"""Scores made of accuracies: of subsets, of all pairs, of votes.

A pair is right when its chosen response is rewarded strictly higher, as in the benchmarks' own
tools: there a tie is wrong. The accuracy without ties and the share of ties are given beside it.
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
    """With label and weight where there are none, and `right`: the share of a pair's votes that
    the rewards agree with, no vote where they tie."""
    given = [
        pl.lit(1.0).alias(name) if name not in pairs.columns else pl.col(name).cast(pl.Float64)
        for name in ("label", "weight")
    ]
    margin = pl.col("scores_chosen") - pl.col("scores_rejected")
    right = pl.when(margin > 0).then("label").when(margin < 0).then(1 - pl.col("label"))
    return pairs.with_columns(given).with_columns(
        right=right.otherwise(0.0), tied=(margin == 0).cast(pl.Float64)
    )


def pooled(pairs: pl.DataFrame) -> Cells:
    """All pairs, or votes, pooled; and every subset."""
    return with_subsets(pairs, {"accuracy": {ALL: 1.0}})


def pooled_and_mean(pairs: pl.DataFrame) -> Cells:
    """All pairs pooled, which weighs large subsets more; the mean of subsets; and every subset."""
    subsets = sorted(set(pairs["subset"]))
    scores = {"accuracy": {ALL: 1.0}, "mean of subsets": mean_of([{name: 1.0} for name in subsets])}
    return with_subsets(pairs, scores)


def of_cells(cells_of: Callable[[pl.DataFrame], Cells]) -> Scorer:
    def scores(
        pairs: pl.DataFrame, replicates: int, only: Collection[str] | None
    ) -> dict[str, Replicates]:
        return replicated(cells_of(voted(pairs)), replicates, only)

    return scores


def with_subsets(pairs: pl.DataFrame, scores: dict[str, Formula]) -> Cells:
    """Cells of the subsets and of all pairs; the scores, then every subset."""
    right = pl.col("right")
    parts = [
        terms(pairs, cell=pl.col("subset"), value=right),
        terms(pairs, cell=pl.lit(ALL), value=right),
        pair_terms(pairs),
    ]
    subsets = {name: {name: 1.0} for name in sorted(set(pairs["subset"])) if name}
    return Cells(pl.concat(parts), scores | subsets | beside())


def pair_terms(pairs: pl.DataFrame) -> pl.DataFrame:
    """Of all pairs: accuracy without ties, and the share of ties."""
    decided = pl.col("weight") * (1 - pl.col("tied"))
    return pl.concat(
        [
            terms(pairs, cell=pl.lit(_APART), value=pl.col("right"), weight=decided),
            terms(pairs, cell=pl.lit(_TIED), value=pl.col("tied")),
        ]
    )


def beside() -> dict[str, Formula]:
    return {name: {name: 1.0} for name in (_APART, _TIED)}


def refuse_other_subsets(suite: str, found: Iterable[str], known: Sequence[str]) -> None:
    others = sorted(set(found) - set(known))
    if others:
        raise UserError(
            f"{suite}: subset {others[0][:60]!r} is none of its own ({', '.join(known)}): "
            "name the split that holds the suite"
        )
