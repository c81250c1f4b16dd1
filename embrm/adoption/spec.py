"""What is adopted: arrays of states, gold scores, and how one is read with the other."""

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
    scores of the same two axes, or (rows, width) with a table of rows."""

    states: str
    """A .npy, .pt or .safetensors file."""
    key: str | None = None
    """Name of the states in a file of several arrays."""
    gold: str | None = None
    """Gold scores, an array in such a file; may be left out when the table has a column gold."""
    gold_key: str | None = None
    """Their name in a file of several arrays."""
    rows: str | None = None
    """For states of two axes: a .parquet, .csv, .jsonl or .json file with one row per state,
    columns prompt or prompt_id, and gold, model, split, subset where there are any."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field -> column of that table, where they differ; "" leaves the field out."""
    split: str | None = Field(default=None, min_length=1)
    """The split its rows go to; else the table's split column, else the file's stem."""
    order: Order | None = None
    """The first axis of three; needed when it is as long as the second: the longer is taken for the
    prompts."""
    models: str | None = None
    """A text file: the model of each of a prompt's responses, one a line; for states of three axes.
    """
    pairs: PairRule = PairRule()
    """How pairs are derived; `pairs = { per_prompt = 0 }` for none."""
    holdout: Holdout | None = None
    """Whole prompts moved to another split."""

    @field_validator("pairs")
    @classmethod
    def _no_lengths(cls, pairs: PairRule) -> PairRule:
        if pairs.length_balanced:
            raise ValueError("the lengths of adopted responses are unknown: leave it out")
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
    """A `[[arrays]]` table each."""


def parse_arrays(
    states: Sequence[str],
    gold: Sequence[str],
    rows: Sequence[str],
    *,
    order: str | None,
    models: str | None,
    pairs: str | None,
) -> AdoptSpec:
    """The spec of a command line: files as `[SPLIT=]PATH`, joined by their splits.

    pairs: keys of `PairRule`, such as "per_prompt = 4, gap = 0.5".
    Raises: UserError for what is given twice, or for a split without states.
    """
    found = _by_split("--states", states)
    parts = {"gold": _by_split("--gold", gold), "rows": _by_split("--rows", rows)}
    for option, files in parts.items():
        for split, path in files.items():
            if split not in found:
                written = path if split is None else f"{split}={path}"
                raise UserError(
                    f"--{option} {quoted(written)}: no --states of that split: write both as "
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
            raise UserError(f"{option} {quoted(text)}: write [SPLIT=]PATH")
        if split in found:
            raise UserError(
                f"{option} {quoted(text)}: {quoted(found[split])} has the same split: name another"
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
            f"--pairs {quoted(text)}: write keys and values, such as 'per_prompt = 4, gap = 0.5'"
        ) from None
