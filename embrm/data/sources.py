"""Sources: reads a file, hub dataset or benchmark named by the user into canonical columns."""

import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from embrm.core.errors import UserError, nearest
from embrm.core.specs import Spec
from embrm.core.text import first_line, quoted
from embrm.data.groups import PairRule
from embrm.data.splits import Holdout
from embrm.data.tables import READERS, Choose, Columns, read_file
from embrm.suites.layouts import arrange, layout_of
from embrm.suites.registry import SUITES
from embrm.suites.suite import Layout

FIELDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "chosen": ("chosen", "chosen_conversation"),
    "rejected": ("rejected", "rejected_conversation"),
    "chosen_model": ("chosen_model", "chosen_gen"),
    "rejected_model": ("rejected_model", "rejected_gen"),
    "margin": ("margin",),
    "label": ("label",),
    "weight": ("weight",),
    "response": ("response", "completion", "output"),
    "model": ("model", "generator", "source"),
    "gold": ("gold", "score", "reward"),
    "best": ("best",),
    "best_model": ("best_model", "best_gen"),
    "losers": ("losers",),
    "loser_models": ("loser_models", "loser_gens"),
    "subset": ("subset", "domain"),
    "split": ("split",),
}
"""Canonical fields, and the column names that are recognized for each without a mapping.

The first name that a dataset has is used. `label` is the probability that chosen is the better
response, in [0, 1]; `weight` is at least 0.
"""


class SourceSpec(Spec):
    """One dataset: a local file (`path`) or a hub dataset (`hub`), and how to read it."""

    path: str | None = None
    """A .jsonl, .json, .csv or .parquet file."""
    hub: str | None = None
    """A dataset id "owner/name" on the Hugging Face hub; needs the extra `extract`."""
    config: str | None = None
    """Configuration of the hub dataset, if it has several."""
    revision: str | None = None
    """Branch, tag or commit of the hub dataset."""
    hub_split: str | None = None
    """The split of the hub dataset to read; all splits if not given."""
    split: str | None = Field(default=None, min_length=1)
    """The split that the rows go to. Default: the file's split column, or else the hub split or the
    file name without its suffix."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps fields to columns of the file, where their names differ. Fields: prompt, chosen,
    rejected, response, model, gold, margin, label, weight, subset, split, best, losers,
    chosen_model, rejected_model, best_model and loser_models. "" leaves the field out, even if the
    file has a column whose name is recognized for it."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Keep only the rows that have these values in these columns of the file."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows of each split, from the first on; for groups, this many prompts."""
    holdout: Holdout | None = None
    """Moves a share of the prompts, with all their rows, to another split: see below."""
    pairs: PairRule = PairRule()
    """How pairs are derived from groups; `pairs = { per_prompt = 0 }` derives none."""
    # Serialized only when set, so that caches written before this key existed keep their identity.
    suite: str | None = Field(default=None, exclude_if=operator.not_)
    """Read a benchmark, such as "rm-bench", in its published layout: from where it is published, or
    from a copy at path or hub. Its rows go to the split "ood/SUITE" unless split says otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _suite_is_known(cls, values: Any) -> Any:
        suite = values.get("suite") if isinstance(values, dict) else None
        if not isinstance(suite, str):
            return values
        if suite not in SUITES:
            raise ValueError(f"no suite {quoted(suite)}: {nearest(suite, SUITES)}")
        known = SUITES[suite]
        filled = {"split": f"ood/{suite}", **values}
        if known.groups:
            filled.setdefault("pairs", {"per_prompt": 0})
        if filled.get("path") is None:
            filled["hub"] = filled.get("hub") or known.hub
            if filled["hub"] == known.hub:
                filled["hub_split"] = filled.get("hub_split") or known.hub_split
        return filled

    @field_validator("columns")
    @classmethod
    def _fields_exist(cls, columns: dict[str, str]) -> dict[str, str]:
        for field, column in columns.items():
            if field not in FIELDS and column in FIELDS:
                raise ValueError(
                    f"no field {quoted(field)}: the field comes first, write "
                    f"columns = {{ {column} = {json.dumps(field)} }}"
                )
            if field not in FIELDS:
                raise ValueError(f"no field {quoted(field)}: {nearest(field, FIELDS)}")
        return columns

    @model_validator(mode="after")
    def _one_place(self) -> "SourceSpec":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a dataset has either path or hub: name exactly one")
        if self.suite and self.columns:
            raise ValueError("a suite knows its columns: leave columns out, or suite")
        if self.hub is None:
            for key in ("config", "revision", "hub_split"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to a hub dataset: leave it out beside path")
        return self

    @property
    def name(self) -> str:
        """Name in errors and exclusions: the hub id, or the file with its parent folder."""
        return self.hub if self.hub else "/".join(Path(self.path or "").parts[-2:])


@dataclass(frozen=True)
class SourceTable:
    """The rows of one source as columns, before their form is detected."""

    name: str
    place: str
    """Where it is, as the `[[data]]` table of a spec says it."""
    found: tuple[str, ...]
    """Names of all columns of the file."""
    columns: Columns
    """Canonical field -> values, one per row; None for a missing value."""
    rows: list[int]
    """Position of each row in the file, from 0."""
    split: str
    """The split of rows without a split column: the file name without its suffix."""
    undecided: tuple[int, ...] = ()
    """Positions of a benchmark's rows that state no preference: ties, or all responses alike."""


