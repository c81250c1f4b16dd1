"""Frozen specs: what the user asked for, read from TOML, hashed into content ids."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from embrm.core.errors import UserError, nearest


class Spec(BaseModel):
    """Base of every spec: immutable, unknown keys refused, NaN refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """Validate `values` read from `where` (a file name or "command line").

        Raises: UserError naming the first wrong field, its value, the rule and a remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{where}: {_first_line(error, cls)}") from None

    def content_id(self) -> str:
        """Identity of this spec: see `content_id`."""
        return content_id(self.model_dump(mode="json"))


SpecSource = Path | Mapping[str, Any]
"""A TOML file, or a mapping with the same keys."""


def spec_values(source: SpecSource) -> tuple[dict[str, Any], str]:
    """The values of a spec, and how errors call the place that they come from.

    Raises: UserError as `read_toml`.
    """
    if isinstance(source, Mapping):
        return dict(source), "spec"
    return read_toml(source), str(source)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file. Raises: UserError when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no spec at {path}: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def canonical_json(value: Any) -> str:
    """One spelling for equal values: sorted keys, no spaces, floats by their shortest repr."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def content_id(value: Any, length: int = 16) -> str:
    """First `length` hex digits of SHA-256 over the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def _first_line(error: ValidationError, model: type[BaseModel]) -> str:
    # A union reports its members' complaints too; the deepest path is the most specific one.
    details = max(error.errors(), key=lambda entry: len(entry["loc"]))
    location = [str(part) for part in details["loc"]]
    field = ".".join(location) or "spec"
    if details["type"] == "extra_forbidden":
        owner = _model_at(model, details["loc"][:-1])
        remedy = nearest(location[-1], owner.model_fields) if owner else "remove it"
        return f"unknown key {field!r}: {remedy}"
    if details["type"] == "missing":
        return f"{field} is missing: add it"
    message = details["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if details["type"] == "value_error" and not location:
        return message
    return f"{field} = {details['input']!r}: {message}"


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model that owns the key at the end of `path`, walking nested models and tuples."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return None
        if part not in current.model_fields:
            continue  # a union's tag, not a field
        current = _inner_model(current.model_fields[part].annotation)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _inner_model(argument)
        if found is not None:
            return found
    return None
