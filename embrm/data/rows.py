"""Rows: reads one source, checks each of its rows and adds them to the collector."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from embrm.core.errors import UserError
from embrm.core.text import listed, quoted
from embrm.data.collector import Collector, Place
from embrm.data.forms import Form, Record, RowError, canonical, detect
from embrm.data.groups import Member, pair_members
from embrm.data.labels import finite_number, pair_numbers
from embrm.data.sources import SourceSpec, SourceTable, read_rows
from embrm.data.splits import holdout
from embrm.suites.registry import SUITES


def add_source(collector: Collector, spec: SourceSpec) -> dict[str, Any]:
    """Add a source's rows to the collector; returns its entry in `Dataset.rules`.

    Raises: UserError as `read_rows` and `detect` do, when the spec names a split and the file has
    several, and when every row is excluded, with the reasons counted.
    """
    table = read_rows(spec)
    source = _Source(collector, spec, table, detect(table))
    splits = _splits(table, spec)
    for row in table.undecided:
        place = Place(table.name, row, spec.split or table.split, None)
        collector.exclude(place, "no_preference", "a tie, or all responses alike")
    before = [len(part["row"]) for part in (collector.pairs, collector.members)]
    excluded = len(collector.exclusions["row"])
    for index in _limited(table, source.form, splits, spec.limit):
        source.add(index, splits[index])
    source.pair_groups()
    if before == [len(part["row"]) for part in (collector.pairs, collector.members)]:
        reasons, details = (collector.exclusions[key][excluded:] for key in ("reason", "detail"))
        remedy = "check columns and where"
        if set(reasons) == {"nan_label"}:
            column = details[0].split()[0]  # the detail of a nan_label begins with the field
            remedy = (
                f"fix that column, or leave it out, in a spec: [[data]] {table.place}, "
                f'columns = {{ {column} = "" }}'
            )
        raise UserError(
            f"{spec.name}: every row was excluded: {reason_summary(reasons, details)}; {remedy}"
        )
    return _rules(spec, source.form, len(table.rows))


@dataclass(frozen=True)
class _Source:
    """A source while its rows are added to the collector."""

    collector: Collector
    spec: SourceSpec
    table: SourceTable
    form: Form
    groups: dict[tuple[str, str], list[Member]] = field(default_factory=dict)
    """Members by (split, prompt_id), when the shape is groups."""
    places: list[Place] = field(default_factory=list)
    """The place of each member in `groups`; `Member.row` is the index."""

    @property
    def repeats(self) -> bool:
        """Whether a pair or member that occurs again is kept, as a benchmark's own tool does."""
        return self.spec.suite is not None and SUITES[self.spec.suite].merge is None

    def add(self, index: int, split: str | None) -> None:
        """Add row `index` of the table, or record why it is excluded."""
        place = Place(
            self.table.name, self.table.rows[index], split or "", _name(self.cell("subset", index))
        )
        add = {"pairs": self._pair, "groups": self._member, "best_of_n": self._best}
        try:
            if split is None:
                raise RowError("missing_value", "split is null")
            add[self.form.shape](index, place)
        except RowError as error:
            self.collector.exclude(place, *error.args)

    def cell(self, field: str, index: int) -> Any:
        """The value of a field in a row; None without such a column."""
        column = self.table.columns.get(field)
        return None if column is None else column[index]

    def _pair(self, index: int, place: Place) -> None:
        chosen, rejected = self.cell("chosen", index), self.cell("rejected", index)
        if chosen and chosen == rejected:
            raise RowError("identical", quoted(chosen))
        record = canonical(self.form, self.cell("prompt", index), (chosen, rejected))
        models = self.cell("chosen_model", index), self.cell("rejected_model", index)
        self._store(place, record, pair_numbers(self.table.columns, index), models)

    def _best(self, index: int, place: Place) -> None:
        best, losers = self.cell("best", index), self.cell("losers", index)
        if losers is None:
            raise RowError("missing_value", "losers is null")
        if not isinstance(losers, list) or not losers:
            raise RowError("wrong_form", f"losers is {quoted(losers)}, not a list of responses")
        models = self.cell("loser_models", index) or [None] * len(losers)
        if not isinstance(models, list) or len(models) != len(losers):
            raise RowError(
                "wrong_form", f"{len(losers)} losers, but loser_models is {quoted(models)}"
            )
        prompt = self.cell("prompt", index)
        if self.form.prompt == "implicit":
            # The prompt is what all completions share; a pair of them may share more.
            together = canonical(self.form, None, (best, *losers))
        for position, (loser, model) in enumerate(zip(losers, models, strict=True)):
            try:
                if self.form.prompt == "implicit":
                    record = together.pick(0, position + 1)
                else:
                    record = canonical(self.form, prompt, (best, loser))
                models_of_pair = self.cell("best_model", index), model
                self._store(place, record, (None, 1.0, 1.0), models_of_pair)
            except RowError as error:
                reason, detail = error.args
                self.collector.exclude(place, reason, f"loser {position}: {detail}")

    def _store(
        self,
        place: Place,
        record: Record,
        margin_label_weight: tuple[float | None, float, float],
        models: tuple[object, object],
    ) -> None:
        if record.responses[0] == record.responses[1]:
            raise RowError("identical", quoted(record.responses[0]))
        chosen_rejected = self.collector.response(record, 0), self.collector.response(record, 1)
        names = _name(models[0]), _name(models[1])
        prompt_id = self.collector.prompt_id(record)
        place = self._after_holdout(place, prompt_id)
        self.collector.pair(
            place, prompt_id, chosen_rejected, margin_label_weight, names, self.repeats
        )

    def _member(self, index: int, place: Place) -> None:
        record = canonical(self.form, self.cell("prompt", index), (self.cell("response", index),))
        gold = finite_number(self.cell("gold", index), "gold", "nan_gold")
        if gold is None:
            raise RowError("missing_value", "gold is null")
        prompt_id, response = self.collector.prompt_id(record), self.collector.response(record, 0)
        place = self._after_holdout(place, prompt_id)
        model = _name(self.cell("model", index))
        if self.collector.member(place, prompt_id, response, model, gold, self.repeats):
            response_id = self.collector.responses["response_id"][response]
            length, row = record.lengths[0], len(self.places)
            member = Member(response, response_id, gold, length, model, row)
            self.groups.setdefault((place.split, prompt_id), []).append(member)
            self.places.append(place)

    def _after_holdout(self, place: Place, prompt_id: str) -> Place:
        """The place with the split that `spec.holdout` moves the prompt to, if it does."""
        rule = self.spec.holdout
        if rule and holdout([prompt_id], rule.fraction, rule.seed, "holdout")[0]:
            return replace(place, split=rule.split)
        return place

    def pair_groups(self) -> None:
        """Derive pairs from the groups, once all rows are added."""
        for (_, prompt_id), group in self.groups.items():
            for chosen, rejected, margin in pair_members(group, self.spec.pairs, prompt_id):
                self.collector.pair(
                    self.places[chosen.row],
                    prompt_id,
                    (chosen.response, rejected.response),
                    (margin, 1.0, 1.0),
                    (chosen.model, rejected.model),
                )


