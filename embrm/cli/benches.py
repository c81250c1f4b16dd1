"""embrm bench: ratios measured on this machine."""

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

from embrm.cli.options import Json
from embrm.cli.printing import filled, print_parts, print_table
from embrm.core.errors import UserError

app = typer.Typer(
    help="Measure ratios on this machine.", no_args_is_help=True, rich_markup_mode=None
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Width = Annotated[int, typer.Option(help="Of the model of random weights.", min=64)]
Layers = Annotated[int, typer.Option(help="Of that model.", min=1)]
Vocabulary = Annotated[int, typer.Option(help="Of that model.", min=1024)]
Folder = Annotated[Path, typer.Option(help="Where temporary files go.")]


@app.command("cache")
def bench_cache(as_json: Json = False) -> None:
    """Compare encodings of states: bytes on disk and reading time, as ratios."""
    from embrm.bench.encodings import measure_encodings

    rows = measure_encodings()
    print(json.dumps(rows, indent=1)) if as_json else print_table(rows)


@app.command("adopt")
def bench_adopt(
    prompts: Annotated[
        int, typer.Option(help="Of the array, of 10 states of 2,048 float32 each.", min=2)
    ] = 40_000,
    folder: Annotated[
        Path, typer.Option(help="Where temporary files go: 6.6 GB for 40,000 prompts.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Compare adopting a large array with copying its file."""
    from embrm.bench.adoption import measure_adoption

    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = measure_adoption(folder, prompts=prompts)
    print(json.dumps(rows, indent=1)) if as_json else print_table(rows)


@app.command("sweep")
def bench_sweep(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="heads: whole sweeps against loops, scikit-learn and the machine's limits. "
            "reference: against the published protocol. growth: with runs, pairs and width. "
            "whole: 1,200 runs as one command. memory: a 6 GB cache within 1.5 GB "
            "[default: all of them].",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache whose train split the reference uses, instead of made-up pairs."),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="Where temporary caches go; memory takes 13 GB.")
    ] = Path(),
    as_json: Json = False,
) -> None:
    """Compare whole sweeps with what they replace, and with what this machine can do."""
    from embrm.bench.run import measure_sweep

    # An interrupt must not leave the temporary caches behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print_parts(measure_sweep(parts or [], folder, cache), as_json)


@app.command("grm")
def bench_grm(
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache with token rows whose train split is used, instead of a made-up."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where temporary files go, 10 to 15 GB.")] = Path(),
    top_k: Annotated[
        int | None, typer.Option(help="Logits kept a token row of the made-up cache [32].", min=1)
    ] = None,
    tail_mean: Annotated[
        bool, typer.Option("--tail-mean", help="The made-up cache has tail means too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare regularizers through the frozen LM head with the same head without one."""
    from embrm.bench.caches import Tokens
    from embrm.bench.grm import measure_grm

    if cache and (top_k or tail_mean):
        raise UserError("--top-k and --tail-mean are of a made-up cache: leave --cache out")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tokens = Tokens(top_k=top_k or Tokens.top_k, tail_mean=tail_mean)
    rows = measure_grm(folder, cache, tokens=tokens)
    print(json.dumps(rows, indent=1)) if as_json else print_table(filled(rows))


@app.command("extract")
def bench_extract(
    model: Annotated[
        str | None,
        typer.Option(help="Causal LM to read with, instead of a small one of random weights."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Preference data to read, instead of made-up pairs; repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a batch, padding included.")
    ] = None,
    responses: Annotated[int, typer.Option(help="About how many to read.")] = 256,
    rounds: Annotated[int, typer.Option(help="Of every way, in turns.", min=1)] = 3,
    width: Width = 512,
    layers: Layers = 6,
    vocabulary: Vocabulary = 16_384,
    folder: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Compare extraction with the bare model, with padded batches, and with writing nothing."""
    from embrm.bench.extraction import Size, measure_extraction

    signal.signal(signal.SIGINT, signal.default_int_handler)
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
        typer.Option(help="Causal LM to fine-tune, instead of a small one of random weights."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Preference data to train on, instead of made-up pairs.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the arithmetic.")] = "float32",
    device: Device = "auto",
    batch_pairs: Annotated[int, typer.Option(help="Pairs of a step, a multiple of 4.", min=4)] = 8,
    steps: Annotated[
        int, typer.Option(help="Of the optimizer; the first is not timed.", min=2)
    ] = 4,
    rounds: Annotated[int, typer.Option(help="Of every way, in turns.", min=1)] = 2,
    width: Width = 512,
    layers: Layers = 6,
    vocabulary: Vocabulary = 16_384,
    folder: Folder = Path(),
    as_json: Json = False,
) -> None:
    """Compare fine-tuning with TRL's trainer and the bare backbone, and GRM with Bradley-Terry."""
    from embrm.bench.extraction import Size
    from embrm.bench.finetuning import measure_finetuning

    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows = measure_finetuning(
        folder,
        model,
        data,
        dtype=dtype,
        device=device,
        batch_pairs=batch_pairs,
        steps=steps,
        rounds=rounds,
        size=Size(width, layers, vocabulary),
    )
    print(json.dumps(rows, indent=1)) if as_json else print_table(filled(rows))


@app.command("evaluate")
def bench_evaluate(as_json: Json = False) -> None:
    """Compare best of n with a bare sort, and the bootstrap with its bare products."""
    from embrm.bench.evaluation import measure_evaluation

    signal.signal(signal.SIGINT, signal.default_int_handler)
    print_parts(measure_evaluation(), as_json)
