"""`embrm bench`: benchmarks that compare ways of doing the same work on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from embrm.cli.options import Json
from embrm.cli.printing import print_parts, print_table
from embrm.core.errors import UserError
from embrm.core.interrupts import raised_interrupts

# Benchmarks run within `raised_interrupts`, so that Ctrl-C deletes their temporary files.

app = typer.Typer(
    help="Compare speed and memory side by side on this machine. Times in the help of each command "
    "are for its defaults on 2 cores.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Rounds = Annotated[int, typer.Option(help="Times that each row is measured.", min=1)]
Width = Annotated[
    int, typer.Option(help="Hidden size of the model with random weights, without --model.", min=64)
]
Layers = Annotated[int, typer.Option(help="Layers of the model with random weights.", min=1)]
Vocabulary = Annotated[
    int, typer.Option(help="Vocabulary of the model with random weights.", min=1024)
]
Folder = Annotated[Path, typer.Option(help="Folder for temporary files.")]


@app.command("cache")
def bench_cache(as_json: Json = False) -> None:
    """Compare Parquet encodings of states: bytes and reading time. Takes about 15 seconds."""
    from embrm.bench.encodings import measure_encodings

    rows = measure_encodings()
    print(json.dumps(rows, indent=1)) if as_json else print_table(rows)


@app.command("adopt")
def bench_adopt(
    prompts: Annotated[
        int,
        typer.Option(
            help="Prompts of the array, each with 10 float32 states of width 2,048.", min=2
        ),
    ] = 20_000,
    folder: Annotated[
        Path, typer.Option(help="Folder for temporary files: 3.3 GB for 20,000 prompts.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Compare adopting a large array with copying its file. Takes about 1 minute."""
    from embrm.bench.adoption import measure_adoption

    with raised_interrupts():
        rows = measure_adoption(folder, prompts=prompts)
    print(json.dumps(rows, indent=1)) if as_json else print_table(rows)


@app.command("sweep")
def bench_sweep(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="heads: sweeps against training loops, scikit-learn and the machine's limits. "
            "reference: against a published training protocol. growth: time and memory by number "
            "of runs, pairs and width. whole: one large sweep. memory: a 3 GB cache within 1.5 GB "
            "[default: all of them].",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Cache whose train split the part reference uses, instead of synthetic pairs."
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option(help="Runs of the part whole; five in six have a linear head.", min=20)
    ] = 240,
    folder: Annotated[
        Path, typer.Option(help="Folder for temporary caches; the part memory takes 7 GB.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Compare sweeps with other ways of training. Takes 2 to 5 minutes for each part."""
    from embrm.bench.run import measure_sweep

    with raised_interrupts():
        print_parts(measure_sweep(parts or [], folder, cache, runs), as_json)


@app.command("grm")
def bench_grm(
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Cache with token rows whose train split is used, instead of a synthetic one."
        ),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="Pairs of the synthetic cache [15000].", min=100)
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Folder for temporary files, 3.5 GB for 15,000 pairs.")
    ] = Path(),
    top_k: Annotated[
        int | None,
        typer.Option(help="Logits kept for each token row of the synthetic cache [32].", min=1),
    ] = None,
    tail_mean: Annotated[
        bool, typer.Option("--tail-mean", help="Give the synthetic cache tail means too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare regularizers through the frozen LM head with none. Takes about 4 minutes."""
    from embrm.bench.caches import Tokens
    from embrm.bench.grm import measure_grm

    if cache and (pairs or top_k or tail_mean):
        raise UserError(
            "--pairs, --top-k and --tail-mean are for a synthetic cache: leave them or --cache out"
        )
    tokens = Tokens(top_k=top_k or Tokens.top_k, tail_mean=tail_mean)
    with raised_interrupts():
        print_parts(measure_grm(folder, cache, pairs=pairs or 15_000, tokens=tokens), as_json)


@app.command("extract")
def bench_extract(
    model: Annotated[
        str | None,
        typer.Option(help="Causal LM to extract with, instead of a small one with random weights."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Preference data to read, instead of synthetic pairs; repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in a batch, padding included.")
    ] = None,
    responses: Annotated[int, typer.Option(help="Approximate number of responses to read.")] = 32,
    rounds: Rounds = 3,
    width: Width = 512,
    layers: Layers = 6,
    vocabulary: Vocabulary = 16_384,
    folder: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Compare extraction with calling the model directly. Takes about 4 minutes."""
    from embrm.bench.extraction import Size, measure_extraction

    with raised_interrupts():
        print_parts(
            measure_extraction(
                folder,
                model,
                data or (),
                dtype=dtype,
                device=device,
                batch_tokens=batch_tokens,
                responses=responses,
                rounds=rounds,
                size=Size(width, layers, vocabulary),
            ),
            as_json,
        )


@app.command("finetune")
def bench_finetune(
    model: Annotated[
        str | None,
        typer.Option(help="Causal LM to fine-tune, instead of a small one with random weights."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Preference data to train on, instead of synthetic pairs.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of arithmetic: float32 or bfloat16.")
    ] = "float32",
    device: Device = "auto",
    batch_pairs: Annotated[
        int, typer.Option(help="Pairs per optimizer step, a multiple of 4.", min=4)
    ] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps; the first is not timed.", min=2)] = 3,
    rounds: Rounds = 1,
    width: Width = 512,
    layers: Layers = 6,
    vocabulary: Vocabulary = 16_384,
    folder: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Compare fine-tuning with TRL, and GRM with Bradley-Terry. Takes about 2 minutes for each of
    two parts."""
    from embrm.bench.extraction import Size
    from embrm.bench.finetuning import measure_finetuning

    with raised_interrupts():
        print_parts(
            measure_finetuning(
                folder,
                model,
                data,
                dtype=dtype,
                device=device,
                batch_pairs=batch_pairs,
                steps=steps,
                rounds=rounds,
                size=Size(width, layers, vocabulary),
            ),
            as_json,
        )


@app.command("evaluate")
def bench_evaluate(as_json: Json = False) -> None:
    """Compare best of n with sorting, and the bootstrap with its matrix products. Takes about
    1 minute."""
    from embrm.bench.evaluation import measure_evaluation

    with raised_interrupts():
        print_parts(measure_evaluation(), as_json)
