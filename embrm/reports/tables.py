"""The tables of a sweep's report."""

from collections.abc import Iterable, Sequence

import polars as pl

from embrm.core.formatting import (
    MISSING,
    difference_text,
    number_text,
    p_text,
    range_text,
    short_difference_text,
    short_text,
    small_text,
    value_text,
)
from embrm.core.table import Table
from embrm.metrics.geometry import SAMPLE
from embrm.results.comparison import MEAN, Comparison

_ACROSS = 8
"""Splits side by side in one table: what fits 100 terminal columns beside the names."""

_NAMED = 3
"""Configurations that a note names before it breaks off."""

_TEMPERATURE = {
    True: "at T: margins divided by the temperature fitted on the validation pairs.",
    False: "n/a at T: there are no validation pairs to fit a temperature on, or a seed ranks all "
    "of them right, or no more than chance would, and then none fits.",
}
"""Notes on the calibration of runs with a temperature and without."""

_GEOMETRY = {
    "norm": "norm",
    "CV": "norm_cv",
    "effective rank": "effective_rank",
    "drift": "drift",
    "drift token rows": "drift_tokens",
    "KL token rows": "kl_tokens",
    "KL reward position": "kl_reward",
    "corr length": "corr_length",
    "corr S": "corr_S",
}

_OF_ANY_SIZE = ("norm_cv", "kl_tokens", "kl_reward")

_MOVED = (
    "Compare drift with drift at token rows: regularizers act there, before the last token, and "
    "the reward reads the last, so an adapter may move it and leave token rows alone. KL, in nats, "
    "is near 0 wherever the next token is certain, as it often is at the reward position."
)
_NOT_MOVED = (
    "n/a: drift is of adapters and fine-tunes, KL of adapters; token rows must be in the cache; KL "
    "at the reward position is of state = last."
)
_SAMPLED = (
    f"On at most {SAMPLE} responses a split, whose number bounds the effective rank; what does not "
    "say token rows is of the states that the reward reads."
)
"""Notes on geometry: what to look for, what is missing, what it is measured on."""

_DISAGREEMENT = (
    "Standard deviation over a configuration's heads, standardised on the training responses, mean "
    "over a split's responses / how well it tells them from those of validation: 0.5 is chance, "
    "and more a sign that the heads know what is new to them."
)


def main_tables(comparison: Comparison, top: int) -> list[Table]:
    """What the terminal shows: ranking, splits, accuracy and difference per split, calibration, and
    where a run has an adapter, geometry.

    top: configurations to show; the baseline is always among them.
    """
    shown = comparison.best(max(top, 1))
    return [
        _ranking(comparison, shown),
        _splits(comparison),
        *_by_split(comparison, shown, "accuracy"),
        *_by_split(comparison, shown, "tau"),
        *_leak_free(comparison, shown),
        _calibration(comparison, shown, comparison.ranked_splits),
        *(_geometry(comparison, shown) if _moves_states(comparison) else []),
    ]


def further_tables(comparison: Comparison, top: int) -> list[Table]:
    """What only the Markdown adds: subsets, calibration on every split by itself, disagreement
    where a configuration has several heads, and geometry where the terminal does not show it."""
    shown = comparison.best(max(top, 1))
    return [
        *_subsets(comparison),
        *(_calibration(comparison, shown, (split,)) for split in comparison.splits),
        *_disagreement(comparison, shown),
        *([] if _moves_states(comparison) else _geometry(comparison, shown)),
    ]


def _ranking(comparison: Comparison, shown: list[str]) -> Table:
    rows = {row["name"]: row for row in comparison.ranking.iter_rows(named=True)}
    metric = comparison.metric
    cells = [
        (
            str(row["rank"] or ""),
            f"{name}°" if name in comparison.at_epoch_limit else name,
            f"{row['seeds']}{'' if row['seeds'] > 1 else '*'}",
            f"{value_text(row['estimate'], metric)} {range_text(row['low'], row['high'], metric)}",
            "baseline" if name == comparison.baseline else difference_text(row, metric),
            p_text(row["p_holm"]),
        )
        for name, row in ((name, rows[name]) for name in shown)
    ]
    if metric == "accuracy":
        length = value_text(comparison.longer_is_better(), metric)
        cells += [
            ("", "(longer is better)", "", length, "", ""),
            ("", "(chance)", "", value_text(0.5, metric), "", ""),
        ]
    over = (
        f"mean over {', '.join(comparison.ranked_splits)}"
        if comparison.ranked_by == MEAN
        else comparison.ranked_by
    )
    hidden = comparison.ranking.height - len(shown)
    if comparison.ranking["low"].is_null().all():
        notes = ["No intervals: too few prompts to resample."]
    else:
        notes = [
            "Square brackets: 95 % intervals, bootstrap over prompts and seeds.",
            "Up or down triangle: the interval of the paired difference excludes 0.",
            "Holm p: adjusted for all configurations compared; trust it before the triangles.",
        ]
    if comparison.unranked_splits:
        left_out = ", ".join(comparison.unranked_splits)
        notes.append(f"Left out of the mean, fewer than 2 prompts: {left_out}.")
    if (comparison.ranking["seeds"] == 1).any():
        notes.append("* one seed: variance between seeds is not covered.")
    if hidden:
        notes.append(f"{hidden} more configurations in report.json.")
    notes += [
        f"{row['name']}: {row['runs']} runs {row['status']}, left out."
        for row in comparison.unfinished.iter_rows(named=True)
    ]
    if comparison.at_epoch_limit:
        count, names = len(comparison.at_epoch_limit), comparison.at_epoch_limit[:_NAMED]
        notes.append(
            f"° {count} of {comparison.ranking.height} configurations "
            f"({', '.join([*names, *(['…'] if count > _NAMED else [])])}) reached their epoch "
            "limit before early stopping: raise epochs."
        )
    notes += [
        "The best of many is partly lucky: confirm it on prompts not used to choose it.",
        "Scores of its pairs: embrm scores FOLDER "
        f"{comparison.ranking['run_ids'][0][0]} --out scores.parquet",
    ]
    label = "accuracy %" if metric == "accuracy" else "Kendall tau-b"
    versus = f"minus {comparison.baseline}" if comparison.baseline else "difference"
    return Table(
        title=f"Ranking by {label}: {over}",
        columns=("#", "configuration", "seeds", label, versus, "Holm p"),
        rows=tuple(cells),
        note=" ".join(notes),
        left=2,
    )


