"""The canonical dataset: responses stored once, pairs and group members as indices into them."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from embrm.data.forms import Form, Record, RowError, canonical, detect
from embrm.data.groups import PairRule, derive_pairs
from embrm.data.sources import SourceSpec, Table, listed, quoted, read_rows
from embrm.data.splits import holdout
from embrm.errors import UserError
from embrm.specs import canonical_json

_Schema = dict[str, type[pl.DataType]]

RESPONSES: _Schema = {
    "response_id": pl.String,
    "prompt_id": pl.String,
    "kind": pl.String,
    "prompt": pl.String,
    "response": pl.String,
}
PAIRS: _Schema = {
    "pair_id": pl.String,
    "split": pl.String,
    "subset": pl.String,
    "prompt_id": pl.String,
    "chosen": pl.Int32,
    "rejected": pl.Int32,
    "margin": pl.Float64,
    "label": pl.Float64,
    "weight": pl.Float64,
    "chosen_model": pl.String,
    "rejected_model": pl.String,
    "source": pl.String,
    "row": pl.Int64,
}
MEMBERS: _Schema = {
    "split": pl.String,
    "subset": pl.String,
    "prompt_id": pl.String,
    "response": pl.Int32,
    "model": pl.String,
    "gold": pl.Float64,
    "source": pl.String,
    "row": pl.Int64,
}
EXCLUSIONS: _Schema = {
    "source": pl.String,
    "row": pl.Int64,
    "split": pl.String,
    "reason": pl.String,
    "detail": pl.String,
}


@dataclass(frozen=True)
class Dataset:
    """Preference data in canonical form. Tables have the schemas above.

    responses: one row a distinct (kind, prompt, response), in order of first appearance.
        response_id and prompt_id are content hashes (16 hex digits). kind "text": prompt and
        response are strings; kind "chat": both are JSON lists of {"role", "content"} messages.
    pairs: chosen and rejected are row numbers of `responses`; label is the probability that chosen
        is better; margin is null where unknown; `row` counts from 0 in the file `source`.
        Pairs derived from a group carry the row of their chosen response.
    members: the rows of groups; response is a row number of `responses`, gold in the data's units.
    exclusions: rows, pairs and members left out, with reason and detail.
    rules: per source, the form found and the rules applied. Holds no paths beyond source names.
    """

    responses: pl.DataFrame
    pairs: pl.DataFrame
    members: pl.DataFrame
    exclusions: pl.DataFrame
    rules: dict[str, Any]

    def digest(self) -> str:
        """SHA-256 hex over response ids, pairs and members in order: independent of file names."""
        content = {
            "responses": self.responses.select("response_id"),
            "pairs": self.pairs.drop("source", "row"),
            "members": self.members.drop("source", "row"),
        }
        state = hashlib.sha256()
        for name, table in content.items():
            for column in table.get_columns():
                state.update(canonical_json([name, column.name, column.to_list()]).encode())
        return state.hexdigest()

    def without(
        self, responses: pl.DataFrame | None = None, pairs: pl.DataFrame | None = None
    ) -> "Dataset":
        """Leave out responses, with the pairs and members that use them, and single pairs.

        responses: columns response (row number), reason, detail. pairs: columns pair (row number),
        reason, detail. Each pair and member that goes is listed in exclusions. Responses that
        nothing uses any more go too, and the rest is renumbered, order kept.

        Raises: UserError when nothing is left.
        """
        gone = _reasons(responses, "response")
        pairs_left, pairs_lost = _divide(
            self.pairs.with_row_index("pair"),
            [("pair", _reasons(pairs, "pair")), ("chosen", gone), ("rejected", gone)],
        )
        members_left, members_lost = _divide(self.members, [("response", gone)])
        lost = pl.concat([pairs_lost, members_lost])
        if pairs_left.is_empty() and members_left.is_empty():
            raise UserError(f"every row was excluded: {_counts(lost['reason'])}")
        used = pl.concat(
            [pairs_left["chosen"], pairs_left["rejected"], members_left["response"]]
        ).unique()
        kept = np.zeros(self.responses.height, dtype=np.bool_)
        kept[used.to_numpy()] = True
        number = pl.Series("number", np.cumsum(kept) - 1, dtype=pl.Int32)

        def renumbered(table: pl.DataFrame, *columns: str) -> pl.DataFrame:
            return table.with_columns(number.gather(table[name]).alias(name) for name in columns)

        return Dataset(
            responses=self.responses.filter(pl.Series(kept)),
            pairs=renumbered(pairs_left.drop("pair"), "chosen", "rejected"),
            members=renumbered(members_left, "response"),
            exclusions=pl.concat([self.exclusions, lost]),
            rules=self.rules,
        )


def load(sources: Sequence[SourceSpec]) -> Dataset:
    """Read all sources into one dataset.

    Raises: UserError for what `read_rows` and `detect` refuse, for a split named twice over, and
    when a source has no rows left, with the reasons counted.
    """
    if not sources:
        raise UserError("no dataset given: name at least one")
    collector = _Collector()
    for spec in sources:
        _add_source(collector, spec)
    return collector.dataset()


_Group = list[tuple[int, float, int, str | None, str | None, int]]
"""response, gold, characters, model, subset, row of each member."""


class _Collector:
    """The tables while they grow, column by column."""

    def __init__(self) -> None:
        self.responses: dict[str, list[Any]] = {name: [] for name in RESPONSES}
        self.pairs: dict[str, list[Any]] = {name: [] for name in PAIRS}
        self.members: dict[str, list[Any]] = {name: [] for name in MEMBERS}
        self.exclusions: dict[str, list[Any]] = {name: [] for name in EXCLUSIONS}
        self.rules: list[dict[str, Any]] = []
        self._prompt_ids: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, int] = {}
        self._seen: set[object] = set()

    def prompt_id(self, record: Record) -> str:
        key = (record.kind, record.prompt)
        if key not in self._prompt_ids:
            self._prompt_ids[key] = _hash(record.kind, record.prompt)
        return self._prompt_ids[key]

    def response(self, record: Record, position: int) -> int:
        """The row number of a response, stored on first sight."""
        prompt_id, text = self.prompt_id(record), record.responses[position]
        response_id = _hash(prompt_id, text)
        if response_id not in self._numbers:
            self._numbers[response_id] = len(self._numbers)
            values = (response_id, prompt_id, record.kind, record.prompt, text)
            _append(self.responses, values)
        return self._numbers[response_id]

    def pair(
        self,
        place: "_Place",
        prompt_id: str,
        ends: tuple[int, int],
        numbers: tuple[float | None, float, float],
        models: tuple[str | None, str | None],
    ) -> None:
        """Store a pair of response row numbers `ends` with its (margin, label, weight)."""
        ids = self.responses["response_id"]
        pair_id = _hash(place.split, ids[ends[0]], ids[ends[1]])
        if pair_id in self._seen:
            self.exclude(place, "duplicate", f"pair {pair_id} is already in split {place.split}")
            return
        self._seen.add(pair_id)
        values = (pair_id, place.split, place.subset, prompt_id, *ends, *numbers, *models)
        _append(self.pairs, (*values, place.source, place.row))

    def member(
        self, place: "_Place", prompt_id: str, response: int, model: str | None, gold: float
    ) -> bool:
        """Store a group's member; false when it is there already."""
        key = (place.split, response, model, gold)
        if key in self._seen:
            self.exclude(place, "duplicate", "same response, model and gold score")
            return False
        self._seen.add(key)
        values = (place.split, place.subset, prompt_id, response, model, gold)
        _append(self.members, (*values, place.source, place.row))
        return True

    def exclude(self, place: "_Place", reason: str, detail: str) -> None:
        _append(self.exclusions, (place.source, place.row, place.split, reason, detail))

    def dataset(self) -> Dataset:
        return Dataset(
            responses=pl.DataFrame(self.responses, schema=RESPONSES),
            pairs=pl.DataFrame(self.pairs, schema=PAIRS),
            members=pl.DataFrame(self.members, schema=MEMBERS),
            exclusions=pl.DataFrame(self.exclusions, schema=EXCLUSIONS),
            rules={"sources": self.rules},
        )