def _splits(table: SourceTable, spec: SourceSpec) -> list[str | None]:
    """The split of each row, before holdout; None where the split column is empty.

    Raises: UserError when the spec names a split and the file's split column has several.
    """
    cells = [_name(cell) or None for cell in table.columns.get("split") or []]
    if spec.split is not None:
        names = sorted({name for name in cells if name is not None})
        if len(names) > 1:
            column = spec.columns.get("split", "split")
            raise UserError(
                f"{spec.name}: split {spec.split!r} was given, but its split column has "
                f"{listed(names)}: leave the split out, or select one in a spec: "
                f"[[data]] {table.place}, where = {{ {column} = {json.dumps(names[0])} }}"
            )
        return [spec.split] * len(table.rows)
    if cells:
        return cells
    return [table.split] * len(table.rows)


def _limited(
    table: SourceTable, form: Form, splits: list[str | None], limit: int | None
) -> Iterable[int]:
    """Positions of the rows to use: the first `limit` rows, or prompts of groups, per split."""
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


def _name(value: object) -> str | None:
    """The name of a split, subset or model as valid Unicode text."""
    return None if value is None else str(value).encode(errors="replace").decode()


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
    if spec.suite:
        rules["suite"] = spec.suite
    return rules


def reason_summary(reasons: Iterable[str], details: Sequence[str]) -> str:
    """Count exclusions by reason, such as "3 identical, 2 empty_response (first: 'yes')".

    The most frequent reason comes first. The details are printable: they quote data with `quoted`.
    """
    counted = ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
    return f"{counted} (first: {details[0]})"
