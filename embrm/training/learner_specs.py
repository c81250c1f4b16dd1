"""Learners that scikit-learn fits in place of a trained head: their specs, which need no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from embrm.core.specs import Spec

LIBRARY_BYTES = 150_000_000
"""Approximate memory that importing scikit-learn takes."""

_OF_PAIRS = frozenset(
    {"learner", "seed", "data_seed", "state", "pairs_limit", "label_noise", "labels", "fold"}
)
"""Fields of a run that every learner fitted to pairs reads."""

BINS = 256
"""Histogram bins per component of a state. scikit-learn reserves one of them for missing values,
which states do not have."""
COPIED = 200_000
"""Rows that scikit-learn copies to choose its bins, if there are more rows than this."""


class Logistic(Spec):
    """Logistic regression on differences of states, without an intercept.

    It finds the minimum of the objective of a linear bt head with l2 = 1/(C·Σ weight).
    """

    reads: ClassVar = _OF_PAIRS | {"preprocess"}
    reads_gold: ClassVar = False
    seeded: ClassVar = False
    loss: ClassVar = "bt"
    passes: ClassVar = 100.0
    """Estimated cost of a fit for planning, in epochs of a linear head."""

    kind: Literal["logistic"]
    C: float = Field(default=1.0, gt=0)
    """Inverse strength of regularization: ½‖w‖² + C·Σ weight·loss, over the pairs, is minimised."""

    def __str__(self) -> str:
        return f"logistic C {self.C:g}"

    def room(self, rows: int, width: int) -> int:
        """Estimate the bytes that a fit to `rows` states of `width` components needs."""
        return 8 * rows * width


class Ridge(Spec):
    """Ridge regression of each response's gold score on its state.

    It is fitted with an intercept, which the head leaves out because it cancels in comparisons.
    """

    reads: ClassVar = frozenset({"learner", "seed", "data_seed", "state", "fold", "preprocess"})
    reads_gold: ClassVar = True
    seeded: ClassVar = False
    loss: ClassVar = "squared error"
    passes: ClassVar = 10.0
    """See `Logistic.passes`."""

    kind: Literal["ridge"]
    alpha: float = Field(default=1.0, gt=0)
    """Strength of regularization: Σ (gold - w·h - b)² + alpha·‖w‖², over the group members, is
    minimised."""

    def __str__(self) -> str:
        return f"ridge alpha {self.alpha:g}"

    def room(self, rows: int, width: int) -> int:
        """Estimate the bytes of a fit, for the states and two matrices of their products."""
        return 8 * (rows * width + 2 * min(rows, width) ** 2)


class GradientBoosting(Spec):
    """Gradient-boosted trees on binned states, which classify responses as chosen or rejected.

    The reward is the log-odds that a response is the chosen one.
    """

    reads: ClassVar = _OF_PAIRS
    reads_gold: ClassVar = False
    loss: ClassVar = "classifier"

    kind: Literal["gradient_boosting"]
    learning_rate: float = Field(default=0.1, gt=0)
    """Factor of the values of every tree's leaves."""
    iterations: int = Field(default=100, gt=0)
    """Number of trees. There is no early stopping."""
    leaves: int = Field(default=31, ge=2)
    """Largest number of leaves of a tree."""
    l2: float = Field(default=0.0, ge=0)
    """l2 regularization of leaf values: it is added to the sum of the loss's second derivatives in
    a leaf."""
    features: float = Field(default=1.0, gt=0, le=1)
    """Share of the components of a state that each split of a tree may use, drawn by the seed. With
    1, all seeds give the same trees."""

    def __str__(self) -> str:
        return f"gradient boosting {self.iterations} trees of {self.leaves} leaves"

    @property
    def seeded(self) -> bool:
        """Whether the result depends on the seed."""
        return self.features < 1

    @property
    def passes(self) -> float:
        """See `Logistic.passes`."""
        return 10.0 * self.iterations

    def room(self, rows: int, width: int) -> int:
        """Estimate the bytes of a fit, for the states, their bins, and histograms (24 bytes per
        bin) of every leaf."""
        copied = 8 * COPIED if rows > COPIED else 0
        return width * (9 * rows + copied + 8 * BINS + 24 * BINS * (self.leaves + 1))


Learner = Annotated[Logistic | Ridge | GradientBoosting, Field(discriminator="kind")]