@dataclass(frozen=True)
class _Place:
    """Where a row came from and where it goes."""

    source: str
    row: int
    split: str
    subset: str | None


def _add_source(collector: _Collector, spec: SourceSpec) -> None:
    table = read_rows(spec)
    form = detect(table)
    splits = _splits(table, spec)
    columns = table.columns
    subsets = columns.get("subset") or [None] * len(table.rows)
    before = [len(part["row"]) for part in (collector.pairs, collector.members)]
    excluded = len(collector.exclusions["row"])
    groups: dict[tuple[str, str], _Group] = {}
    for index in _limited(table, form, splits, spec.limit):
        place = _Place(table.name, table.rows[index], splits[index] or "", _name(subsets[index]))
        try:
            if not place.split:
                raise RowError("missing_value", "split is null")
            if form.shape == "groups":
                _add_member(collector, spec, form, table, index, place, groups)
            elif form.shape == "pairs":
                _add_pair(collector, spec, form, table, index, place)
            else:
                _add_best(collector, spec, form, table, index, place)
        except RowError as error:
            collector.exclude(place, *error.args)
    for (split, prompt_id), group in groups.items():
        _pair_group(collector, spec.pairs, table.name, split, prompt_id, group)
    if before == [len(part["row"]) for part in (collector.pairs, collector.members)]:
        counts = _counts(collector.exclusions["reason"][excluded:])
        raise UserError(f"{spec.name}: every row was excluded: {counts}; check columns and where")
    collector.rules.append(_rules(spec, form, len(table.rows)))


