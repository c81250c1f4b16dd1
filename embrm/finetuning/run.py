"""Fine-tuning: a spec and a cache in, results in a sweep's layout out, resumable at any moment."""

import json
from contextlib import nullcontext
from pathlib import Path

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache

from embrm.core.errors import UserError
from embrm.core.files import exclusive, remove_temporaries
from embrm.core.provenance import provenance
from embrm.finetuning.finetuner import Finetuner
from embrm.finetuning.inputs import FinetuneInputs, read_inputs
from embrm.finetuning.sharding import read_everywhere
from embrm.finetuning.spec import micro_pairs
from embrm.finetuning.trainer import NotFiniteError
from embrm.lm.loading import find_device
from embrm.sweeps.ledger import finished, write_results
from embrm.sweeps.prepare import leaked
from embrm.sweeps.selection import prompt_table


class RunsFailedError(UserError):
    """Some runs, but not all, had a loss that was not finite; the results of the others exist."""


def finetune(
    spec_path: Path, cache: Path | None = None, *, out: Path | None = None, device: str = "auto"
) -> Path:
    """Train and evaluate every run of the spec that `out` does not hold yet; return `out`.

    cache: the cache folder, if not the spec's own. out: the results folder, in a sweep's layout
    (`embrm.sweeps.ledger`); default: the spec's path without `.toml`. device: auto, cpu, cuda or
    mps. Started by `accelerate launch` or torchrun, the processes train each run together.

    Raises: UserError for anything wrong in spec, cache, model or data, when memory runs out, and
    at the end for runs whose loss was not finite. Whatever has finished by then is kept.
    """
    if ":" in device:
        raise UserError(f"device = {device!r}: choose GPUs with CUDA_VISIBLE_DEVICES")
    read_everywhere()
    kind = find_device(device).type
    processes = PartialState(cpu=kind == "cpu")
    inputs = read_inputs(spec_path, cache)
    main = processes.is_main_process
    out = out or spec_path.with_suffix("")
    _refuse_sweep(out)
    for run in inputs.runs:
        where = f"{inputs.where}: run {run.name!r}"
        micro_pairs(inputs.spec, run.spec, processes.num_processes, where)
    with exclusive(out) if main else nullcontext():
        if main:
            remove_temporaries(out)
        processes.wait_for_everyone()
        done = finished(out)
        failures: dict[str, str] = {}
        finetuner = Finetuner(inputs, out, kind)
        for run in inputs.runs:
            if run.run_id not in done:
                try:
                    finetuner.finish(run)
                except NotFiniteError as error:
                    failures[f"{run.name} seed {run.spec.seed}"] = str(error)
                # Only here, after the except clause, has the exception released the trainer.
                clear_device_cache(garbage_collection=True)
        if main:
            _write_results(inputs, out, finetuner)
        processes.wait_for_everyone()
    if failures:
        listed = "; ".join(f"{run}: {why}" for run, why in [*failures.items()][:5])
        some_finished = len(failures) < len(inputs.runs)
        raise (RunsFailedError if some_finished else UserError)(
            f"{len(failures)} of {len(inputs.runs)} runs failed: {listed}"
        )
    return out


def _refuse_sweep(out: Path) -> None:
    try:
        header = json.loads((out / "sweep.json").read_bytes())
    except (OSError, ValueError):
        return  # there are no results, or a damaged header, which is written again
    if "finetune" not in header:
        raise UserError(
            f"{out} holds the results of a sweep: choose another folder with out (--out)"
        )


def _write_results(inputs: FinetuneInputs, out: Path, finetuner: Finetuner) -> None:
    """Join the parts of all finished runs into the tables of the results folder."""
    spec, cache = inputs.spec, inputs.cache
    header = {
        "cache": str(cache.folder),
        "cache_id": cache.cache_id,
        "leaked": leaked(cache, spec, inputs.evaluate),
        "environment": {
            **provenance(),
            "numerics": {
                "mode": finetuner.numerics,
                "processes": PartialState().num_processes,
            },
        },
        "finetune": spec.model_dump(mode="json"),
    }
    write_results(
        out, spec.as_sweep, inputs.runs, inputs.evaluate, header, prompt_table(finetuner.splits)
    )
