"""Confirmation of a sweep: fine-tune some of its configurations, and compare the rankings."""

from pathlib import Path
from typing import Any

import tomli_w
from accelerate import PartialState

from embrm.core.errors import UserError, nearest
from embrm.core.files import write_bytes
from embrm.core.specs import read_toml
from embrm.finetuning.choice import Choice, choose, rank
from embrm.finetuning.run import RunsFailedError, finetune
from embrm.finetuning.spec import FinetuneSpec
from embrm.lm.loading import find_device
from embrm.reports.run import ConfirmationReport, confirmation_report
from embrm.results.ledger import Results, cache_of, open_results
from embrm.studies.confirmation.measure import compare_stages

_OPTIMISATION = (
    "lr",
    "weight_decay",
    "betas",
    "epochs",
    "batch_pairs",
    "patience",
    "schedule",
    "warmup",
)
"""Fields of a run that the fine-tune's spec sets. All others come from the sweep."""


def confirm(
    sweep: Path,
    runs: str,
    spec_path: Path,
    cache: Path | None = None,
    *,
    rank_by: str | None = None,
    device: str = "auto",
    out: Path | None = None,
) -> ConfirmationReport | None:
    """Fine-tune the configurations `runs` of the results folder `sweep`, and report how far the
    sweep's ranking holds.

    runs: a choice as `choice.choose` reads it. spec_path: a fine-tune's TOML file without runs and
    baseline; every configuration gets its seeds. cache: the sweep's cache, if it has moved.
    rank_by: as of `choice.rank`. out: the results folder of the fine-tune; default: the spec's path
    without `.toml`. Its spec is written there as finetune.toml, and the comparison as confirm.md,
    confirm.json and figures/agreement.*. Runs that `out` holds already are not trained again.
    Of several processes that train together, all but the first return None.

    Raises: UserError for anything wrong in the spec or in `runs`, for another cache than the
    sweep's, for the sweep's own folder as `out`, and as `finetune` does. For runs that failed it is
    raised after the report of the others has been written.
    """
    out = out or spec_path.with_suffix("")
    if out.resolve() == sweep.resolve():
        raise UserError(
            f"out (--out) = {out} is the sweep's own folder: name another for the fine-tune"
        )
    frozen = open_results(sweep)
    if frozen.spec.data_seeds != (0,):
        raise UserError(
            f"{sweep} has data_seeds = {list(frozen.spec.data_seeds)}, and a fine-tune has data "
            "seed 0: confirm a sweep without data_seeds"
        )
    ranking = rank(frozen, rank_by)
    choice = choose(frozen, ranking, runs)
    values = finetune_values(frozen, choice, read_toml(spec_path), str(spec_path))
    named = Path(values["cache"]) if "cache" in values else None
    folder = cache_of(frozen, cache or named).folder
    derived = out / "finetune.toml"
    processes = PartialState(cpu=find_device(device).type == "cpu")
    with processes.main_process_first():
        if processes.is_main_process:
            write_bytes(derived, tomli_w.dumps(values).encode())
    failed = None
    try:
        finetune(derived, folder, out=out, device=device)
    except RunsFailedError as error:
        failed = error
    if not processes.is_main_process:
        return None
    try:
        confirmation = compare_stages(
            frozen,
            open_results(out),
            choice.matches,
            choice.excluded,
            choice.baseline,
            ranking.ranked_splits,
        )
    except UserError as error:
        raise failed or error from None
    report = confirmation_report(confirmation, out)
    if failed:
        raise UserError(f"{failed}; the others are compared in {out / 'confirm.md'}")
    return report


def finetune_values(
    frozen: Results, choice: Choice, values: dict[str, Any], where: str
) -> dict[str, Any]:
    """Complete a fine-tune's spec with the runs of `choice` and the sweep's data.

    values: the spec as read from `where`. Returns the values of a complete spec.
    Raises: UserError when `values` are not a fine-tune's spec, or set what the sweep determines:
    runs, an objective, other training data or scenarios, or a split that the sweep has not
    evaluated.
    """
    for field in ("runs", "baseline"):
        if field in values:
            raise UserError(f"{where}: {field}: the sweep and runs (--runs) say which: remove it")
    sweep, evaluated = frozen.spec, sorted(frozen.prompts["split"].unique())
    divided = sweep.scenarios
    merged = {
        "train": list(sweep.train),
        "validation": sweep.validation,
        "validation_labels": sweep.validation_labels,
        "evaluate": evaluated,
        **({"scenarios": divided.model_dump(mode="json", exclude_none=True)} if divided else {}),
        **values,
        "baseline": choice.baseline,
        "runs": list(choice.runs),
    }
    spec = FinetuneSpec.parse(merged, where)
    for field in spec.defaults:
        if field not in _OPTIMISATION:
            raise UserError(
                f"{where}: defaults.{field}: the sweep's configurations settle it: remove it, "
                f"defaults may have {', '.join(_OPTIMISATION)}"
            )
    for field in ("train", "validation", "validation_labels", "scenarios"):
        if getattr(spec, field) != getattr(sweep, field):
            raise UserError(
                f"{where}: {field} = {values[field]!r}, and the sweep has "
                f"{getattr(sweep, field)!r}: remove it"
            )
    for split in spec.evaluate or ():
        if split not in evaluated:
            raise UserError(
                f"{where}: evaluate names {split!r}, which the sweep has not evaluated: "
                f"{nearest(split, evaluated)}"
            )
    return merged
