"""Losses, heads and regularizers that users define in modules of their own."""

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from embrm.core.errors import UserError
from embrm.core.files import sha256

T = TypeVar("T")

REGISTER_FIRST = " (one of your own is registered from Python, by importing its module)"
"""Added to the error for an unknown name."""


@dataclass(frozen=True)
class Extension:
    """Where a user-defined loss, head or regularizer (a "part") comes from, for the ledger.

    module: the module that registers it, or None if no other process could import it, as from a
    notebook or a script. digest: SHA-256 of the module's source file, or of the source of the
    definition alone if there is no module.
    """

    module: str | None
    digest: str

    @classmethod
    def of(cls, source: Any, what: str, name: str) -> Self:
        """Find the source of a function, class or module. Raises: UserError when it has none."""
        module = source if inspect.ismodule(source) else inspect.getmodule(source)
        path = getattr(module, "__file__", None)
        # A notebook's or a script's code is the module __main__, which others cannot import.
        if module is not None and module.__name__ != "__main__" and path:
            return cls(module.__name__, sha256(Path(path)))
        try:
            text = inspect.getsource(source)
        except (OSError, TypeError):
            raise UserError(
                f"{what} {name!r} has no source to record: define it in a module of your own"
            ) from None
        return cls(None, hashlib.sha256(text.encode()).hexdigest())


class Extensions(Mapping[str, T], Generic[T]):
    """Name → part of one kind, such as all losses: built-in ones, and those that users register."""

    def __init__(self, what: str, built_in: Mapping[str, T]) -> None:
        """what: the word for such a part in errors, such as "loss"."""
        self._what = what
        self._parts = dict(built_in)
        self._built_in = frozenset(built_in)
        self._sources: dict[str, Extension] = {}

    def __getitem__(self, name: str) -> T:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def register(self, name: str, part: T, source: Extension) -> None:
        """Add a user's part, or replace the user's part of that name.

        Raises: UserError for the name of a built-in part, or one that a spec cannot contain.
        """
        if name in self._built_in:
            raise UserError(f"{self._what} {name!r} is built in: register yours under another name")
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise UserError(
                f"{self._what} name {name!r}: use letters, digits, - and _, such as 'focal'"
            )
        self._parts[name] = part
        self._sources[name] = source

    def source(self, name: str) -> Extension | None:
        """Return where a user's part comes from; None for a built-in part."""
        return self._sources.get(name)


def check_function(function: Any, arguments: int, what: str, name: str) -> None:
    """Check that a user's part is a plain function that takes this number of arguments.

    Raises: UserError otherwise. A callable such as functools.partial is refused because the digest
    of its source would not identify what it computes.
    """
    if not inspect.isfunction(function):
        raise UserError(
            f"{what} {name!r} is a {type(function).__name__}: write it with def, so that the "
            "digest of its source is recorded"
        )
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        raise UserError(
            f"{what} {name!r} has the arguments {inspect.signature(function)}: it is called with "
            f"{arguments}"
        ) from None


def import_modules(names: tuple[str, ...]) -> None:
    """Import the modules that register user-defined parts, in a worker process."""
    for name in names:
        if name not in sys.modules:
            __import__(name)


def check_recorded(
    recorded: Mapping[str, Mapping[str, Any]], used: Mapping[str, Extension]
) -> None:
    """Compare the parts that a stored run used with those that are registered now.

    Raises: UserError if the source of a part has changed since the run was trained.
    """
    for name, stored in recorded.items():
        now = used.get(name)
        if now is None or now.digest != stored["digest"]:
            raise UserError(
                f"{name} of module {stored['module']} is another than the run was trained with "
                f"(source digest {stored['digest'][:12]}): restore that source, or run the sweep "
                "again"
            )


def refuse_unimportable(used: Mapping[str, Extension]) -> None:
    """Raise UserError if worker processes could not import one of these parts."""
    for name, extension in used.items():
        if extension.module is None:
            raise UserError(
                f"{name} is defined in a notebook or a script, which a sweep's worker processes "
                "cannot import: move it to a module, or train with embrm.train"
            )