def _add_pair(
    collector: _Collector, spec: SourceSpec, form: Form, table: Table, index: int, place: _Place
) -> None:
    columns = table.columns
    record = canonical(
        form,
        _cell(columns, "prompt", index),
        (columns["chosen"][index], columns["rejected"][index]),
    )
    if record.responses[0] == record.responses[1]:
        raise RowError("identical", quoted(record.responses[0]))
    numbers = _pair_numbers(columns, index)
    place = _held_out(collector, spec, record, place)
    collector.pair(
        place,
        collector.prompt_id(record),
        (collector.response(record, 0), collector.response(record, 1)),
        numbers,
        (
            _name(_cell(columns, "chosen_model", index)),
            _name(_cell(columns, "rejected_model", index)),
        ),
    )


def _add_best(
    collector: _Collector, spec: SourceSpec, form: Form, table: Table, index: int, place: _Place
) -> None:
    columns = table.columns
    losers = columns["losers"][index]
    if losers is None:
        raise RowError("missing_value", "losers is null")
    if not isinstance(losers, list) or not losers:
        raise RowError("wrong_form", f"losers is {quoted(losers)}, not a list of responses")
    models = _cell(columns, "loser_models", index) or [None] * len(losers)
    if not isinstance(models, list) or len(models) != len(losers):
        raise RowError("wrong_form", f"{len(losers)} losers, but loser_models is {quoted(models)}")
    prompt, best = _cell(columns, "prompt", index), columns["best"][index]
    best_model = _name(_cell(columns, "best_model", index))
    if form.prompt == "implicit":
        # The prompt is what all completions share, not what each pair of them does.
        together = canonical(form, None, (best, *losers))
        records = [
            Record(together.kind, together.prompt, (together.responses[0], loser), ())
            for loser in together.responses[1:]
        ]
    for position, model in enumerate(models):
        try:
            if form.prompt == "implicit":
                record = records[position]
            else:
                record = canonical(form, prompt, (best, losers[position]))
            if record.responses[0] == record.responses[1]:
                raise RowError("identical", quoted(record.responses[0]))
            target = _held_out(collector, spec, record, place)
            collector.pair(
                target,
                collector.prompt_id(record),
                (collector.response(record, 0), collector.response(record, 1)),
                (None, 1.0, 1.0),
                (best_model, _name(model)),
            )
        except RowError as error:
            reason, detail = error.args
            collector.exclude(place, reason, f"loser {position}: {detail}")


def _add_member(
    collector: _Collector,
    spec: SourceSpec,
    form: Form,
    table: Table,
    index: int,
    place: _Place,
    groups: dict[tuple[str, str], _Group],
) -> None:
    columns = table.columns
    record = canonical(form, columns["prompt"][index], (columns["response"][index],))
    gold = _number(columns["gold"][index], "gold", "nan_gold")
    if gold is None:
        raise RowError("missing_value", "gold is null")
    place = _held_out(collector, spec, record, place)
    prompt_id, response = collector.prompt_id(record), collector.response(record, 0)
    model = _name(_cell(columns, "model", index))
    if collector.member(place, prompt_id, response, model, gold):
        member = (response, gold, record.lengths[0], model, place.subset, place.row)
        groups.setdefault((place.split, prompt_id), []).append(member)


def _pair_group(
    collector: _Collector,
    rule: PairRule,
    source: str,
    split: str,
    prompt_id: str,
    group: _Group,
) -> None:
    """Derive a group's pairs from its distinct responses.

    A response given by several models counts once, with its mean gold score. Sorting by content
    makes the pairs independent of the order of rows.
    """
    ids = collector.responses["response_id"]
    distinct: dict[int, _Group] = {}
    for member in sorted(group, key=lambda item: (ids[item[0]], item[3] or "", item[1])):
        distinct.setdefault(member[0], []).append(member)
    firsts = [members[0] for members in distinct.values()]
    gold = [math.fsum(item[1] for item in same) / len(same) for same in distinct.values()]
    chosen, rejected = derive_pairs(gold, [first[2] for first in firsts], rule, prompt_id)
    for better, worse in zip(chosen.tolist(), rejected.tolist(), strict=True):
        response, _, _, model, subset, row = firsts[better]
        collector.pair(
            _Place(source, row, split, subset),
            prompt_id,
            (response, firsts[worse][0]),
            (gold[better] - gold[worse], 1.0, 1.0),
            (model, firsts[worse][3]),
        )


