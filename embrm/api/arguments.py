"""Arguments in the forms that people write them: paths, specs, data sources, sizes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from embrm.core.errors import UserError
from embrm.core.extras import missing_extra

if TYPE_CHECKING:
    from embrm.cache.reader import Cache
    from embrm.data.sources import SourceSpec

AnyPath = str | PathLike[str]
AnySpec = AnyPath | Mapping[str, Any]
"""A TOML file, or a mapping with its keys."""
AnyData = AnyPath | Mapping[str, Any]
"""`[SPLIT=]PATH_OR_HUB_ID`, or a mapping with the keys of a `[[data]]` table."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn a missing optional dependency into the one-line error that names its extra."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise missing_extra(error) or error from None

    return call


def path(value: AnyPath, name: str = "path") -> Path:
    """A path. Raises: UserError for anything but text or a path, or for empty text."""
    if not isinstance(value, str | PathLike) or not str(value):
        raise UserError(f"{name} = {value!r}: give a path, as text or as a pathlib.Path")
    return Path(value)


def optional_path(value: AnyPath | None, name: str = "path") -> Path | None:
    """A path, or None. Raises: UserError as `path`."""
    return None if value is None else path(value, name)


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

    return value if value is None or isinstance(value, int) else parse_bytes(name, value)
