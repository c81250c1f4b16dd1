"""Arguments in the forms that people write them: paths, specs, data sources, sizes."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast, get_args

from embrm.core.errors import UserError, nearest
from embrm.core.extras import missing_extra

if TYPE_CHECKING:
    from embrm.cache.reader import Cache
    from embrm.data.sources import SourceSpec
    from embrm.training.numerics import Numerics

AnyPath = str | PathLike[str]
AnySpec = AnyPath | Mapping[str, Any]
"""A TOML file, or a mapping with its keys."""
AnyData = AnyPath | Mapping[str, Any]
"""`[SPLIT=]PATH_OR_HUB_ID`, or a mapping with the keys of a `[[data]]` table."""

_SIMPLE: dict[str, tuple[type, str]] = {
    "str": (str, "give text"),
    "int": (Integral, "give a whole number"),
    "float": (Real, "give a number"),
    "bool": (bool, "give True or False"),
}
"""Annotation of an argument → its type, and the remedy for a value of another type."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Check arguments that are text, numbers or switches, and name the extra of a dependency that
    is missing: both are errors of one line."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check_type(name, value, str(signature.parameters[name].annotation))
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from None

    return call


def _check_type(name: str, value: Any, annotation: str) -> None:
    plain = annotation.removesuffix(" | None")
    if plain not in _SIMPLE or (value is None and plain != annotation):
        return
    kind, remedy = _SIMPLE[plain]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} = {value!r}: {remedy}")


def path(value: AnyPath, name: str = "path") -> Path:
    """A path. Raises: UserError for anything but text or a path, or for empty text."""
    if not isinstance(value, str | PathLike) or not str(value):
        raise UserError(f"{name} = {value!r}: give a path, as text or as a pathlib.Path")
    return Path(value)


def optional_path(value: AnyPath | None, name: str = "path") -> Path | None:
    """A path, or None. Raises: UserError as `path`."""
    return None if value is None else path(value, name)


def names(value: str | Iterable[str], name: str) -> tuple[str, ...]:
    """One name, or several of them. Raises: UserError for anything else."""
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, Iterable) or not all(isinstance(one, str) for one in several):
        raise UserError(f"{name} = {value!r}: give a name or a list of names")
    return tuple(several)


def cache_folder(cache: "Cache | AnyPath | None") -> Path | None:
    """The folder of a cache that is given as itself or by its path."""
    if cache is None or isinstance(cache, str | PathLike):
        return optional_path(cache, "cache")
    return opened(cache).folder


def opened(cache: "Cache | AnyPath") -> "Cache":
    """An open cache, from itself or from its path. Raises: UserError for anything else."""
    from embrm.cache.reader import Cache, open_cache

    if isinstance(cache, Cache):
        return cache
    return open_cache(path(cache, "cache"))


def sources(data: AnyData | Sequence[AnyData]) -> "list[SourceSpec]":
    """Data sources, one or several."""
    from embrm.data.sources import SourceSpec, parse_source

    if not isinstance(data, Iterable):
        raise UserError(f"data = {data!r}: give [SPLIT=]PATH_OR_HUB_ID, or a list of such texts")
    several = [data] if isinstance(data, str | PathLike | Mapping) else [*data]
    return [
        SourceSpec.parse(dict(entry), "data")
        if isinstance(entry, Mapping)
        else parse_source(str(path(entry, "data")))
        for entry in several
    ]


def spec_source(spec: AnySpec) -> "Path | Mapping[str, Any]":
    """A spec as the rooms take it: a path or a mapping. Raises: UserError for anything else."""
    return spec if isinstance(spec, Mapping) else path(spec, "spec")


def byte_size(value: str | int | None, name: str) -> int | None:
    """A number of bytes, from a number or from text such as "4GB"."""
    from embrm.core.sizes import parse_bytes

    if not isinstance(value, str | int | None):
        raise UserError(f"{name} = {value!r}: give text such as '4GB', or a number of bytes")
    return parse_bytes(name, value) if isinstance(value, str) else value


def numerics_mode(value: str | None) -> "Numerics | None":
    """A mode of arithmetic. Raises: UserError for one that does not exist."""
    from embrm.training.numerics import Numerics

    modes = get_args(Numerics)
    if value is not None and value not in modes:
        raise UserError(f"numerics (--numerics) = {value!r}: {nearest(value, modes)}")
    return cast("Numerics | None", value)