def _splits(table: Table, spec: SourceSpec) -> list[str | None]:
    """The split of each row, before holdout. Raises: UserError when the spec and file disagree."""
    cells = [_name(cell) or None for cell in table.columns.get("split") or []]
    if spec.split is not None:
        names = sorted({name for name in cells if name is not None})
        if len(names) > 1:
            column = spec.columns.get("split", "split")
            raise UserError(
                f"{spec.name}: split {spec.split!r} was given, but its split column has "
                f"{listed(names)}: leave the split out, or select with "
                f"where = {{ {column} = {json.dumps(names[0])} }}"
            )
        return [spec.split] * len(table.rows)
    if cells:
        return cells
    return [table.split] * len(table.rows)


def _limited(
    table: Table, form: Form, splits: list[str | None], limit: int | None
) -> Iterable[int]:
    """Positions of the rows to use."""
    if limit is None:
        return range(len(table.rows))
    kept = []
    units: dict[str | None, set[object]] = {}
    for index, split in enumerate(splits):
        unit = repr(table.columns["prompt"][index]) if form.shape == "groups" else index
        seen = units.setdefault(split, set())
        if unit in seen or len(seen) < limit:
            seen.add(unit)
            kept.append(index)
    return kept


def _held_out(collector: _Collector, spec: SourceSpec, record: Record, place: _Place) -> _Place:
    rule = spec.holdout
    if rule is None:
        return place
    moved = holdout([collector.prompt_id(record)], rule.fraction, rule.seed, "holdout")[0]
    return _Place(place.source, place.row, rule.split, place.subset) if moved else place


def _pair_numbers(columns: dict[str, list[Any]], index: int) -> tuple[float | None, float, float]:
    """margin, label, weight of a row. Raises: RowError missing_value, nan_label."""
    margin = _number(_cell(columns, "margin", index), "margin", "nan_label")
    label = weight = 1.0
    if "label" in columns:
        found = _number(columns["label"][index], "label", "nan_label")
        if found is None:
            raise RowError("missing_value", "label is null")
        if not 0 <= found <= 1:
            raise RowError("nan_label", f"label out of range: {found!r} is not in [0, 1]")
        label = found
    if "weight" in columns:
        found = _number(columns["weight"][index], "weight", "nan_label")
        if found is None:
            raise RowError("missing_value", "weight is null")
        if found < 0:
            raise RowError("nan_label", f"weight out of range: {found!r} is below 0")
        weight = found
    return margin, label, weight


def _number(value: object, name: str, reason: str) -> float | None:
    """A finite float; None for a missing value. Raises: RowError with `reason`."""
    if value is None or value == "":
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RowError(reason, f"{name} {quoted(value)} is not a number") from None
    if not math.isfinite(number):
        raise RowError(reason, f"{name} is {number}")
    return number


def _cell(columns: dict[str, list[Any]], field: str, index: int) -> Any:
    return columns[field][index] if field in columns else None


def _name(value: object) -> str | None:
    return None if value is None else str(value)


def _append(columns: dict[str, list[Any]], values: Iterable[object]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def _hash(*parts: str) -> str:
    """16 hex digits of BLAKE2b over the parts, each preceded by its length: no two runs collide."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode()
        state.update(len(content).to_bytes(8, "big"))
        state.update(content)
    return state.hexdigest()


def _rules(spec: SourceSpec, form: Form, rows: int) -> dict[str, Any]:
    rules: dict[str, Any] = {
        "source": spec.name,
        "rows": rows,
        "shape": form.shape,
        "format": form.format,
        "prompt": form.prompt,
        "columns": spec.columns,
        "where": spec.where,
        "limit": spec.limit,
        "holdout": spec.holdout.model_dump() if spec.holdout else None,
    }
    if form.shape == "groups":
        rules["pairs"] = spec.pairs.model_dump()
    return rules


_Reasons = dict[int, tuple[str, str]]
"""Row number -> reason, detail."""


def _reasons(table: pl.DataFrame | None, key: str) -> _Reasons:
    rows = [] if table is None else table.select(key, "reason", "detail").rows()
    # The first reason given for a row counts: it is written last.
    return {number: (reason, detail) for number, reason, detail in reversed(rows)}


def _divide(
    table: pl.DataFrame, reasons: Sequence[tuple[str, _Reasons]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(rows that stay, exclusions of rows with a reason); the first column with one counts."""
    why: list[tuple[str, str] | None] = [None] * table.height
    for column, listing in reasons:
        for index, number in enumerate(table[column] if listing else ()):
            why[index] = why[index] or listing.get(number)
    lost = pl.Series([reason is not None for reason in why], dtype=pl.Boolean)
    exclusions = table.filter(lost).with_columns(
        pl.Series("reason", [entry[0] for entry in why if entry], dtype=pl.String),
        pl.Series("detail", [entry[1] for entry in why if entry], dtype=pl.String),
    )
    return table.filter(~lost), exclusions.select(list(EXCLUSIONS))


def _counts(reasons: Iterable[str]) -> str:
    """ "3 identical, 2 empty_response", most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
