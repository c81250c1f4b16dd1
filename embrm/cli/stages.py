"""The stages: extract, sweep, finetune, confirm, and the demo of them all."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from embrm.cli.caches import cache_show
from embrm.cli.options import Json, Memory, MovedCache, SweepFolder, byte_size
from embrm.cli.printing import print_report, show
from embrm.cli.spec_options import with_spec_options
from embrm.core.errors import UserError
from embrm.extraction.engines import engine_help

app = typer.Typer()


@app.command()
@with_spec_options(
    "embrm.extraction.spec",
    "ExtractSpec",
    {
        "states": "Views to store: last, mean, prenorm, layer:K; with commas, or repeated",
        "engine": f"What runs the model: {engine_help()}",
    },
)
def extract(
    spec: Annotated[
        Path | None, typer.Argument(help="TOML spec; options given beside it take precedence.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Cache folder to write, such as cache/NAME.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="[SPLIT=]PATH_OR_HUB_ID of preference data; repeat for more. Replaces the spec's."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1 (one GPU of several) or mps.")
    ] = "auto",
    tensor_parallel: Annotated[
        int, typer.Option(help="GPUs that share the model, with vllm.", min=1)
    ] = 1,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a batch, padding included.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run the model through torch.compile (transformers).")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n: be the i-th of n processes, from 0, and write only that part, into "
            "OUT.i-of-n; then embrm cache merge."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, tokens, bytes and time; write nothing.")
    ] = False,
    as_json: Json = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Cache a language model's final states and LM statistics over preference data."""
    from embrm.api import caches

    if "states" in fields:
        fields["states"] = ",".join(fields["states"])
    here: dict[str, Any] = {
        "data": data or None,
        "device": device,
        "tensor_parallel": tensor_parallel,
        "batch_tokens": batch_tokens,
        "compiled": compiled,
    }
    if dry_run:
        if shard is not None:
            raise UserError("--dry-run is for all shards together: leave --shard out")
        planned = dataclasses.asdict(caches.plan_extraction(spec, **here, **fields))
        planned["leaks"] = planned["leaks"].to_dicts()
        if not as_json:
            first = planned.pop("first_exclusions")
            counts = planned["exclusions"].items()
            planned["exclusions"] = {
                reason: f"{count:,}, the first is {first[reason]}" for reason, count in counts
            }
        show(planned, as_json)
        return
    if shard is None:
        folder = caches.extract(spec, out, **here, **fields).folder
        next_step = f"embrm sweep SPEC.toml --cache {folder}"
    else:
        folder = caches.extract_shard(spec, out, shard=shard, **here, **fields)
        whole, _, part = str(folder).rpartition(".")
        count = part.rpartition("-")[2]
        next_step = f"with all parts: embrm cache merge {whole}.*-of-{count} --out {whole}"
    cache_show(folder, as_json=as_json)
    if not as_json:
        print(f"next{', ' if shard else ': '}{next_step}")


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="TOML spec, such as sweeps/NAME.toml.")],
    cache: Annotated[Path | None, typer.Option(help="Cache, instead of the spec's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder [default: the spec's path without .toml].")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes [default: cores].")] = None,
    memory: Memory = None,
    numerics: Annotated[
        str | None,
        typer.Option(help="native, portable, cuda, cuda-tf32 or mps, instead of the spec's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many runs and how long; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the reward heads of a sweep on a cache; finished runs are skipped."""
    from embrm.api import sweeps
    from embrm.api.arguments import numerics_mode

    mode = numerics_mode(numerics)
    if dry_run:
        show(sweeps.plan_sweep(spec, cache, jobs=jobs, out=out, numerics=mode), as_json)
        return
    size = byte_size("--memory", memory)
    results = sweeps.sweep(spec, cache, out=out, jobs=jobs, numerics=mode, memory=size)
    folder, runs = results.folder, results.stored.ledger
    diverged = runs.filter(runs["status"] == "diverged").height
    if diverged == runs.height:
        raise UserError(
            f"all {diverged} runs diverged: lower lr, or try preprocess = 'standardize'"
        )
    if as_json:
        print(json.dumps({"results": str(folder), "runs": runs.height, "diverged": diverged}))
        return
    if diverged:
        print(f"{diverged} of {runs.height} runs diverged, the report leaves them out: lower lr")
    print(f"results in {folder}; next: embrm report {folder}")


@app.command()
def finetune(
    spec: Annotated[Path, typer.Argument(help="TOML spec: a sweep's, and how to tune the model.")],
    cache: Annotated[Path | None, typer.Option(help="Cache, instead of the spec's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder [default: the spec's path without .toml].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Train the model itself with a sweep's objectives; finished runs are skipped."""
    from embrm.finetuning.run import finetune as run_finetune
    from embrm.results.ledger import open_results

    folder = run_finetune(spec, cache, out=out, device=device)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes speaks
    if as_json:
        runs = open_results(folder).ledger.height
        print(json.dumps({"results": str(folder), "runs": runs}))
    else:
        print(f"results in {folder}; next: embrm report {folder}")
    # A finished run has none, and here all of the spec are finished.
    if (folder / "checkpoints").exists():
        print(
            f"{folder / 'checkpoints'} is of runs that are no longer in the spec: delete it, or "
            "put them back",
            file=sys.stderr,
        )


@app.command()
def confirm(
    folder: SweepFolder,
    runs: Annotated[
        str,
        typer.Option(
            help="Configurations, with commas: top:N, spread:N (in rank), random:N (of the rest), "
            "baseline, or names."
        ),
    ],
    spec: Annotated[
        Path, typer.Option(help="TOML spec of the fine-tune, without runs: seeds, tune, defaults.")
    ],
    cache: MovedCache = None,
    out: Annotated[
        Path | None, typer.Option(help="Results folder [default: the spec's path without .toml].")
    ] = None,
    rank_by: Annotated[
        str | None,
        typer.Option(help="A split, 'ood' for all ood/..., or METRIC@SPLIT [default: all]."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Fine-tune some of a sweep's configurations; report how far its ranking holds."""
    from embrm.finetuning.confirm import confirm as run_confirm

    result = run_confirm(folder, runs, spec, cache, rank_by=rank_by, device=device, out=out)
    if result is None:
        return  # one of several processes speaks
    if as_json:
        print(result.json())
        return
    print_report(result.tables, result.files)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's files.")] = Path("runs/demo"),
    rlhf: Annotated[
        bool,
        typer.Option(
            "--rlhf",
            help="Then optimise the language model against two of the reward heads, with TRL, and "
            "watch the gold reward.",
        ),
    ] = False,
) -> None:
    """Run the whole lab offline on a synthetic preference world with known gold reward."""
    if rlhf:
        from embrm.demo.rlhf import rlhf as run_rlhf

        run_rlhf(out)
        return
    from embrm.demo.run import demo as run_demo

    run_demo(out)
