"""Learners that scikit-learn fits in place of a trained head: their specs, which need no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from embrm.core.specs import Spec

LIBRARY_BYTES = 150_000_000
"""Memory that scikit-learn takes once it is loaded."""

_OF_PAIRS = frozenset({"learner", "seed", "state", "pairs_limit", "label_noise", "labels", "fold"})
"""Fields of a run that every learner from pairs reads."""

BINS = 256
"""Of a component's, one is for missing values, which states do not have."""
COPIED = 200_000
"""Of more rows than these scikit-learn copies so many to look at."""


class Logistic(Spec):
    """Logistic regression on differences of states, without an intercept: the minimum of a linear
    bt head with l2 = 1/(C·Σ weight)."""

    reads: ClassVar = _OF_PAIRS | {"preprocess"}
    reads_gold: ClassVar = False
    seeded: ClassVar = False
    loss: ClassVar = "bt"
    passes: ClassVar = 100.0
    """Over the pairs, about, in minibatch steps of a linear head: to plan with."""

    kind: Literal["logistic"]
    C: float = Field(default=1.0, gt=0)
    """½‖w‖² + C·Σ weight·loss over the pairs is minimised."""

    def __str__(self) -> str:
        return f"logistic C {self.C:g}"

    def room(self, rows: int, width: int) -> int:
        """Bytes that a fit of so many rows takes."""
        return 8 * rows * width


class Ridge(Spec):
    """Ridge regression of gold scores on states, pointwise, with an intercept, which no comparison
    of rewards sees and the head leaves out."""

    reads: ClassVar = frozenset({"learner", "seed", "state", "fold", "preprocess"})
    reads_gold: ClassVar = True
    seeded: ClassVar = False
    loss: ClassVar = "squared error"
    passes: ClassVar = 10.0
    """As those of `Logistic`."""

    kind: Literal["ridge"]
    alpha: float = Field(default=1.0, gt=0)
    """Σ (gold - w·h - b)² + alpha·‖w‖² over the group members is minimised."""

    def __str__(self) -> str:
        return f"ridge alpha {self.alpha:g}"

    def room(self, rows: int, width: int) -> int:
        """As that of `Logistic`: beside the states two matrices of their products."""
        return 8 * (rows * width + 2 * min(rows, width) ** 2)


class GradientBoosting(Spec):
    """Trees by gradient boosting on binned states, pointwise: has a response won or lost its pair?
    The reward is the log-odds."""

    reads: ClassVar = _OF_PAIRS
    reads_gold: ClassVar = False
    loss: ClassVar = "classifier"

    kind: Literal["gradient_boosting"]
    learning_rate: float = Field(default=0.1, gt=0)
    """What every tree's leaves are multiplied by."""
    iterations: int = Field(default=100, gt=0)
    """Trees: all are grown, none is given up for what pairs say."""
    leaves: int = Field(default=31, ge=2)
    """Of a tree, at most."""
    l2: float = Field(default=0.0, ge=0)
    """Added to the second derivative of the loss, summed over a leaf's ends of pairs."""
    features: float = Field(default=1.0, gt=0, le=1)
    """Share of the components that a split may use, drawn by the seed; at 1 seeds do nothing."""

    def __str__(self) -> str:
        return f"gradient boosting {self.iterations} trees of {self.leaves} leaves"

    @property
    def seeded(self) -> bool:
        """Whether the seed matters."""
        return self.features < 1

    @property
    def passes(self) -> float:
        """As those of `Logistic`."""
        return 10.0 * self.iterations

    def room(self, rows: int, width: int) -> int:
        """As that of `Logistic`: states and their bins, and histograms (24 bytes a bin) of every
        leaf."""
        copied = 8 * COPIED if rows > COPIED else 0
        return width * (9 * rows + copied + 8 * BINS + 24 * BINS * (self.leaves + 1))


Learner = Annotated[Logistic | Ridge | GradientBoosting, Field(discriminator="kind")]
