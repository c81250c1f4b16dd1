"""Remedies: correct labels by the measured strength of each preference (arXiv 2401.06080).

A range selects pairs by their rank in preference strength, weakest first: [0, 0.1] is the tenth of
the pairs with the lowest strength, which are the most likely to be labelled wrongly.
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
        raise ValueError("a range is [from, to] with 0 <= from < to <= 1, such as [0, 0.2]")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class Remedy(Spec):
    """Operations on ranges of pairs, applied in this order. At least one must be given."""

    flip: Range | None = None
    """Flip labels: label ← 1 - label; the strength changes its sign."""
    smooth: Range | None = None
    """Smooth labels: label ← (1-ε)·label + ε·(1-label)."""
    epsilon: float = Field(default=0.1, gt=0, lt=0.5)
    """ε of `smooth`."""
    soft: Range | None = None
    """Soft labels: the preferred response gets probability sigmoid(strength)."""
    margin: Range | None = None
    """Set the margin to the strength, and to 0 outside the range. Runs use it with margin_scale."""
    drop: Range | None = None
    """Leave these pairs out (weight 0)."""
    keep: Range | None = None
    """Leave all other pairs out (weight 0)."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not any((self.flip, self.smooth, self.soft, self.margin, self.drop, self.keep)):
            raise ValueError(
                "a remedy needs an operation: give flip, smooth, soft, margin, drop or keep"
            )
        if self.drop and self.keep:
            raise ValueError("drop and keep exclude each other: give one of them")
        if self.smooth and self.soft and _overlap(self.smooth, self.soft):
            raise ValueError(
                f"smooth = {list(self.smooth)} and soft = {list(self.soft)} overlap, but "
                "both set the label: move one of them"
            )
        return self


def apply_remedy(remedy: Remedy, strengths: LabelTable) -> LabelTable:
    """Apply a remedy: returns labels for all pairs of `strengths`, a table of that kind.

    The table has weights with `drop` or `keep` and margins with `margin`. Its provenance includes
    that of `strengths`.
    """
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
