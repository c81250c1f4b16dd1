"""Confirming a sweep: fine-tune some of its configurations, and see whether their ranking holds."""

import json
import re
from pathlib import Path
from typing import Any

from accelerate import PartialState

from embrm.core.errors import UserError, nearest
from embrm.core.files import write_bytes
from embrm.core.specs import read_toml
from embrm.finetuning.choice import Choice, choose, rank
from embrm.finetuning.run import RunsFailedError, finetune
from embrm.finetuning.spec import FinetuneSpec
from embrm.lm.loading import find_device
from embrm.reports.run import ConfirmationReport, confirmation_report
from embrm.studies.confirmation.measure import compare_stages
from embrm.sweeps.ledger import Results, cache_of, open_results

_OPTIMISATION = (
    *("lr", "weight_decay", "betas", "epochs", "batch_pairs", "patience", "schedule", "warmup"),
)
"""Fields of a run that the fine-tune's spec sets; all others are a configuration's own."""


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
    sweep's ranking holds; what `out` has already is not done again.

    runs: see `choice.choose`; rank_by: see `choice.rank`. spec_path: a fine-tune's TOML without
    runs and baseline, whose seeds every configuration gets. cache: the sweep's, if it has moved.
    out: the fine-tune's results, default the spec's path without `.toml`; its spec is written
    there too, as finetune.toml, and the two are compared in confirm.md, confirm.json and
    figures/agreement.*. Of several processes that train together all but the first return None.

    Raises: UserError for anything wrong in the spec or in `runs`, for another cache than the
    sweep's, for the sweep's own folder as `out`, for what `finetune` refuses, and, with the report
    of the others written, for runs that failed.
    """
    out = out or spec_path.with_suffix("")
    if out.resolve() == sweep.resolve():
        raise UserError(f"--out {out} is the sweep's own folder: name another for the fine-tune")
    frozen = open_results(sweep)
    ranking = rank(frozen, rank_by)
    choice = choose(frozen, ranking, runs)
    values = finetune_values(frozen, choice, read_toml(spec_path), str(spec_path))
    named = Path(values["cache"]) if "cache" in values else None
    folder = cache_of(frozen, cache or named).folder
    derived = out / "finetune.toml"
    processes = PartialState(cpu=find_device(device).type == "cpu")
    with processes.main_process_first():
        if processes.is_main_process:
            write_bytes(derived, toml(values).encode())
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
    """`values`, read from `where`, with the runs of `choice` and the sweep's data: a fine-tune's.

    Raises: UserError when they are no such spec, or have what the sweep settles: runs, an
    objective, other training data, other scenarios, a split that the sweep has not evaluated.
    """
    for field in ("runs", "baseline"):
        if field in values:
            raise UserError(f"{where}: {field}: the sweep and --runs say which: remove it")
    sweep, evaluated = frozen.spec, sorted(frozen.prompts["split"].unique())
    divided = sweep.scenarios
    merged = {
        "train": list(sweep.train),
        "validation": sweep.validation,
        "evaluate": evaluated,
        **({"scenarios": divided.model_dump(mode="json", exclude_none=True)} if divided else {}),
        **values,
        "baseline": choice.baseline,
        "runs": list(choice.runs),
    }
    asked = FinetuneSpec.parse(merged, where)
    for field in asked.defaults:
        if field not in _OPTIMISATION:
            raise UserError(
                f"{where}: defaults.{field}: the sweep's configurations settle it: remove it, "
                f"defaults may have {', '.join(_OPTIMISATION)}"
            )
    for field in ("train", "validation", "scenarios"):
        if getattr(asked, field) != getattr(sweep, field):
            raise UserError(
                f"{where}: {field} = {values[field]!r}, and the sweep has "
                f"{getattr(sweep, field)!r}: remove it"
            )
    for split in asked.evaluate or ():
        if split not in evaluated:
            raise UserError(
                f"{where}: evaluate names {split!r}, which the sweep has not evaluated: "
                f"{nearest(split, evaluated)}"
            )
    return merged


def toml(values: dict[str, Any]) -> str:
    """A spec as TOML: tables of the top level by themselves, all others inline."""
    plain = {key: value for key, value in values.items() if not _tables(value)}
    parts = [_entries(plain)]
    for key, value in values.items():
        if isinstance(value, dict):
            parts.append(f"[{_key(key)}]\n{_entries(value)}")
        elif _tables(value):
            parts += [f"[[{_key(key)}]]\n{_entries(entry)}" for entry in value]
    return "\n".join(parts)


def _tables(value: Any) -> bool:
    entries = value if isinstance(value, list) and value else [value]
    return all(isinstance(entry, dict) for entry in entries)


def _entries(values: dict[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_inline(value)}\n" for key, value in values.items())


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_inline(inner)}" for key, inner in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else _string(name)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
