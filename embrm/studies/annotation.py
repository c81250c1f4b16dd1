"""Annotating a sweep's training pairs by their gold scores, with errors."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from embrm import __version__
from embrm.core.errors import UserError
from embrm.core.specs import SpecSource
from embrm.data.annotators import annotate, win_probability
from embrm.data.label_tables import LabelTable
from embrm.sweeps.prepare import prepare_sweep
from embrm.sweeps.selection import select
from embrm.sweeps.tables import read_tables


@dataclass(frozen=True)
class Annotation:
    """error: share of the pairs with different gold scores whose label is wrong; expected: its
    expectation over annotators."""

    labels: LabelTable
    error: float
    expected: float


def annotation(
    spec: SpecSource, cache: Path | None, *, quality: float, seed: int = 0
) -> Annotation:
    """Labels of the training pairs of a sweep by a Boltzmann annotator of this quality.

    Gold differences are the pairs' margins, which pairs derived from groups have; the standard
    deviation of gold is that of the train splits' members.

    Raises: UserError for what `prepare` refuses, no groups among the train splits, pairs without a
    margin, constant gold, or a quality below 0.
    """
    if not quality >= 0:
        raise UserError(f"quality = {quality:g}: it is at least 0, where labels are coin flips")
    prepared = prepare_sweep(spec, cache, None)
    pairs, _ = select(prepared.cache, prepared.selection)
    members = read_tables(prepared.cache, prepared.spec.scenarios).members
    trained = members.filter(pl.col("split").is_in(prepared.spec.train))
    where = ", ".join(prepared.spec.train)
    place = spec if isinstance(spec, Path) else "spec"
    if trained.is_empty() or pairs["margin"].null_count():
        raise UserError(
            f"{place}: an annotator reads gold scores, and {where} has pairs without them: "
            "extract groups, with the columns prompt, response and gold"
        )
    gold = trained.unique("response", keep="first", maintain_order=True)["gold"]
    gold_sd = float(gold.to_numpy().std())
    if not gold_sd:
        raise UserError(f"{place}: every gold score of {where} is {gold[0]:g}: annotate others")
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
