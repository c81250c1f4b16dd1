"""Frozen specs: what the user asked for, read from TOML, hashed into content ids."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from embrm.core.errors import UserError
from embrm.core.spec_errors import error_line


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
            raise UserError(f"{where}: {error_line(error, cls)}") from None

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
