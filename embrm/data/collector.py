"""The collector: accumulates the tables of a dataset, row by row, while its sources are read."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import polars as pl

from embrm.data.forms import Record

Schema = dict[str, type[pl.DataType]]

RESPONSES: Schema = {
    "response_id": pl.String,
    "prompt_id": pl.String,
    "kind": pl.String,
    "prompt": pl.String,
    "response": pl.String,
}
PAIRS: Schema = {
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
MEMBERS: Schema = {
    "split": pl.String,
    "subset": pl.String,
    "prompt_id": pl.String,
    "response": pl.Int32,
    "model": pl.String,
    "gold": pl.Float64,
    "source": pl.String,
    "row": pl.Int64,
}
EXCLUSIONS: Schema = {
    "source": pl.String,
    "row": pl.Int64,
    "split": pl.String,
    "reason": pl.String,
    "detail": pl.String,
}


@dataclass(frozen=True)
class Place:
    """The file and row that an entry was read from, and the split and subset it goes to."""

    source: str
    row: int
    split: str
    subset: str | None


class Collector:
    """Tables of responses, pairs, group members and exclusions, as growing lists per column."""

    def __init__(self) -> None:
        self.responses: dict[str, list[Any]] = {name: [] for name in RESPONSES}
        self.pairs: dict[str, list[Any]] = {name: [] for name in PAIRS}
        self.members: dict[str, list[Any]] = {name: [] for name in MEMBERS}
        self.exclusions: dict[str, list[Any]] = {name: [] for name in EXCLUSIONS}
        self._prompt_ids: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, int] = {}
        self._seen: set[object] = set()
        self._repeats: Counter[str] = Counter()

    def prompt_id(self, record: Record) -> str:
        """The id of a record's prompt: a hash of its kind and text."""
        key = (record.kind, record.prompt)
        if key not in self._prompt_ids:
            self._prompt_ids[key] = _hash(record.kind, record.prompt)
        return self._prompt_ids[key]

    def response(self, record: Record, position: int) -> int:
        """Return the row number of a response in `responses`; a new response is added first."""
        prompt_id, text = self.prompt_id(record), record.responses[position]
        response_id = _hash(prompt_id, text)
        if response_id not in self._numbers:
            self._numbers[response_id] = len(self._numbers)
            values = (response_id, prompt_id, record.kind, record.prompt, text)
            _append(self.responses, values)
        return self._numbers[response_id]

    def pair(
        self,
        place: Place,
        prompt_id: str,
        chosen_rejected: tuple[int, int],
        margin_label_weight: tuple[float | None, float, float],
        models: tuple[str | None, str | None],
        repeats: bool = False,
    ) -> None:
        """Add a pair, given as row numbers in `responses`.

        A pair that its split already has is listed as a duplicate instead or, with `repeats`, added
        once more under an id of its own: benchmarks' own tools score every row of their files.
        """
        ids = self.responses["response_id"]
        chosen, rejected = chosen_rejected
        pair_id = pair_id_of(place.split, ids[chosen], ids[rejected])
        if pair_id in self._seen:
            if not repeats:
                self.exclude(place, "duplicate", f"pair {pair_id} is in this split already")
                return
            self._repeats[pair_id] += 1
            pair_id = _hash(pair_id, str(self._repeats[pair_id]))
        self._seen.add(pair_id)
        values = (pair_id, place.split, place.subset, prompt_id, chosen, rejected)
        _append(self.pairs, (*values, *margin_label_weight, *models, place.source, place.row))

    def member(
        self,
        place: Place,
        prompt_id: str,
        response: int,
        model: str | None,
        gold: float,
        repeats: bool = False,
    ) -> bool:
        """Add a member of a group. Returns False if it exists already; then it is listed as a
        duplicate or, with `repeats`, added once more, as in `pair`."""
        key = (place.split, response, model, gold)
        known = key in self._seen
        if known and not repeats:
            self.exclude(place, "duplicate", "same response, model and gold score")
            return False
        self._seen.add(key)
        values = (place.split, place.subset, prompt_id, response, model, gold)
        _append(self.members, (*values, place.source, place.row))
        return not known

    def exclude(self, place: Place, reason: str, detail: str) -> None:
        """Record why a row, pair or member is left out of the dataset."""
        _append(self.exclusions, (place.source, place.row, place.split, reason, detail))

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables collected so far, by name: the fields of `Dataset` that are tables."""
        return {
            "responses": pl.DataFrame(self.responses, schema=RESPONSES),
            "pairs": pl.DataFrame(self.pairs, schema=PAIRS),
            "members": pl.DataFrame(self.members, schema=MEMBERS),
            "exclusions": pl.DataFrame(self.exclusions, schema=EXCLUSIONS),
        }


def _append(columns: dict[str, list[Any]], values: Iterable[object]) -> None:
    for column, value in zip(columns.values(), values, strict=True):
        column.append(value)


def pair_id_of(split: str, chosen_id: str, rejected_id: str) -> str:
    """The id of a pair: a hash of its split and the ids of its responses."""
    return _hash(split, chosen_id, rejected_id)


def _hash(*parts: str) -> str:
    """16 hex digits of BLAKE2b over the parts, each preceded by its length."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        content = part.encode()
        state.update(len(content).to_bytes(8, "big"))
        state.update(content)
    return state.hexdigest()
