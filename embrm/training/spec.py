"""The spec of one run: objective, head, regularizer and optimisation. It loads no torch."""

import operator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from embrm.training.extensions import Extension
from embrm.training.heads.kinds import HEADS
from embrm.training.heads.preprocess import PreprocessKind
from embrm.training.heads.spec import HeadSpec
from embrm.training.objectives import LOSSES, Objective
from embrm.training.regularizers import KINDS, Regularizer

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSpec(Objective):
    """The spec of one run: objective, head, regularizer and optimisation."""

    head: HeadSpec = HeadSpec()
    """A table: see below."""
    regularizer: Regularizer | None = None
    """A table: see below."""
    preprocess: PreprocessKind = "none"
    """none, center (subtract the mean of the training states) or standardize (and divide by their
    standard deviations)."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay: w ← w - lr·weight_decay·w in every step (arXiv 1711.05101)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's moment estimates."""
    epochs: int = Field(default=10, gt=0)
    """Largest number of passes over the training pairs."""
    batch_pairs: int = Field(default=512, gt=0)
    """Pairs in a minibatch."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many epochs without a better validation NLL. Not given: run all epochs."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls to 0 over all epochs; constant: it does not."""
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly to lr."""
    # Fields that were added later are recorded only if set, so that other runs keep their ids.
    data_smoothing: float = Field(default=0.0, ge=0, lt=1, exclude_if=operator.not_)
    """β of iterative data smoothing: after every epoch each label becomes (1-β)·label + β·p, with p
    the run's own probability of the pair (arXiv 2401.16335)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights, the order of the pairs and dropout; for `embrm.train`. A sweep
    sets it: give seeds instead."""

    @model_validator(mode="after")
    def _head_fits(self) -> Self:
        regularizer, adapter = self.regularizer, self.head.adapter
        if (adapter or regularizer) and self.preprocess != "none":
            raise ValueError(
                f"preprocess = {self.preprocess!r}: adapters and regularizers act on the states "
                "as the LM head reads them: remove preprocess"
            )
        if regularizer and not regularizer.moves_states and str(self.head) != "linear":
            raise ValueError(
                f"regularizer 'fisher' with head {str(self.head)!r}: it is for a linear head "
                "without an adapter: take one, or kind = 'preserve-fisher'"
            )
        if self.data_smoothing and self.active_regularizer:
            raise ValueError(
                "data_smoothing with a regularizer: its labels would be those of the data, "
                "remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _moves_something(self) -> Self:
        # Overridden in fine-tuning, where the backbone is trained.
        regularizer = self.regularizer
        if regularizer and regularizer.moves_states and not self.head.adapter:
            raise ValueError(
                f"regularizer {regularizer.kind!r} without an adapter does nothing on frozen "
                "states: add head.adapter = { kind = 'low-rank' }, or take kind = 'fisher'"
            )
        return self

    @property
    def active_regularizer(self) -> Regularizer | None:
        """Return the regularizer if its weight is not 0, else None."""
        return self.regularizer if self.regularizer and self.regularizer.active else None

    def pack_key(self) -> tuple[Any, ...]:
        """Runs with equal keys, on the same data, may be trained in one pack."""
        regularizer = self.active_regularizer
        tokens = regularizer and (regularizer.moves_states, *regularizer.sampling)
        moving = self.data_smoothing > 0
        return self.head, self.preprocess, self.batch_pairs, self.seed, tokens, moving

    def extensions(self) -> dict[str, Extension]:
        """Find the user-defined parts that the run uses: "loss focal" → where it comes from."""
        found = {
            f"loss {self.loss}": LOSSES.source(self.loss),
            f"head {self.head.kind}": HEADS.source(self.head.kind),
        }
        if self.regularizer is not None:
            kind = self.regularizer.kind
            found[f"regularizer {kind}"] = KINDS.source(kind)
        return {name: source for name, source in found.items() if source is not None}
