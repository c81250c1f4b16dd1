"""Label a sweep's training pairs by a simulated annotator that reads their gold scores."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embrm import __version__
from embrm.core.errors import UserError
from embrm.core.specs import SpecSource
from embrm.data.annotators import annotate, win_probability
from embrm.data.label_tables import LabelTable
from embrm.sweeps.prepare import PreparedSweep, prepare_sweep
from embrm.sweeps.selection import select
from embrm.sweeps.tables import read_tables


@dataclass(frozen=True)
class Annotation:
    """The labels of one simulated annotator, and how often they are wrong."""

    labels: LabelTable
    error: float
    """Share of wrong labels, among the pairs whose two gold scores differ."""
    expected: float
    """Expectation of `error` over all annotators of the same quality."""


def annotation(
    spec: SpecSource, cache: Path | None, *, quality: float, seed: int = 0
) -> Annotation:
    """Label the training pairs of a sweep by a Boltzmann annotator, `annotators.win_probability`.

    With `validation_labels = "noisy"` the validation pairs are labelled too, and with several data
    seeds the pairs of all of them.

    The gold difference of a pair is its margin, which pairs derived from groups have. It is divided
    by the standard deviation of gold scores over the responses of the groups in the train splits.

    Raises: UserError when `prepare_sweep` refuses the spec, the train splits have no groups, a pair
    has no margin, all gold scores are equal, or quality is negative.
    """
    if not quality >= 0:
        raise UserError(
            f"quality = {quality:g}: give a number of at least 0; labels are coin flips at 0"
        )
    prepared = prepare_sweep(spec, cache, None)
    drawn = [_drawn(prepared, seed) for seed in prepared.spec.data_seeds]
    pairs, trained = (pl.concat(tables) for tables in zip(*drawn, strict=True))
    pairs = pairs.unique("pair_id", keep="first", maintain_order=True)
    where = ", ".join(prepared.spec.train)
    place = spec if isinstance(spec, Path) else "spec"
    if trained.is_empty() or pairs["margin"].null_count():
        raise UserError(
            f"{place}: an annotator reads gold scores, but {where} has pairs without them: "
            "extract groups, with the columns prompt, response and gold"
        )
    gold = trained.unique("response", keep="first", maintain_order=True)["gold"]
    gold_sd = float(gold.to_numpy().std())
    if not gold_sd:
        raise UserError(
            f"{place}: every gold score of {where} is {gold[0]:g}, so no response is better than "
            "another: train on groups whose gold scores differ"
        )

    labels = annotate(pairs, gold_sd, quality, seed)
    margin, label = pairs["margin"].to_numpy(), labels["label"].to_numpy()
    decided = margin != 0
    wrong = (label == 1) != (margin > 0)
    provenance = {
        "rule": "boltzmann",
        "parameters": {"quality": quality, "seed": seed, "gold_sd": gold_sd},
        "cache_id": prepared.cache.cache_id,
        "embrm": __version__,
    }
    return Annotation(
        LabelTable("labels", labels, provenance),
        error=float(wrong[decided].mean()),
        expected=float(win_probability(-abs(margin[decided]), gold_sd, quality).mean()),
    )


def _drawn(prepared: PreparedSweep, data_seed: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The pairs to label with one data seed, and the members of the groups in the train splits."""
    selection = prepared.selection.drawn(data_seed)
    pairs, validation = select(prepared.cache, selection)
    if selection.validation_labels == "noisy":
        pairs = pl.concat([pairs, validation])
    members = read_tables(prepared.cache, selection.scenarios, data_seed).members
    return pairs, members.filter(pl.col("split").is_in(selection.train))