def _splits(comparison: Comparison) -> Table:
    lengths = {row["split"]: row for row in comparison.lengths.iter_rows(named=True)}
    removed = (
        dict(comparison.leak_free.select("split", "removed").unique().iter_rows())
        if not comparison.leak_free.is_empty()
        else {}
    )
    rows = []
    for split in comparison.splits:
        scores = comparison.scores.filter(pl.col("split") == split)
        length = lengths.get(split)
        rows.append(
            (
                split,
                f"{length['pairs']:,.0f}" if length else "0",
                str(length["prompts"] if length else scores["prompts"].max() or 0),
                f"{value_text(length['estimate'], 'accuracy')} "
                f"{range_text(length['low'], length['high'], 'accuracy')}"
                if length
                else MISSING,
                str(removed.get(split, 0)),
            )
        )
    return Table(
        title="Evaluation splits",
        columns=("split", "pairs", "prompts", "longer is better %", "prompts seen in training"),
        rows=tuple(rows),
    )


def _by_split(comparison: Comparison, shown: list[str], metric: str) -> list[Table]:
    """Estimates, then differences to the baseline, a column per split."""
    scores = comparison.scores.filter(pl.col("metric") == metric)
    splits = [split for split in comparison.splits if split in scores["split"]]
    what = "Accuracy %" if metric == "accuracy" else "Kendall tau-b"
    half = "Plus or minus: half the width of the 95 % interval."
    tables = []
    for across in _chunks(splits):
        found = {(row["split"], row["name"]): row for row in scores.iter_rows(named=True)}
        rows = [
            (name, *(short_text(found[split, name], metric) for split in across)) for name in shown
        ]
        if metric == "accuracy":
            lengths = {row["split"]: row for row in comparison.lengths.iter_rows(named=True)}
            rows.append(
                ("(longer is better)", *(short_text(lengths[split], metric) for split in across))
            )
        tables.append(Table(f"{what} by split", ("configuration", *across), tuple(rows), half))
        others = [name for name in shown if name != comparison.baseline]
        if comparison.baseline is None or not others:
            continue
        tables.append(
            Table(
                f"{what} minus {comparison.baseline} by split",
                ("configuration", *across),
                tuple(
                    (name, *(short_difference_text(found[split, name], metric) for split in across))
                    for name in others
                ),
                f"{half} Triangle: the interval excludes 0 (not adjusted for the many cells).",
            )
        )
    return tables


def _leak_free(comparison: Comparison, shown: list[str]) -> list[Table]:
    if comparison.leak_free.is_empty():
        return []
    found = {(row["split"], row["name"]): row for row in comparison.leak_free.iter_rows(named=True)}
    splits = [split for split in comparison.splits if (split, shown[0]) in found]
    left = "; ".join(
        f"{split}: {found[split, shown[0]]['removed']} removed, "
        f"{found[split, shown[0]]['prompts']} left"
        for split in splits
    )
    return [
        Table(
            "Accuracy % without prompts seen in training",
            ("configuration", *across),
            tuple(
                (name, *(short_text(found[split, name], "accuracy") for split in across))
                for name in shown
            ),
            f"Prompts: {left}.",
        )
        for across in _chunks(splits)
    ]


