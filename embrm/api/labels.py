"""Label tables for a sweep's training pairs: made, measured, changed and read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embrm.api.arguments import AnyPath, AnySpec, cache_folder, optional_path, path, public

if TYPE_CHECKING:
    from embrm.cache.reader import Cache
    from embrm.data.label_tables import LabelTable


@public
def annotate_labels(
    spec: AnySpec,
    out: AnyPath,
    *,
    quality: float,
    seed: int = 0,
    cache: Cache | AnyPath | None = None,
) -> LabelTable:
    """Label training pairs by an annotator that errs where gold scores are close.

    Twin of `embrm labels annotate`. P(win) = sigmoid(quality · gold difference / sd of gold).
    """
    from embrm.api.arguments import spec_source
    from embrm.data.label_tables import write_label_table
    from embrm.studies.annotation import annotation

    made = annotation(spec_source(spec), cache_folder(cache), quality=quality, seed=seed).labels
    write_label_table(path(out, "out"), made)
    return made


@public
def measure_strengths(
    folder: AnyPath,
    configuration: str,
    out: AnyPath,
    *,
    out_of_fold: bool = False,
    cache: AnyPath | None = None,
) -> LabelTable:
    """Measure how strongly a configuration's heads prefer the chosen response of each pair.

    Twin of `embrm labels strength`. out_of_fold: judge each pair by heads that did not see its
    prompt.
    """
    from embrm.data.label_tables import write_label_table
    from embrm.studies.strength.measure import strengths

    found = strengths(
        path(folder, "folder"),
        configuration,
        optional_path(cache, "cache"),
        out_of_fold=out_of_fold,
    )
    write_label_table(path(out, "out"), found)
    return found


@public
def remedy_labels(strengths: AnyPath, out: AnyPath, **remedies: Any) -> LabelTable:
    """Change labels by percentile of strength; twin of `embrm labels remedy`.

    strengths: a table of `measure_strengths`. remedies: flip, smooth, soft, margin, drop or keep,
    each a pair (low, high) of shares of the pairs, the weakest first; epsilon, of smooth.
    """
    from embrm.data.label_tables import read_label_table, write_label_table
    from embrm.data.remedies import Remedy, apply_remedy

    remedy = Remedy.parse(remedies, "remedies")
    made = apply_remedy(remedy, read_label_table(path(strengths, "strengths"), "strengths"))
    write_label_table(path(out, "out"), made)
    return made


@public
def read_labels(table: AnyPath) -> LabelTable:
    """Read a table of labels or strengths, with how it was made; twin of `embrm labels show`."""
    from embrm.data.label_tables import open_label_table

    return open_label_table(path(table, "table"))
