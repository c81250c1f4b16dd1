"""The extraction engines, and the choice of one. To add an engine, add its module to `ENGINES`.

Engines are imported when they are used, because that loads the libraries they run on.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

from embrm.core.errors import UserError, nearest

if TYPE_CHECKING:
    from embrm.extraction.engine import EngineModule


class EngineEntry(NamedTuple):
    """An engine that a user can name.

    module: a module with the functions of `EngineModule`. chosen: when `engine = "auto"` chooses
    the engine, as shown in help texts.
    """

    name: str
    module: str
    chosen: str


ENGINES = (
    EngineEntry("vllm", "embrm.extraction.vllm_engine", "where it is installed on CUDA"),
    EngineEntry("transformers", "embrm.extraction.transformers_engine", "otherwise"),
)
"""All engines, in the order in which "auto" tries them; the last one works on every machine."""

REFERENCE = "transformers"
"""The engine of a cache whose identity names none. It was the first one, and identities name only
the others, so that older caches keep their ids."""


def engine_names() -> list[str]:
    """The names that a spec's `engine` takes, sorted: auto and the engines."""
    return sorted(["auto", *(entry.name for entry in ENGINES)])


def engine_help() -> str:
    """One line for help texts: which engines there are, and when "auto" chooses each."""
    rules = ", ".join(f"{entry.name} {entry.chosen}" for entry in ENGINES)
    return f"{', '.join(engine_names())}; auto: {rules}"


def check_engine_name(name: str) -> str:
    """Return `name` unchanged. Raises: ValueError when there is no such engine."""
    if name not in engine_names():
        raise ValueError(nearest(name, engine_names()))
    return name


def engine_module(name: str) -> "EngineModule":
    """The module of the engine with this name. Raises: UserError when there is no such engine."""
    for entry in ENGINES:
        if entry.name == name:
            return cast("EngineModule", import_module(entry.module))
    raise UserError(f"engine = {name!r}: {nearest(name, engine_names())}")


def choose_engine(name: str, views: Sequence[str], device: str) -> str:
    """Resolve an engine name; for "auto", the first engine that suits the views and the device.

    Raises: UserError when the engine asked for is not installed or cannot give all the views.
    """
    if name != "auto":
        engine_module(name).refuse_unusable(views)
        return name
    *rest, last = ENGINES
    suited = (e.name for e in rest if engine_module(e.name).suits(views, device))
    return next(suited, last.name)
