"""Specs of adoption: which arrays of states become a cache, with which gold scores."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from embrm.adoption.rows import Order
from embrm.core.errors import UserError
from embrm.core.specs import Spec
from embrm.core.text import quoted
from embrm.data.groups import PairRule
from embrm.data.splits import Holdout


class ArraySource(Spec):
    """One array of states: (prompts, responses, width) or (responses, prompts, width) with gold
    scores of the first two axes, or (rows, width) with a table that describes each row."""

    states: str
    """A .npy, .pt or .safetensors file with the states."""
    key: str | None = None
    """Name of the states, in a file of several arrays."""
    gold: str | None = None
    """A file of such a type with the gold scores; not needed when the table has a column gold."""
    gold_key: str | None = None
    """Name of the gold scores, in a file of several arrays."""
    rows: str | None = None
    """For states of two axes: a .parquet, .csv, .jsonl or .json file with one row per state. A
    column prompt or prompt_id is required; gold, model, split and subset are optional."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps these fields to columns of the table, where names differ; "" leaves the field out."""
    split: str | None = Field(default=None, min_length=1)
    """The split that the states go to. Default: the table's split column, or else the name of the
    states file without its suffix."""
    order: Order | None = None
    """For states of three axes: what the first axis is. Default: the longer of the first two axes
    is the prompts; required when they are equally long."""
    models: str | None = None
    """For states of three axes: a text file with one response model per line, in the order of the
    responses axis."""
    pairs: PairRule = PairRule()
    """How pairs are derived; `pairs = { per_prompt = 0 }` derives none."""
    holdout: Holdout | None = None
    """Moves a share of the prompts, with all their states, to another split."""

    @field_validator("pairs")
    @classmethod
    def _no_lengths(cls, pairs: PairRule) -> PairRule:
        if pairs.length_balanced:
            raise ValueError(
                "the lengths of adopted responses are unknown: leave length_balanced out"
            )
        return pairs

    @model_validator(mode="after")
    def _has_gold(self) -> "ArraySource":
        if self.gold is None and self.rows is None:
            raise ValueError(
                f"states = {self.states!r} have no gold scores: add gold (an array), or rows "
                "(a table) for states of two axes"
            )
        return self


class AdoptSpec(Spec):
    """Arrays that become one cache."""

    arrays: tuple[ArraySource, ...] = Field(min_length=1)
    """One `[[arrays]]` table per array."""


def parse_arrays(
    states: Sequence[str],
    gold: Sequence[str],
    rows: Sequence[str],
    *,
    order: str | None,
    models: str | None,
    pairs: str | None,
) -> AdoptSpec:
    """Build the spec from command-line options: files as `[SPLIT=]PATH`, matched by their splits.

    order, models and pairs apply to all arrays; pairs has keys of `PairRule` in TOML, such as
    "per_prompt = 4, gap = 0.5".

    Raises: UserError for a split given twice, or for gold or rows of a split without states.
    """
    found = _by_split("states", states)
    parts = {"gold": _by_split("gold", gold), "rows": _by_split("rows", rows)}
    for option, files in parts.items():
        for split, path in files.items():
            if split not in found:
                written = path if split is None else f"{split}={path}"
                raise UserError(
                    f"{option} (--{option}) = {quoted(written)}: no states (--states) have that "
                    "split: write both as "
                    "SPLIT=PATH"
                )
    shared = {"order": order, "models": models, "pairs": _rule(pairs)}
    arrays = [
        {"split": split, "states": path}
        | {name: files[split] for name, files in parts.items() if split in files}
        | {name: value for name, value in shared.items() if value is not None}
        for split, path in found.items()
    ]
    return AdoptSpec.parse({"arrays": arrays}, "command line")


def _by_split(option: str, entries: Sequence[str]) -> dict[str | None, str]:
    found: dict[str | None, str] = {}
    for text in entries:
        split, place = None, text
        if "=" in text and not Path(text).exists():
            split, _, place = text.partition("=")
        if split == "" or not place:
            raise UserError(f"{option} (--{option}) = {quoted(text)}: write [SPLIT=]PATH")
        if split in found:
            raise UserError(
                f"{option} (--{option}) = {quoted(text)}: {quoted(found[split])} has the same "
                "split: name another"
            )
        found[split] = place
    return found


def _rule(text: str | None) -> object:
    if text is None:
        return None
    try:
        return tomllib.loads(f"pairs = {{ {text} }}")["pairs"]
    except tomllib.TOMLDecodeError:
        raise UserError(
            f"pairs (--pairs) = {quoted(text)}: write keys and values, such as 'per_prompt = 4, "
            "gap = 0.5'"
        ) from None
