"""Remedies: other labels for pairs of which the strength of preference is known (arXiv 2401.06080).

Ranges are shares of the pairs in the order of their strength, weakest first: [0, 0.1] is the lowest
tenth.
"""

from typing import Annotated, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator
from scipy.special import expit

from embrm import __version__
from embrm.core.specs import Spec
from embrm.data.label_tables import LabelTable


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError("a range goes from a share to a larger one, such as [0, 0.2]")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Remedy(Spec):
    """What is done to which pairs, in this order; at least one of them."""

    flip: Range | None = None
    """Labels are turned round, and with them the strength: label ← 1 - label."""
    smooth: Range | None = None
    """label ← (1-ε)·label + ε·(1-label)."""
    epsilon: float = Field(default=0.1, gt=0, lt=0.5)
    """ε of smooth."""
    soft: Range | None = None
    """The label's side has probability sigmoid(strength)."""
    margin: Range | None = None
    """The pair's margin is its strength; 0 outside the range. Runs use it with margin_scale."""
    drop: Range | None = None
    """Pairs are left out: weight 0."""
    keep: Range | None = None
    """All others are left out."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not any((self.flip, self.smooth, self.soft, self.margin, self.drop, self.keep)):
            raise ValueError(
                "a remedy does something: give flip, smooth, soft, margin, drop or keep"
            )
        if self.drop and self.keep:
            raise ValueError("drop and keep both choose pairs: give one of them")
        if self.smooth and self.soft and _overlap(self.smooth, self.soft):
            raise ValueError(
                f"smooth = {list(self.smooth)} and soft = {list(self.soft)} overlap: a pair has "
                "one label, move one of them"
            )
        return self


def remedied(remedy: Remedy, strengths: LabelTable) -> LabelTable:
    """Labels of all pairs of `strengths`, with weights (`drop`, `keep`) and margins (`margin`);
    its provenance goes with them."""
    parameters = remedy.model_dump(mode="json", exclude_none=True)
    if not remedy.smooth:
        del parameters["epsilon"]
    provenance = {
        "rule": "remedy",
        "parameters": {**parameters, "strengths": strengths.provenance},
        "cache_id": strengths.provenance["cache_id"],
        "embrm": __version__,
    }
    return LabelTable("labels", _applied(remedy, strengths.rows), provenance)


def _applied(remedy: Remedy, strengths: pl.DataFrame) -> pl.DataFrame:
    table = strengths.sort("strength", "pair_id")
    share = (np.arange(table.height) + 0.5) / table.height

    def within(ends: Range | None) -> NDArray[np.bool_]:
        return np.zeros(0, np.bool_) if ends is None else (share > ends[0]) & (share < ends[1])

    label, strength = (table[name].to_numpy().copy() for name in ("label", "strength"))
    if remedy.flip:
        turned = within(remedy.flip)
        label[turned] = 1 - label[turned]
        strength[turned] *= -1
    chosen = label >= 0.5
    if remedy.smooth:
        some, e = within(remedy.smooth), remedy.epsilon
        label[some] = (1 - e) * label[some] + e * (1 - label[some])
    if remedy.soft:
        some = within(remedy.soft)
        label[some] = expit(np.where(chosen, strength, -strength))[some]
    columns = {"label": label}
    if remedy.margin:
        columns["margin"] = np.where(within(remedy.margin), strength, 0.0)
    if remedy.drop:
        columns["weight"] = (~within(remedy.drop)).astype(np.float64)
    if remedy.keep:
        columns["weight"] = within(remedy.keep).astype(np.float64)
    return table.select("pair_id").with_columns(**{k: pl.Series(v) for k, v in columns.items()})


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