def parse_source(text: str) -> SourceSpec:
    """Parse a --data argument: `[SPLIT=][SUITE@]PATH_OR_HUB_ID`, or `[SPLIT=]SUITE` for a benchmark
    from where it is published. Text that names an existing file is a path, not a hub id.

    Raises: UserError for text of another form.
    """
    split, place = None, text
    if "=" in text and not Path(text).exists():
        split, _, place = text.partition("=")
    if split == "" or not place:
        raise UserError(f"data (--data) = {quoted(text)}: write [SPLIT=]PATH_OR_HUB_ID")
    values: dict[str, str] = {} if split is None else {"split": split}
    suite, at, rest = place.partition("@")
    if suite in SUITES and not Path(place).exists():
        values["suite"], place = suite, rest
        if not at:
            return SourceSpec.parse(values, "command line")
    named, colon, rest = place.partition(":")
    if split is None and colon and not Path(place).exists() and Path(rest).exists():
        raise UserError(f"data (--data) = {quoted(text)}: write SPLIT=PATH, {named}={rest}")
    is_file = Path(place).exists() or Path(place).suffix in READERS
    is_hub = not is_file and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place)
    return SourceSpec.parse({"hub" if is_hub else "path": place, **values}, "command line")


def read_rows(spec: SourceSpec) -> SourceTable:
    """Read a source and apply its column mapping, `where` and, for a benchmark, its layout.

    Raises: UserError for a missing or unreadable file, a missing column, or no rows.
    """
    found: list[str] = []
    used: dict[str, str] = {}
    layouts: list[Layout] = []

    def choose(names: Sequence[str]) -> list[str]:
        if not names:
            return []
        found.extend(names)
        used.update(_used_columns(spec, names))
        if spec.suite:
            layouts.append(layout_of(spec.suite, spec.name, names))
            used.clear()
            used.update({name: name for name in layouts[0].columns(names)})
        return sorted({*used.values(), *spec.where})

    if spec.hub is not None:
        raw, rows = _read_hub(spec, choose)
    else:
        raw, rows = read_file(Path(spec.path or ""), choose)
    if not rows:
        raise UserError(f"{spec.name} has no rows: name a file that has some")
    kept: Sequence[int] = range(len(rows))
    for column, value in spec.where.items():
        cells = raw[column]
        matching = [index for index in kept if _matches(cells[index], value)]
        if not matching:
            values = sorted({quoted(cells[index]) for index in kept})[:8]
            raise UserError(
                f"{spec.name}: where {column} = {value!r} keeps no row: "
                f"the column has {', '.join(values)}"
            )
        kept = matching
    columns = {
        field: raw[column] if len(kept) == len(rows) else [raw[column][index] for index in kept]
        for field, column in used.items()
    }
    rows = [rows[index] for index in kept]
    undecided: list[int] = []
    if spec.suite:
        columns, rows, undecided = arrange(
            spec.suite, spec.name, layouts[0], columns, rows, spec.config or _benchmark(spec)
        )
    return SourceTable(
        name=spec.name,
        place=f"hub = {json.dumps(spec.hub)}" if spec.hub else f"path = {json.dumps(spec.path)}",
        found=tuple(found),
        columns=columns,
        rows=rows,
        split=Path(spec.path or spec.name).stem,
        undecided=tuple(undecided),
    )


def _benchmark(spec: SourceSpec) -> str:
    """The benchmark's name in PPE: "MATH" for a path with "PPE-MATH-Best-of-K"; else the stem."""
    place = Path(spec.path or spec.name)
    for part in reversed(place.parts):
        if found := re.match(r"(?:.*PPE-)?(.+)-Best-of-K", part):
            return found[1]
    return place.stem


def _used_columns(spec: SourceSpec, found: Sequence[str]) -> dict[str, str]:
    """Canonical field -> column: from the spec's mapping first, then by recognized names."""
    used = {field: column for field, column in spec.columns.items() if column}
    for column in [*used.values(), *spec.where]:
        if column not in found:
            key = "where" if column in spec.where else "columns"
            raise UserError(
                f"{spec.name}: {key} names {quoted(column)}, which is not a column: "
                f"{nearest(column, [name for name in found if name.isprintable()][:50])}"
            )
    for field, names in FIELDS.items():
        if field not in spec.columns:
            known = next((name for name in names if name in found), None)
            if known is not None and known not in spec.columns.values():
                used[field] = known
    return used


def _matches(cell: object, value: str | int | float | bool) -> bool:
    if isinstance(cell, str) and not isinstance(value, str):  # all cells of a CSV file are text
        return cell.strip().lower() == str(value).lower()
    return cell == value and isinstance(cell, bool) == isinstance(value, bool)


def _read_hub(spec: SourceSpec, choose: Choose) -> tuple[Columns, list[int]]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{spec.name}: reading from the hub needs the package datasets: "
            "pip install '.[extract]' in embrm's source folder"
        ) from None
    try:
        loaded = datasets.load_dataset(
            spec.hub, name=spec.config, revision=spec.revision, split=spec.hub_split
        )
    except Exception as error:  # the hub client raises from many libraries
        raise UserError(
            f"{spec.name}: not a file here, and the hub did not give it ({first_line(error)}): "
            "check the id, config, revision, hub_split and network, or download it and name a file"
        ) from None
    parts = {spec.hub_split: loaded} if spec.hub_split else dict(loaded)
    names = list(dict.fromkeys(name for part in parts.values() for name in part.column_names))
    split_column = spec.columns.get("split") or "split"
    chosen = choose(names if split_column in names else [*names, split_column])
    columns: Columns = {name: [] for name in chosen}
    rows: list[int] = []
    for split, part in parts.items():
        present = [name for name in chosen if name in part.column_names]
        cells = part.select_columns(present).to_dict() if present else {}
        for name in chosen:
            missing = split if name == split_column and name not in names else None
            columns[name].extend(cells.get(name, [missing] * part.num_rows))
        rows.extend(range(part.num_rows))
    return columns, rows
