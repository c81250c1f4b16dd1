"""The canonical dataset: each response is stored once; pairs and groups refer to it by row."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from embrm.core.errors import UserError
from embrm.core.specs import canonical_json
from embrm.data.collector import EXCLUSIONS, Collector
from embrm.data.rows import add_source, reason_summary
from embrm.data.sources import SourceSpec


@dataclass(frozen=True)
class Dataset:
    """Preference data in canonical form; the schemas are in embrm.data.collector.

    responses: one row per distinct (kind, prompt, response), in order of first appearance.
        response_id and prompt_id are content hashes (16 hex digits). For kind "text", prompt and
        response are strings; for "chat", JSON lists of {"role", "content"} messages.
    pairs: chosen and rejected are row numbers in `responses`; label is the probability that chosen
        is better; margin is null where unknown; `row` is the row in the file `source`, from 0.
        A pair derived from a group has the `row` of its chosen response.
    members: the responses of groups (all responses to one prompt that have a gold score); response
        is a row number in `responses`, gold is in the units of the data.
    exclusions: rows, pairs and members that were left out, with reason and detail.
    rules: for each source, the layout that was detected and the options it was read with. Sources
        are named by their hub id or by file and parent folder, never by a full path.
    """

    responses: pl.DataFrame
    pairs: pl.DataFrame
    members: pl.DataFrame
    exclusions: pl.DataFrame
    rules: dict[str, Any]

    def digest(self) -> str:
        """SHA-256 (hex) over response ids, pairs and members in order, without file and row."""
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

    def split_counts(self) -> dict[str, dict[str, int]]:
        """For each split, its numbers of pairs, prompts and responses."""
        uses = pl.concat(
            [
                self.pairs.select("split", "prompt_id", response="chosen"),
                self.pairs.select("split", "prompt_id", response="rejected"),
                self.members.select("split", "prompt_id", "response"),
            ]
        )
        used = uses.group_by("split").agg(
            prompts=pl.col("prompt_id").n_unique(), responses=pl.col("response").n_unique()
        )
        pairs = dict(self.pairs.group_by("split").len().rows())
        return {
            split: {"pairs": pairs.get(split, 0), "prompts": prompts, "responses": responses}
            for split, prompts, responses in used.sort("split").rows()
        }

    def reason_counts(self) -> dict[str, int]:
        """For each reason, the number of exclusions that give it."""
        return dict(self.exclusions.group_by("reason").len().sort("reason").rows())

    def first_exclusions(self) -> dict[str, str]:
        """For each reason, the first exclusion that gives it: source, row (from 0) and detail."""
        first = self.exclusions.unique("reason", keep="first", maintain_order=True).sort("reason")
        rows = first.select("reason", "source", "row", "detail").rows()
        return {reason: f"{source}, row {row}: {detail}" for reason, source, row, detail in rows}

    def without(
        self, responses: pl.DataFrame | None = None, pairs: pl.DataFrame | None = None
    ) -> "Dataset":
        """A copy without the given responses (and whatever uses them) and the given pairs.

        responses: columns response (row number), reason, detail. pairs: columns pair (row number),
        reason, detail. Every removed pair and member is listed in exclusions. Responses that are
        no longer used are removed too; the others keep their order and are renumbered.

        Raises: UserError when no pair and no member is left.
        """
        gone = _reasons(responses, "response")
        pairs_left, pairs_lost = _divide(
            self.pairs.with_row_index("pair"),
            [("pair", _reasons(pairs, "pair")), ("chosen", gone), ("rejected", gone)],
        )
        members_left, members_lost = _divide(self.members, [("response", gone)])
        lost = pl.concat([pairs_lost, members_lost])
        if pairs_left.is_empty() and members_left.is_empty():
            by_length = set(lost["reason"]) <= {"over_long", "truncated_to_identical"}
            raise UserError(
                "every row was excluded: "
                f"{reason_summary(lost['reason'], lost['detail'].to_list())}; "
                + ("raise max_length" if by_length else "check the texts")
            )
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

    Raises: UserError for a source that cannot be read (see `read_rows`), has no known layout (see
    `detect`), disagrees with its spec about splits, or of which every row is excluded.
    """
    if not sources:
        raise UserError("no dataset given: name at least one")
    collector = Collector()
    rules = [add_source(collector, spec) for spec in sources]
    return Dataset(**collector.tables(), rules={"sources": rules})


_Reasons = dict[int, tuple[str, str]]
"""Row number -> reason, detail."""


def _reasons(table: pl.DataFrame | None, key: str) -> _Reasons:
    rows = [] if table is None else table.select(key, "reason", "detail").rows()
    # Reversed, because the first reason given for a row is the one to keep.
    return {number: (reason, detail) for number, reason, detail in reversed(rows)}


def _divide(
    table: pl.DataFrame, reasons: Sequence[tuple[str, _Reasons]]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Divide into (rows that stay, exclusions of the others).

    A row's reason is that of the first column in `reasons` that gives one.
    """
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
