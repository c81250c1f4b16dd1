"""Lint: checks adopted arrays for faults that published arrays of states are known to have."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.adoption.arrays import Scan, StateArray
from embrm.adoption.findings import Finding
from embrm.adoption.ids import combined_ids
from embrm.adoption.rows import Rows, excluded
from embrm.core.errors import UserError
from embrm.core.sampling import evenly_spaced

_PERIODIC = 0.9
"""A period is reported when more than this share of gold scores equal those one period earlier."""

_PERIOD_SAMPLE = 1 << 16
"""Number of gold scores that are searched for a period."""

_MIN_REPEATS = 3
"""A vector is reported when at least this many prompts have it."""

_SAMPLE = (64, 8)
"""Maximum numbers of prompts and responses whose distances are compared to check axis order."""

Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Linted:
    """The result of `lint`.

    rows: the rows to adopt, in the order of the cache, with the columns `embrm.adoption.rows.ROWS`
        and group, a number for each prompt of a split; the rows of a group are adjacent.
    exclusions: the rows that are left out, with reasons.
    """

    rows: pl.DataFrame
    exclusions: pl.DataFrame
    findings: tuple[Finding, ...]


def lint(rows: Rows, array: StateArray, scan: Scan) -> Linted:
    """Check one array and its gold scores.

    Excludes vectors that are zero, constant or not finite, and all but the first of a prompt's
    equal vectors. Shuffles each prompt's responses in splits where they are sorted by gold. Other
    problems are only reported.

    Raises: UserError when no prompt is left that has two responses with different gold scores.
    """
    name, table = array.file.name, rows.table
    findings: list[Finding] = [*rows.findings]
    if array.dtype != array.file.dtype:
        detail = "states of float64 are stored as float32"
        findings.append(Finding(name, "", "dtype", "fixed", None, detail))
    parts = [rows.exclusions]
    for reason, check, bad, detail in _broken(table, scan):
        lost = table.filter(pl.Series(bad))
        parts.append(excluded(lost, name, reason, [detail] * lost.height))
        findings += [
            Finding(name, split, check, "excluded", count, f"rows: {detail}")
            for split, count in _by_split(lost)
        ]
        table = table.filter(pl.Series(~bad))
    table = _grouped(table)
    table, lost, found = _without_duplicates(table, array, scan)
    parts.append(lost)
    findings += found
    for (split,), own in table.group_by("split", maintain_order=True):
        findings += _repeated(own, str(split), array, scan)
    if rows.grid:
        findings += _axes(rows, array)
    table, found = _shuffled(table, name)
    findings += found
    findings += _groups(table, name)
    _refuse_unusable(table, name, findings)
    return Linted(table, pl.concat(parts), tuple(findings))


def _broken(table: pl.DataFrame, scan: Scan) -> Iterator[tuple[str, str, Bools, str]]:
    """Yield (reason, check, which of the remaining rows, detail) for each kind of unusable vector.

    The caller removes the rows before it asks for the next kind.
    """
    row = table["row"].to_numpy()
    finite = np.isfinite(scan.norms)
    kinds = [
        ("nan_state", "NaN or infinite", ~finite, "a value, or the norm, is NaN or infinite"),
        ("zero_vector", "zero vectors", finite & scan.constant & (scan.marks == 0), "all zero"),
        ("constant_vector", "constant vectors", finite & scan.constant & (scan.marks != 0),
         "one number throughout"),
    ]  # fmt: skip
    for reason, check, bad, detail in kinds:
        own = bad[row]
        if own.any():
            yield reason, check, own, detail
            row = row[~own]


def _grouped(table: pl.DataFrame) -> pl.DataFrame:
    """Make the rows of each (split, prompt) adjacent, in order of first appearance."""
    first = pl.col("place").min().over("split", "prompt")
    placed = table.with_row_index("place").with_columns(group=first.cast(pl.Int64))
    return placed.sort("group", maintain_order=True).drop("place")


def _without_duplicates(
    table: pl.DataFrame, array: StateArray, scan: Scan
) -> tuple[pl.DataFrame, pl.DataFrame, list[Finding]]:
    """Keep only the first of equal vectors of a prompt."""
    row, gold = table["row"].to_numpy(), table["gold"].to_numpy()
    first = _first_alike(table["group"].to_numpy(), row, array, scan)
    extra = first != np.arange(len(row))
    details = [f"equal to row {row[i]} of the same prompt" for i in first[extra]]
    lost = table.filter(pl.Series(extra))
    other = pl.Series(gold[extra] != gold[first[extra]])
    findings = []
    for split, count in _by_split(lost):
        differ = int((other & (lost["split"] == split)).sum())
        detail = f"rows equal to another of their prompt, {differ:,} of them with other gold"
        findings.append(
            Finding(array.file.name, split, "duplicate vectors", "excluded", count, detail)
        )
    exclusions = excluded(lost, array.file.name, "duplicate", details)
    return table.filter(pl.Series(~extra)), exclusions, findings


def _first_alike(group: Indices, row: Indices, array: StateArray, scan: Scan) -> Indices:
    """For each place, that of the first row in the same group with an equal vector (or itself)."""
    norm, mark = scan.norms[row], scan.marks[row]
    order = np.lexsort((mark, norm, group))  # stable
    alike = np.ones(len(row), np.bool_)
    for values in (group, norm, mark):
        alike[1:] &= values[order][1:] == values[order][:-1]
    alike[:1] = False
    # Rows of equal group, norm and mark are adjacent now; compare each with the first of its run.
    start = np.maximum.accumulate(np.where(alike, 0, np.arange(len(row))))
    first = np.arange(len(row))
    candidates, heads = order[alike], order[start[alike]]
    equal = array.equal_rows(row[candidates], row[heads])
    first[candidates[equal]] = heads[equal]
    return first


def _repeated(table: pl.DataFrame, split: str, array: StateArray, scan: Scan) -> Iterator[Finding]:
    """Report vectors that occur in several prompts of a split."""
    row = table["row"].to_numpy()
    first = _first_alike(np.zeros(len(row), np.int64), row, array, scan)
    places, prompts = np.unique(first, return_counts=True)
    common = prompts >= _MIN_REPEATS
    if common.any():
        most = places[common][prompts[common].argmax()]
        detail = (
            f"rows whose vector {_MIN_REPEATS} prompts or more have, row {row[most]} "
            f"{prompts.max():,} of {table['prompt'].n_unique():,}: a padding position, or states "
            "that do not depend on the prompt?"
        )
        count = int(prompts[common].sum())
        yield Finding(array.file.name, split, "repeated vectors", "reported", count, detail)


def _axes(rows: Rows, array: StateArray) -> Iterator[Finding]:
    """Report signs of a wrong axis order: a width smaller than the number of responses, periodic
    gold scores, or states of one prompt that are farther apart than those of different prompts."""
    assert rows.grid is not None  # only a grid has axes
    (prompts, responses), table = rows.grid, rows.table
    name = array.file.name
    split = table["split"][0] if table.height else ""
    if array.width < responses:
        detail = f"width {array.width} is less than {responses} responses: is it the last axis?"
        yield Finding(name, split, "width", "reported", None, detail)
    gold = np.full(prompts * responses, np.nan)
    gold[table["prompt"].to_numpy() * responses + _position(rows)] = table["gold"].to_numpy()
    period = _period(gold[:_PERIOD_SAMPLE], 2 * responses)
    if period:
        detail = (
            f"gold scores recur every {period} rows, {responses} responses being a prompt's: are "
            "the axes in this order?"
        )
        yield Finding(name, split, "periodic gold", "reported", None, detail)
    within, across = _distances(rows, array)
    if within > 1.1 * across:
        detail = (
            f"states of one prompt are {within / across:.2g} times as far apart as those of "
            "different prompts (mean squares): are the axes in this order?"
        )
        yield Finding(name, split, "axis order", "reported", None, detail)


def _position(rows: Rows) -> Indices:
    """The position of each row among its prompt's responses, in a grid."""
    assert rows.grid is not None  # only a grid has positions
    prompts, responses = rows.grid
    row = rows.table["row"].to_numpy()
    return row % responses if rows.order == "prompts" else row // prompts


