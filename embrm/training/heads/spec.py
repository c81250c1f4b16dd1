"""The part of a run's spec that describes the head and its adapter."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from embrm.core.errors import nearest
from embrm.core.specs import Spec
from embrm.training.extensions import REGISTER_FIRST
from embrm.training.heads.kinds import HEADS


class AdapterSpec(Spec):
    """A residual adapter between a state h and what reads it, with up = 0 initially.

    low-rank: h̃ = h + up·down·h. mlp: h̃ = h + up·ReLU(down·h + b).
    """

    kind: Literal["low-rank", "mlp"] = "low-rank"
    """low-rank: a product of two matrices; mlp: one hidden layer with ReLU."""
    width: int = Field(default=16, gt=0)
    """Rank of a low-rank adapter, or hidden units of an mlp."""

    def __str__(self) -> str:
        return f"{self.kind} {self.width}"


class HeadSpec(Spec):
    """A head's shape: reward = w·h, or an MLP with ReLU and dropout after each hidden layer."""

    example: ClassVar = '{ kind = "mlp", widths = [64] }'

    kind: str = "linear"
    """linear or mlp."""
    widths: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Number of units of each hidden layer of an mlp."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate after every hidden layer of an mlp."""
    adapter: AdapterSpec | None = None
    """A table: see below. The head then reads h̃ instead of h."""

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in HEADS:
            raise ValueError(f"unknown kind of head: {nearest(kind, HEADS)}{REGISTER_FIRST}")
        return kind

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        HEADS[self.kind].check(self)
        return self

    def __str__(self) -> str:
        adapter = f" on {self.adapter} adapter" if self.adapter else ""
        return f"{HEADS[self.kind].describe(self)}{adapter}"
