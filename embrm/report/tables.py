"""The report's tables: built once, shown on a terminal or as Markdown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl
from rich.align import Align
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table as TerminalTable
from rich.text import Text

from embrm.evaluate.geometry import SAMPLE
from embrm.report.comparison import MEAN, Comparison

_ACROSS = 8
"""Splits side by side in one table: what fits 100 terminal columns beside the names."""

_NAMED = 3
"""Configurations that a note names before it breaks off."""

MISSING = "n/a"

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
    "n/a: drift and KL are of adapters; token rows must be in the cache; KL at the reward position "
    "is of state = last."
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

_OPTIMIZED = (
    "peak n: where gold is highest. drop: of gold from its peak to the largest n, the peak chosen "
    "on other prompts; above 0 gold falls while the reward rises. gap: the reward's gain minus "
    "gold's at the largest n; 0 for gold itself. Both in standard deviations within a prompt. "
    "Square brackets: 95 % intervals, bootstrap over prompts and seeds."
)


@dataclass(frozen=True)
class Table:
    """Plain text cells; the renderers escape them. The first `left` columns are left-aligned.

    wide: columns that Markdown shows and the terminal has no room for.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1
    wide: tuple[str, ...] = ()


def main_tables(comparison: Comparison, top: int) -> list[Table]:
    """What the terminal shows: ranking, splits, accuracy and difference per split, calibration, and
    where a run has an adapter, geometry.

    top: configurations to show; the baseline is always among them.
    """
    shown = _shown(comparison, top)
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
    shown = _shown(comparison, top)
    return [
        *_subsets(comparison),
        *(_calibration(comparison, shown, (split,)) for split in comparison.splits),
        *_disagreement(comparison, shown),
        *([] if _moves_states(comparison) else _geometry(comparison, shown)),
    ]


def best_of_n_tables(
    summary: pl.DataFrame, splits: pl.DataFrame, baseline: str, top: int
) -> list[Table]:
    """Of the pools, then of every split: `summary` and `splits` are those of `best_of_n.BestOfN`.

    top: configurations to show; the baseline is always among them.
    """
    pools = Table(
        "Response pools",
        (
            "split",
            "prompts",
            "responses",
            "gold at n = 1",
            "gold sd",
            "constant gold",
            "seen in training",
        ),
        tuple(
            (
                row["split"],
                f"{row['prompts']:,}",
                "-".join(str(size) for size in dict.fromkeys((row["least"], row["most"]))),
                _number(row["gold_at_1"]),
                _number(row["gold_sd"]),
                str(row["constant"]),
                str(row["leaked"]),
            )
            for row in splits.iter_rows(named=True)
        ),
        " ".join(
            ["sd: of gold within a prompt."]
            + [
                f"Groups of {row['split']} left out: {row['excluded']}."
                for row in splits.iter_rows(named=True)
                if row["excluded"]
            ]
        ),
    )
    return [
        pools,
        *(
            _best_of_n(summary.filter(pl.col("split") == split), baseline, top)
            for split in splits["split"]
        ),
    ]


def _best_of_n(summary: pl.DataFrame, baseline: str, top: int) -> Table:
    shown = summary.filter((pl.int_range(pl.len()) < max(top, 1)) | (pl.col("name") == baseline))
    split, n = summary["split"][0], summary["n"][0]
    rows = []
    for row in shown.iter_rows(named=True):
        gold = {f"difference{end}": row[f"gold_difference{end}"] for end in ("", "_low", "_high")}
        rows.append(
            (
                str(row["rank"] or ""),
                row["name"] + ("°" if row["tied"] else ""),
                f"{row['seeds']}{'' if row['seeds'] > 1 else '*'}",
                _with_range(row, "gold"),
                "baseline" if row["name"] == baseline else _difference(gold, ""),
                _p(row["p_holm"]),
                str(row["peak_n"]),
                "none"
                if row["peak_n"] == n and row["drop"] == 0
                else _with_range(row, "drop", "+"),
                _with_range(row, "gap", "+"),
                *(_number(row[name]) for name in ("alpha", "beta", "fit_peak", "fit_drop")),
            )
        )
    notes = [_OPTIMIZED]
    if hidden := summary.height - shown.height:
        notes.append(f"{hidden} more configurations in bon.json.")
    if shown["gold_low"].is_null().all():
        notes.append("No intervals: too few prompts to resample.")
    if (shown["seeds"] == 1).any():
        notes.append("* one seed: variance between seeds is not covered.")
    if (shown["tied"] > 0).any():
        notes.append("° rewards all responses of some prompts alike, and then chooses at random.")
    return Table(
        f"Best of n: {split}",
        (
            *("#", "configuration", "seeds", f"gold at n = {n}", f"minus {baseline}", "Holm p"),
            *("peak n", "drop", "gap", "alpha", "beta", "fitted peak", "fitted drop"),
        ),
        tuple(rows),
        " ".join(notes),
        left=2,
        wide=("alpha", "beta", "fitted peak", "fitted drop"),
    )