def _period(gold: NDArray[np.float64], most: int) -> int | None:
    """The smallest period up to `most`; None without one, or for constant gold."""
    for period in range(1, min(most, len(gold) // 2) + 1):
        if (gold[period:] == gold[:-period]).mean() > _PERIODIC:
            return period if period > 1 else None
    return None


def _distances(rows: Rows, array: StateArray) -> tuple[float, float]:
    """Mean squared distances between neighbouring responses to the same prompt, and between
    neighbouring prompts at the same response position, on an evenly spaced sample of the grid.

    NaN for an axis of length 1.
    """
    assert rows.grid is not None  # only a grid has neighbours
    n, k = (evenly_spaced(size, most) for size, most in zip(rows.grid, _SAMPLE, strict=True))
    prompts, responses = rows.grid
    by_prompt = rows.order == "prompts"
    places = n[:, None] * responses + k if by_prompt else n[:, None] + k * prompts
    states = array.take(places.flatten()).double().view(len(n), len(k), array.width)
    steps = (states.diff(dim=1), states.diff(dim=0))
    squares = (step.square().sum(-1).flatten() for step in steps)
    within, across = (float(own[own.isfinite()].mean()) for own in squares)
    return within, across


def _shuffled(table: pl.DataFrame, name: str) -> tuple[pl.DataFrame, list[Finding]]:
    """Put the responses of each prompt in hash order, in splits where they are sorted by gold."""
    findings = []
    parts = []
    for (split,), own in table.group_by("split", maintain_order=True):
        direction, count, prompts = _sorted_by_gold(own)
        if direction:
            hashes = combined_ids(own["group"].to_numpy().astype(np.uint64), own["row"].to_numpy())
            order = np.lexsort((hashes, own["group"].to_numpy()))
            own = own[order]
            detail = (
                f"of {prompts:,} prompts have their responses sorted by gold, {direction}: "
                "shuffled by a hash"
            )
            findings.append(Finding(name, str(split), "sorted by gold", "fixed", count, detail))
        parts.append(own)
    return pl.concat(parts) if parts else table, findings


def _sorted_by_gold(table: pl.DataFrame) -> tuple[str | None, int, int]:
    """Detect responses that are sorted by gold: (direction, sorted prompts, sortable prompts).

    Sortable prompts have different gold scores. c is the mean over them of 1/responses!, the chance
    that random order is sorted. A direction is reported when more than (1 + c) / 2 of the sortable
    prompts are sorted in it; otherwise the result is (None, 0, 0).
    """
    group, gold = table["group"].to_numpy(), table["gold"].to_numpy()
    sizes = np.diff(np.flatnonzero(np.diff(group, prepend=-1)), append=len(group))
    same = group[1:] == group[:-1]
    step = np.diff(gold)
    owner = np.repeat(np.arange(len(sizes)), sizes)[1:]
    rises = np.bincount(owner[same & (step > 0)], minlength=len(sizes))
    falls = np.bincount(owner[same & (step < 0)], minlength=len(sizes))
    could = rises + falls > 0
    chance = np.mean([1 / math.factorial(min(size, 20)) for size in sizes[could]] or [1.0])
    for direction, against in (("ascending", falls), ("descending", rises)):
        count = int((could & (against == 0)).sum())
        if count > (1 + chance) / 2 * could.sum():
            return direction, count, int(could.sum())
    return None, 0, 0


def _groups(table: pl.DataFrame, name: str) -> Iterator[Finding]:
    """Report prompts with a single response or constant gold, and splits with a single prompt."""
    for (split,), own in table.group_by("split", maintain_order=True):
        sizes = own.group_by("group").agg(pl.len(), pl.col("gold").n_unique().alias("levels"))
        single, constant = sizes["len"] == 1, (sizes["len"] > 1) & (sizes["levels"] == 1)
        for check, which, detail in (
            ("one response", single, "prompts have one response: no pair, no ranking"),
            ("constant gold", constant, "prompts whose gold scores are all equal: no pair"),
        ):
            if which.any():
                detail = f"of {len(sizes):,} {detail}"
                yield Finding(name, str(split), check, "reported", int(which.sum()), detail)
        if len(sizes) == 1:
            detail = "the split has one prompt: nothing to hold out, no interval over prompts"
            yield Finding(name, str(split), "one prompt", "reported", 1, detail)


def _refuse_unusable(table: pl.DataFrame, name: str, findings: Sequence[Finding]) -> None:
    levels = table.group_by("group").agg(pl.col("gold").n_unique().alias("levels"))
    if (levels["levels"] > 1).any():
        return
    known = "; ".join(f"{one.count:,} {one.detail}" for one in findings if one.count is not None)
    raise UserError(
        f"{name}: no prompt has two responses of different gold ({known or 'no rows'}): check "
        "gold and the order of the axes"
    )


def _by_split(table: pl.DataFrame) -> list[tuple[str, int]]:
    return table.group_by("split", maintain_order=True).len().rows()
