"""Running a sweep: worker processes train packs of runs, resumable at any moment."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from embrm.core.errors import UserError
from embrm.core.files import exclusive, remove_temporaries
from embrm.core.provenance import provenance
from embrm.core.specs import SpecSource
from embrm.sweeps.ledger import finished, write_results
from embrm.sweeps.matching import match_rates
from embrm.sweeps.prepare import leaked, prepare_sweep, step_warnings
from embrm.sweeps.run_training import train_runs
from embrm.sweeps.selection import prompts_of
from embrm.sweeps.workers import worker_count
from embrm.training.numerics import Numerics, settings


def sweep(
    spec: SpecSource,
    cache: Path | None = None,
    *,
    jobs: int | None = None,
    out: Path | None = None,
    numerics: Numerics | None = None,
    memory: int | None = None,
) -> Path:
    """Train and evaluate every run of the spec that `out` does not hold yet; returns `out`.

    spec: a TOML file, or a mapping with its keys. cache: folder, instead of the spec's own.
    jobs: worker processes, by default one per core. out: results folder, by default the path of the
    TOML file without `.toml`. numerics: instead of the spec's. memory: bytes of states that the
    workers may keep in memory; larger caches are streamed.
    Raises: UserError for anything wrong in the spec or cache, and at the end for failed runs;
    whatever has finished by then is kept and compacted.
    """
    out = results_folder(spec, out)
    prepared = prepare_sweep(spec, cache, numerics)
    mode = prepared.spec.numerics
    jobs = worker_count(jobs, mode)
    with exclusive(out):
        remove_temporaries(out)
        prepared = match_rates(prepared, out, jobs=jobs, memory=memory)
        done = finished(out)
        todo = [run for run in prepared.runs if run.run_id not in done]
        for line in step_warnings(prepared) if todo else ():
            print(f"warning: {line}", file=sys.stderr)
        environment = _environment(out, mode, trained=bool(todo))
        failures: dict[str, str] = {}
        interrupted = False
        try:
            failures = train_runs(
                prepared,
                todo,
                out,
                jobs=jobs,
                memory=memory,
                done=len(prepared.runs) - len(todo),
            )
        except KeyboardInterrupt:
            interrupted = True
        header = {
            "cache": str(prepared.cache.folder),
            "cache_id": prepared.cache.cache_id,
            "leaked": leaked(prepared.cache, prepared.spec, prepared.evaluate),
            "environment": environment,
        }
        prompts = prompts_of(prepared.cache, prepared.selection, prepared.spec.data_seeds)
        write_results(out, prepared.spec, prepared.runs, prepared.evaluate, header, prompts)
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        listed = "; ".join(f"{run}: {why}" for run, why in [*failures.items()][:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise UserError(
            f"{len(failures)} of {len(prepared.runs)} runs failed, the others are kept: "
            f"{listed}{more}"
        )
    return out


def _environment(out: Path, mode: Numerics, *, trained: bool) -> dict[str, Any]:
    """This process's environment, or the recorded one if nothing was trained now."""
    if not trained:
        with suppress(OSError, ValueError, KeyError, TypeError):
            stored: dict[str, Any] = json.loads((out / "sweep.json").read_bytes())["environment"]
            return stored
    return {**provenance(), "numerics": {"mode": mode, **settings(mode)}}


def results_folder(spec: SpecSource, out: Path | None) -> Path:
    """The results folder. Raises: UserError when neither `out` nor the path of a spec names it."""
    if out is not None:
        return out
    if not isinstance(spec, Path):
        raise UserError("out is missing: name the results folder, such as sweeps/NAME")
    return spec.with_suffix("")
