"""The training pairs of a run: limit, fold, label table and label noise are applied in this order.

With `validation_labels = "noisy"`, label table and label noise are applied to its validation pairs.

A member of an ensemble may be trained on a bootstrap resample of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from embrm.core.errors import UserError
from embrm.core.streams import stream
from embrm.data.label_tables import LabelTable, read_label_table
from embrm.data.splits import folds, holdout
from embrm.sweeps.spec import RunSpec, ValidationLabels

_TABLE = ("label", "weight", "margin")

_PROMPT = "number of the prompt"

_CLEAN = " with validation = 0, or take validation_labels = 'clean'"


def pinned(labels: str) -> str:
    """PATH#DIGEST of a label table, from PATH or PATH#DIGEST.

    Raises: UserError when there is no table at PATH, or one with another digest.
    """
    return f"{labels.partition('#')[0]}#{_read(labels).digest}"


def _read(labels: str) -> LabelTable:
    path, _, digest = labels.partition("#")
    table = read_label_table(Path(path), "labels")
    if digest not in ("", table.digest):
        raise UserError(
            f"labels = {path!r} has become another table ({table.digest}, not {digest}): restore "
            "it, or run the sweep again"
        )
    return table


def with_rules(
    pairs: pl.DataFrame,
    specs: Sequence[RunSpec],
    side: Literal["training", "validation"] = "training",
) -> pl.DataFrame:
    """Add the columns that `as_trained` and `as_validated` read for these runs, which have one data
    seed: hashes of ids, rows of label tables.

    pairs: pair_id, prompt_id, label, weight, margin, ... side: which pairs these are, for messages.

    Raises: UserError when a label table is missing, or lacks some of the pairs.
    """
    columns: dict[str, pl.Series] = {}
    for spec in specs:
        if spec.label_noise and _flip(spec) not in columns:
            flipped = holdout(pairs["pair_id"], spec.label_noise, spec.data_seed, "label noise")
            columns[_flip(spec)] = pl.Series(flipped)
        if spec.fold and _fold(spec) not in columns:
            columns[_fold(spec)] = pl.Series(
                folds(pairs["prompt_id"], spec.fold_of[1], spec.data_seed)
            )
        if spec.bootstrap and _PROMPT not in columns:
            columns[_PROMPT] = pairs["prompt_id"].rank("dense")
        if spec.labels and _from_table(spec, "label") not in columns:
            columns |= _from_its_table(pairs, spec, side)
    return pairs.with_columns(**columns)


def _from_its_table(pairs: pl.DataFrame, spec: RunSpec, side: str) -> dict[str, pl.Series]:
    """The columns of the run's label table in the order of `pairs`.

    Columns that the table lacks are those of `pairs`.
    """
    assert spec.labels is not None
    rows = _read(spec.labels).rows
    missing = pairs.join(rows, on="pair_id", how="anti")
    if missing.height:
        raise UserError(
            f"labels = {spec.labels.partition('#')[0]!r} lacks {missing.height} of the "
            f"{pairs.height} {side} pairs, such as {missing['pair_id'][0]}: make it from the "
            f"pairs of this sweep{_CLEAN if side == 'validation' else ''}"
        )
    own = pairs.select("pair_id").join(rows, on="pair_id", how="left", maintain_order="left")
    return {
        _from_table(spec, name): (own if name in own.columns else pairs)[name] for name in _TABLE
    }


def as_trained(table: pl.DataFrame, spec: RunSpec) -> pl.DataFrame:
    """The pairs of `with_rules` that a run is trained on, in their order, with the run's labels."""
    table = table.head(spec.pairs_limit or table.height)
    if spec.fold:
        table = table.filter(pl.col(_fold(spec)) != spec.fold_of[0])
    return _relabelled(table, spec)


def as_validated(table: pl.DataFrame, spec: RunSpec, labels: ValidationLabels) -> pl.DataFrame:
    """The validation pairs of a run.

    labels: "noisy" applies the run's label table and label noise to the pairs, which `with_rules`
    returned; "clean" returns them as they are.
    """
    return table if labels == "clean" else _relabelled(table, spec)


def _relabelled(table: pl.DataFrame, spec: RunSpec) -> pl.DataFrame:
    """The pairs with the run's labels, without those to which its label table gives weight 0."""
    if spec.labels:
        names = {name: pl.col(_from_table(spec, name)) for name in _TABLE}
        table = table.with_columns(**names).filter(pl.col("weight") > 0)
    if spec.label_noise:
        label = pl.when(pl.col(_flip(spec))).then(1 - pl.col("label")).otherwise("label")
        table = table.with_columns(label=label)
    return table


def bootstrap_rows(table: pl.DataFrame, seed: int) -> NDArray[np.int64]:
    """A bootstrap resample over prompts of the pairs of `as_trained`, as ascending pair numbers.

    Of k prompts, k are drawn with replacement, each with all its pairs. The draw depends on the
    seed and the prompts alone.
    """
    _, prompt = np.unique(table[_PROMPT].to_numpy(), return_inverse=True)
    prompts = int(prompt.max()) + 1
    times = np.bincount(stream(seed, "bootstrap").integers(0, prompts, prompts), minlength=prompts)
    return np.repeat(np.arange(len(prompt)), times[prompt])


def gold_as_trained(table: pl.DataFrame, spec: RunSpec) -> pl.DataFrame:
    """The group members of `selection.with_gold` that a run is trained on, in their order."""
    if not spec.fold:
        return table
    own = folds(table["prompt_id"], spec.fold_of[1], spec.data_seed)
    return table.filter(own != spec.fold_of[0])


def _flip(spec: RunSpec) -> str:
    return f"flipped {spec.label_noise!r}"


def _fold(spec: RunSpec) -> str:
    return f"fold of {spec.fold_of[1]}"


def _from_table(spec: RunSpec, name: str) -> str:
    return f"{name} of {spec.labels}"