def _calibration(comparison: Comparison, shown: list[str], splits: Sequence[str]) -> Table:
    ranks = dict(comparison.ranking.select("name", "rank").iter_rows())
    measures = comparison.measures.filter(pl.col("split").is_in(splits))
    columns = {
        "NLL": "nll",
        "NLL at T": "nll_calibrated",
        "Brier": "brier",
        "Brier at T": "brier_calibrated",
        "ECE": "ece",
        "ECE at T": "ece_calibrated",
        "margin": "margin",
        "reward sd": "reward_sd",
        "ties %": "ties",
    }
    rows = []
    fitted = set()
    for name in shown:
        own = measures.filter(pl.col("name") == name)
        values = {metric: _mean(own[metric]) for metric in columns.values()}
        if values["nll"] is not None:
            fitted.add(values["nll_calibrated"] is not None)
        rows.append(
            (
                str(ranks[name] or ""),
                name,
                *(
                    value_text(value, "accuracy") if metric == "ties" else number_text(value)
                    for metric, value in values.items()
                ),
            )
        )
    where = splits[0] if len(splits) == 1 else f"mean over {', '.join(splits)}"
    return Table(
        f"Calibration: {where}",
        ("#", "configuration", *columns),
        tuple(rows),
        " ".join(_TEMPERATURE[known] for known in (True, False) if known in fitted),
        left=2,
        wide=("Brier", "Brier at T"),
    )


def _disagreement(comparison: Comparison, shown: list[str]) -> list[Table]:
    """Of the configurations with several heads, on every split."""
    known = comparison.measures.filter(pl.col("disagreement").is_not_null())
    found = {
        (row["split"], row["name"]): " / ".join(
            number_text(row[metric]) for metric in ("disagreement", "disagreement_auroc")
        )
        for row in known.iter_rows(named=True)
    }
    names = [name for name in shown if name in known["name"]]
    splits = [split for split in comparison.splits if split in known["split"]]
    return [
        Table(
            "Disagreement of ensembles / its AUROC",
            ("configuration", *across),
            tuple(
                (name, *(found.get((split, name), MISSING) for split in across)) for name in names
            ),
            _DISAGREEMENT,
        )
        for across in _chunks(splits if names else [])
    ]


def _moves_states(comparison: Comparison) -> bool:
    geometry = comparison.geometry
    return not geometry.is_empty() and geometry["drift"].null_count() < geometry.height


def _geometry(comparison: Comparison, shown: list[str]) -> list[Table]:
    """On the training responses, and on average out of distribution where names say so."""
    if comparison.geometry.is_empty():
        return []
    outside = tuple(split for split in comparison.splits if split.startswith("ood"))
    ranks = dict(comparison.ranking.select("name", "rank").iter_rows())
    tables = []
    inside = (comparison.trained_on,)
    for splits in (inside, outside or comparison.ranked_splits):
        measures = comparison.geometry.filter(
            pl.col("split").is_in(splits), pl.col("name").is_in(shown)
        )
        # Where nothing moves, such columns would be empty.
        columns = {
            label: name
            for label, name in _GEOMETRY.items()
            if measures[name].null_count() < measures.height
        }
        rows = []
        for name in shown:
            own = measures.filter(pl.col("name") == name)
            values = {column: _mean(own[column]) for column in columns.values()}
            rows.append(
                (
                    str(ranks[name] or ""),
                    name,
                    *(
                        small_text(value) if column in _OF_ANY_SIZE else number_text(value)
                        for column, value in values.items()
                    ),
                )
            )
        where = splits[0] if len(splits) == 1 else f"mean over {', '.join(splits)}"
        if splits == inside:
            notes = [_MOVED] if "drift token rows" in columns else []
        else:
            notes = [_NOT_MOVED] if any(MISSING in row for row in rows) else []
            notes.append(_SAMPLED)
        tables.append(
            Table(
                f"Geometry: {where}",
                ("#", "configuration", *columns),
                tuple(rows),
                " ".join(notes),
                left=2,
                wide=("norm", "corr S"),
            )
        )
    return tables


def _subsets(comparison: Comparison) -> list[Table]:
    if comparison.subsets.is_empty():
        return []
    order = [name for name in comparison.ranking["name"] if name in comparison.subsets["name"]]
    found = {
        (row["split"], row["subset"], row["name"]): row
        for row in comparison.subsets.iter_rows(named=True)
    }
    cells = comparison.subsets.select("split", "subset").unique(maintain_order=True).rows()
    return [
        Table(
            "Accuracy % by subset",
            ("split", "subset", "prompts", *order),
            tuple(
                (
                    split,
                    subset if subset is not None else "(none)",
                    str(found[split, subset, order[0]]["prompts"]),
                    *(short_text(found[split, subset, name], "accuracy") for name in order),
                )
                for split, subset in cells
            ),
            left=2,
        )
    ]


def _chunks(splits: list[str]) -> Iterable[list[str]]:
    """Even runs of at most `_ACROSS` splits."""
    if not splits:
        return []
    count = -(-len(splits) // _ACROSS)
    size = -(-len(splits) // count)
    return [splits[start : start + size] for start in range(0, len(splits), size)]


def _mean(values: pl.Series) -> float | None:
    mean = values.mean()
    return float(mean) if isinstance(mean, float) else None
