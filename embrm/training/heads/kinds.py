"""The kinds of heads: one module each, and the interface that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from embrm.core.errors import UserError
from embrm.training.extensions import Extension, Extensions
from embrm.training.heads import linear, mlp
from embrm.training.heads.adapter import DOWN, DOWN_BIAS, UP

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from embrm.training.heads.adapter import Shift
    from embrm.training.heads.bank import Parameters
    from embrm.training.heads.spec import HeadSpec


class HeadKind(Protocol):
    """The interface of a kind of head, which is a module, or an object, with these names.

    Parameters are a dict of name → float32 tensor [P, ...], one row per slot of a bank.
    """

    EXPORTED: bool
    """Whether the reward model class that embrm exports can compute it."""

    def check(self, spec: HeadSpec) -> None:
        """Raise ValueError, with the remedy, for a spec that does not fit this kind."""

    def describe(self, spec: HeadSpec) -> str:
        """Describe the head in words, for the ledger's column `head`."""

    def owns(self, parameters: Parameters) -> bool:
        """Whether a head of this kind has exactly these parameters, which exclude an adapter's.

        No two kinds may own the same parameters, so the names must differ between kinds.
        """

    def initialise(self, spec: HeadSpec, width: int, random: np.random.Generator) -> Parameters:
        """Initialise one slot, [1, ...], of a head on states of this width."""

    def rewards(
        self, parameters: Parameters, X: Tensor, kept: Sequence[Tensor], shift: Shift | None
    ) -> Tensor:
        """Compute rewards [P, n] of states X [n, d], to which an adapter adds `shift`, if any.

        kept: the dropout masks of the hidden layers, empty outside training.
        """

    def fold(self, parameters: Parameters) -> Tensor | None:
        """Return the weights float64 [P, d] if the head is linear in the states, else None."""


_FUNCTIONS = ("check", "describe", "owns", "initialise", "rewards", "fold")
"""Functions that `register_head` requires."""

HEADS: Extensions[HeadKind] = Extensions("head", {"linear": linear, "mlp": mlp})
"""Kinds of heads by their name in a spec."""


def register_head(name: str, kind: HeadKind) -> None:
    """Make a head of your own available as `head = { kind = name }` in specs given from Python.

    kind: a module, or an object, with the names of `HeadKind`. The ledger records the module and
    the SHA-256 of its source; a sweep's worker processes import it, so it must be importable.

    Raises: UserError for the name of a built-in head, where a name of `HeadKind` is missing, and
    where the source cannot be found.
    """
    missing = [part for part in _FUNCTIONS if not callable(getattr(kind, part, None))]
    if not isinstance(getattr(kind, "EXPORTED", None), bool):
        missing.append("EXPORTED (True or False)")
    if missing:
        raise UserError(
            f"head {name!r} lacks {', '.join(missing)}: see embrm.training.heads.HeadKind"
        )
    source = kind if isinstance(kind, type(linear)) else type(kind)
    HEADS.register(name, kind, Extension.of(source, "head", name))


def kind_of(parameters: Parameters) -> HeadKind:
    """Find the kind of head that has these parameters.

    Raises: UserError unless exactly one kind owns them, since rewards might else be computed by
    another kind of head than was trained.
    """
    own = {name: value for name, value in parameters.items() if name not in (DOWN, DOWN_BIAS, UP)}
    names = [name for name, kind in HEADS.items() if kind.owns(own)]
    if len(names) != 1:
        raise UserError(
            f"head parameters {', '.join(parameters)} are owned by {' and '.join(names) or 'no'} "
            "kind of head: name a head's parameters as no other head does, and let its owns() "
            "accept those names alone"
        )
    return HEADS[names[0]]