def terminal(table: Table) -> Group:
    """For `rich.print`; nothing in a cell is read as markup or as a terminal escape."""
    view = TerminalTable(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    kept = [index for index, column in enumerate(table.columns) if column not in table.wide]
    for index in kept:
        header = Text("\n".join(_lines(printable(table.columns[index]), "/_. -", 9)))
        side: Literal["left", "right"] = "left" if index < table.left else "right"
        view.add_column(
            Align(header, side, vertical="bottom"),
            justify=side,
            vertical="top",
            overflow="fold",
        )
    for row in table.rows:
        view.add_row(
            *(
                _Name(printable(row[index])) if index < table.left else Text(printable(row[index]))
                for index in kept
            )
        )
    note = [Text(printable(table.note), style="dim")] if table.note else []
    return Group(Text(printable(table.title), style="bold underline"), view, *note)


@dataclass(frozen=True)
class _Name:
    """A cell for rich: a name such as bsr[state=mean,bsr=0.01], broken after "[" and ","."""

    name: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(_lines(self.name, "[, ", options.max_width)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(cell_len, _lines(self.name, "[, ", 1)))
        return Measurement(longest, cell_len(self.name)).with_maximum(options.max_width)


def markdown(table: Table) -> str:
    """A pipe table under a heading, every cell escaped."""
    rule = [":--" if index < table.left else "--:" for index in range(len(table.columns))]
    lines = [
        f"## {escape(table.title)}",
        "",
        *(
            "| " + " | ".join(cells) + " |"
            for cells in (
                [escape(column) for column in table.columns],
                rule,
                *([escape(cell) for cell in row] for row in table.rows),
            )
        ),
        *(["", escape(table.note)] if table.note else []),
    ]
    return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """`text` on one line, control characters (terminal escapes, newlines) replaced."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def escape(text: str) -> str:
    """`text` as Markdown that shows exactly it, also inside a pipe table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", printable(text))


def _shown(comparison: Comparison, top: int) -> list[str]:
    names = comparison.ranking["name"].to_list()
    shown = names[: max(top, 1)]
    if comparison.baseline is not None and comparison.baseline not in shown:
        shown.append(comparison.baseline)
    return shown


def _ranking(comparison: Comparison, shown: list[str]) -> Table:
    rows = {row["name"]: row for row in comparison.ranking.iter_rows(named=True)}
    metric = comparison.metric
    cells = [
        (
            str(row["rank"] or ""),
            f"{name}°" if name in comparison.at_epoch_limit else name,
            f"{row['seeds']}{'' if row['seeds'] > 1 else '*'}",
            f"{value_text(row['estimate'], metric)} {range_text(row['low'], row['high'], metric)}",
            "baseline" if name == comparison.baseline else _difference(row, metric),
            _p(row["p_holm"]),
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
        rows = [(name, *(_short(found[split, name], metric) for split in across)) for name in shown]
        if metric == "accuracy":
            lengths = {row["split"]: row for row in comparison.lengths.iter_rows(named=True)}
            rows.append(
                ("(longer is better)", *(_short(lengths[split], metric) for split in across))
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
                    (name, *(_short_difference(found[split, name], metric) for split in across))
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
                (name, *(_short(found[split, name], "accuracy") for split in across))
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
                    value_text(value, "accuracy") if metric == "ties" else _number(value)
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
            _number(row[metric]) for metric in ("disagreement", "disagreement_auroc")
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
        # Without adapters nothing moves: such columns would be empty.
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
                        _small(value) if column in _OF_ANY_SIZE else _number(value)
                        for column, value in values.items()
                    ),
                )
            )
        where = splits[0] if len(splits) == 1 else f"mean over {', '.join(splits)}"
        if splits == inside:
            notes = [_MOVED] if "drift" in columns else []
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
                    *(_short(found[split, subset, name], "accuracy") for name in order),
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


def _lines(name: str, after: str, width: int) -> list[str]:
    """A long name on lines of at most `width` terminal cells where breaks `after` these allow."""
    kind = re.escape(after)
    lines = [""]
    for piece in re.findall(f"[^{kind}]+[{kind}]?|[{kind}]", name):
        if lines[-1] and cell_len(lines[-1]) + cell_len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def value_text(value: float | None, metric: str, sign: str = "") -> str:
    if value is None:
        return MISSING
    return f"{100 * value:{sign}.1f}" if metric == "accuracy" else f"{value:{sign}.3f}"


def range_text(low: float | None, high: float | None, metric: str, sign: str = "") -> str:
    return (
        ""
        if low is None
        else f"[{value_text(low, metric, sign)}, {value_text(high, metric, sign)}]"
    )


def _with_range(row: Mapping[str, float | None], name: str, sign: str = "") -> str:
    """A value and its interval, `name`_low to `name`_high."""
    interval = range_text(row[f"{name}_low"], row[f"{name}_high"], "", sign)
    return f"{value_text(row[name], '', sign)} {interval}".rstrip()


def _difference(row: dict[str, float | None], metric: str) -> str:
    value = value_text(row["difference"], metric, "+")
    interval = range_text(row["difference_low"], row["difference_high"], metric, "+")
    return " ".join(part for part in (value, interval, _mark(row)) if part)


def _short(row: dict[str, float | None], metric: str) -> str:
    return value_text(row["estimate"], metric) + _half(row["low"], row["high"], metric)


def _short_difference(row: dict[str, float | None], metric: str) -> str:
    half = _half(row["difference_low"], row["difference_high"], metric)
    return value_text(row["difference"], metric, "+") + half + _mark(row)


def _half(low: float | None, high: float | None, metric: str) -> str:
    return "" if low is None or high is None else f"±{value_text((high - low) / 2, metric)}"


def _mark(row: dict[str, float | None]) -> str:
    low, high = row["difference_low"], row["difference_high"]
    if low is None or high is None:
        return ""
    return "▲" if low > 0 else "▼" if high < 0 else ""


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _small(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2g}"


def _mean(values: pl.Series) -> float | None:
    mean = values.mean()
    return float(mean) if isinstance(mean, float) else None
