"""The command line: parse, call, print. One command per stage; the stages do the work.

Stage modules are imported inside the commands, so `embrm --help` stays fast and a sweep never
loads transformers.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast, get_args

import typer

from embrm import __version__
from embrm.errors import UserError, nearest

if TYPE_CHECKING:
    from embrm.report.table import Table

app = typer.Typer(
    name="embrm",
    help="Pay for the language model once, then train hundreds of reward heads on its states.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(
    help="Adopt, list, show, verify, merge and probe caches.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache")
labels_app = typer.Typer(
    help="Make tables of labels for a sweep's training pairs, and show them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(labels_app, name="labels")
bench_app = typer.Typer(
    help="Measure ratios on this machine.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
CacheFolder = Annotated[Path, typer.Argument(help="Cache folder, such as cache/NAME.")]
Memory = Annotated[
    str | None,
    typer.Option(
        help="What this process and its workers together may take, such as 4GB; a larger cache is "
        "streamed [default: no limit]."
    ),
]
SweepFolder = Annotated[Path, typer.Argument(help="Results folder, such as sweeps/NAME.")]

_EXTRAS = {
    **dict.fromkeys(["transformers", "datasets", "huggingface_hub"], "extract"),
    **dict.fromkeys(["accelerate", "peft", "trl"], "finetune"),
    "vllm": "vllm",
}
"""Packages that not every command needs, and the extra that installs each."""


def main() -> None:
    """Run the command line; what a user can cause ends in one line and exit code 2."""
    before = signal.signal(signal.SIGINT, _stop)
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _stop()
    except SystemExit as end:
        if end.code == 130:  # typer's word for an interrupt inside a command
            _stop()
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        extra = f"pip install 'embrm[{_EXTRAS[package]}]'"
        _fail(f"this command needs {package}, which is not installed: {extra}")
    except BrokenPipeError:
        os._exit(1)  # the reader has gone; flushing would fail again
    except OSError as error:
        name = error.filename or "standard output"
        _fail(f"{name}: {error.strerror or error}: check the path, its permissions and the disk")
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _stop(*_: object) -> None:
    """End now, wherever the process is.

    Every write survives a kill, and an exception would come out of whatever is being imported.
    """
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar has hidden it
    line = f"{cursor}interrupted: finished work is kept; run the same command again to go on\n"
    os.write(2, line.encode())
    os._exit(130)


def _bytes(option: str, text: str | None) -> int | None:
    """A size such as 4GB, 1.5GB or 800MB, in units of 1,000; None for none."""
    if text is None:
        return None
    units = {"TB": 10**12, "GB": 10**9, "MB": 10**6}
    for unit, factor in units.items():
        number = text.strip().upper().removesuffix(unit)
        if number != text.strip().upper():
            try:
                size = float(number) * factor
            except ValueError:
                break
            if 0 < size < float("inf"):
                return int(size)
    raise UserError(f"{option} {text!r}: write a number and MB, GB or TB, such as 4GB")


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0, separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} {text!r}: write whole numbers from 1, such as 1,4,16")
    return numbers


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def extract(
    spec: Annotated[
        Path | None, typer.Argument(help="TOML spec; options given beside it take precedence.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Cache folder to write, such as cache/NAME.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Causal LM: local folder or hub id.")] = None,
    revision: Annotated[str | None, typer.Option(help="Hub revision of the model.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="[SPLIT=]PATH_OR_HUB_ID of preference data; repeat for more. Replaces the spec's."
        ),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="auto, chat or plain [default: auto].")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens a row [default: 2048, or all the model reads].")
    ] = None,
    truncation: Annotated[
        str | None,
        typer.Option(help="Over-long rows: drop, or cut the prompt's left [default: drop]."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 [default: float32].")
    ] = None,
    states: Annotated[
        list[str] | None,
        typer.Option(help="last, mean, prenorm, layer:K; with commas or repeated [last]."),
    ] = None,
    token_rows: Annotated[
        int | None, typer.Option(help="Sampled response positions a row [default: 0].")
    ] = None,
    token_positions: Annotated[
        str | None, typer.Option(help="How they are sampled: random or spaced [default: random].")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Logits kept a token row [32].")] = None,
    tail_mean: Annotated[
        bool | None,
        typer.Option("--tail-mean", help="Keep the mean gradient of all other logits too."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the position sampling [0].")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="First N rows (groups: prompts) of a split, before exclusions."),
    ] = None,
    pad_token: Annotated[
        str | None, typer.Option(help="Padding token, for a tokenizer without one.")
    ] = None,
    allow_pad_eos: Annotated[
        bool | None, typer.Option("--allow-pad-eos", help="Accept pad == eos.")
    ] = None,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run code from the model's repo.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="auto, transformers or vllm [default: auto: vllm if installed on CUDA]."),
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
) -> None:
    """Cache a language model's final states and LM statistics over preference data."""
    from embrm.data.sources import parse_source
    from embrm.extract.parts import Share
    from embrm.extract.run import ExtractSpec, plan
    from embrm.extract.run import extract as run_extract
    from embrm.specs import read_toml

    values: dict[str, Any] = read_toml(spec) if spec else {}
    named = values.pop("out", None)
    if not isinstance(named, str | None):
        raise UserError(f"{spec}: out = {named!r}: name a folder, such as out = 'cache/NAME'")
    folder = out or (Path(named) if named else None)
    given = {
        "model": model,
        "revision": revision,
        "data": [parse_source(entry) for entry in data] if data else None,
        "template": template,
        "max_length": max_length,
        "truncation": truncation,
        "dtype": dtype,
        "states": [view.strip() for view in ",".join(states).split(",")] if states else None,
        "token_rows": token_rows,
        "token_positions": token_positions,
        "top_k": top_k,
        "tail_mean": tail_mean,
        "seed": seed,
        "limit": limit,
        "pad_token": pad_token,
        "allow_pad_eos": allow_pad_eos,
        "trust_remote_code": trust_remote_code,
        "engine": engine,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    parsed = ExtractSpec.parse(values, str(spec) if spec else "command line")
    share = Share.parse(shard) if shard is not None else None
    here: dict[str, Any] = {
        "device": device,
        "tensor_parallel": tensor_parallel,
        "batch_tokens": batch_tokens,
        "compiled": compiled,
    }
    if dry_run:
        if share:
            raise UserError("--dry-run is for all shards together: leave --shard out")
        planned = dataclasses.asdict(plan(parsed, **here))
        planned["leaks"] = planned["leaks"].to_dicts()
        _show(planned, as_json)
        return
    if folder is None:
        raise UserError("--out is missing: name the cache folder to write, such as cache/NAME")
    made = run_extract(parsed, folder, share=share, **here)
    cache_show(made, as_json=as_json)
    if as_json:
        return
    if share:
        print(f"next, with all parts: embrm cache merge {folder}.*-of-{share.count} --out {folder}")
    else:
        print(f"next: embrm sweep SPEC.toml --cache {folder}")


@cache_app.command("adopt")
def cache_adopt(
    spec: Annotated[
        Path | None, typer.Argument(help="TOML spec of [[arrays]], instead of the options.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Cache folder to write, such as cache/NAME.")
    ] = None,
    states: Annotated[
        list[str] | None,
        typer.Option(help="[SPLIT=]PATH of states: .npy, .pt or .safetensors; repeat for more."),
    ] = None,
    gold: Annotated[
        list[str] | None,
        typer.Option(help="[SPLIT=]PATH of their gold scores, an array; the same splits."),
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="[SPLIT=]PATH of a table with a row a state, for (rows, width)."),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(help="First axis of three: prompts or responses [default: the longer one]."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Text file: the responses' models, one a line.")
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="How pairs are derived: 'per_prompt = 4, gap = 0.5' [default: all]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a cache of arrays of states that another program computed, checking them."""
    from embrm.adopt.run import adopt
    from embrm.adopt.spec import AdoptSpec, parse_arrays
    from embrm.specs import read_toml

    given = {"states": states, "gold": gold, "rows": rows, "order": order, "models": models,
             "pairs": pairs}  # fmt: skip
    named = [name for name, value in given.items() if value]
    if spec and named:
        raise UserError(f"--{named[0]} is for adopting without a spec: put it into {spec}")
    if out is None:
        raise UserError("--out is missing: name the cache folder to write, such as cache/NAME")
    if spec:
        parsed = AdoptSpec.parse(read_toml(spec), str(spec))
    elif not states:
        raise UserError("--states is missing: name an array of states, or a TOML spec")
    else:
        parsed = parse_arrays(
            states, gold or [], rows or [], order=order, models=models, pairs=pairs
        )
    made = adopt(parsed, out)
    cache_show(made, as_json=as_json)
    if not as_json:
        print(f"next: embrm sweep SPEC.toml --cache {out}")


@cache_app.command("ls")
def cache_ls(
    root: Annotated[Path, typer.Argument(help="Folder that holds caches.")] = Path("cache"),
    as_json: Json = False,
) -> None:
    """List the caches below a folder."""
    from embrm.cache.listing import list_caches

    rows = list_caches(root).to_dicts()
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        _table(rows)
    else:
        print(f"no caches in {root}")


@cache_app.command("show")
def cache_show(
    folder: CacheFolder,
    everything: Annotated[
        bool, typer.Option("--all", help="Identity, environment and spec too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a cache's splits, exclusions, leaks and size."""
    from embrm.cache.listing import describe, splits

    described = describe(folder)
    if as_json or everything:
        _show(described, as_json)
        return
    words = ("name", "state", "cache_id", "model", "dtype", "width", "views", "responses",
             "token_rows", "top_k", "tail_mean", "bytes")  # fmt: skip
    _lines({word: described[word] for word in words}, "")
    _table(splits(folder))
    if described["lint"]:
        print("what adopting its arrays found:")
        columns = ("source", "split", "check", "done", "count", "detail")
        _table(
            [
                {name: "" if row[name] is None else row[name] for name in columns}
                for row in described["lint"]
            ]
        )


@cache_app.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Check every byte of a cache against its manifest."""
    from embrm.cache.verify import verify

    problems = verify(folder)
    if len(problems) == 1:
        raise UserError(problems[0])
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise UserError(f"{folder} has {len(problems)} problems: see the lines above")
    print(f"{folder} is sound: every byte is as it was written")


@cache_app.command("merge")
def cache_merge(
    parts: Annotated[
        list[Path], typer.Argument(help="All folders that embrm extract --shard i/n wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Cache folder to write, such as cache/NAME.")],
) -> None:
    """Join the parts of a cache, to the bytes that one process would have written."""
    from embrm.cache.merge import merge

    merge(parts, out)
    print(f"{out} is complete, every byte as it was written: its parts can be removed")


@cache_app.command("probe")
def cache_probe(
    folder: CacheFolder,
    sample: Annotated[
        int, typer.Option(help="Responses to extract again, or to read.", min=1)
    ] = 64,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps [default: auto].")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="auto, transformers or vllm [default: what made the cache]."),
    ] = None,
    regularizer: Annotated[
        bool,
        typer.Option(
            "--regularizer",
            help="Instead, compare the regularizers' estimators with the whole vocabulary; "
            "needs the cache alone.",
        ),
    ] = False,
    target: Annotated[
        float | None,
        typer.Option(
            help="Relative error that --regularizer recommends settings for [default: 0.05].",
            min=0,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Extract a sample again at other batch sizes; report errors and changed pair orders."""
    if regularizer:
        for option, value in (("--device", device), ("--engine", engine)):
            if value is not None:
                raise UserError(
                    f"{option} is for extracting again: leave it out with --regularizer"
                )
        _probe_estimators(folder, sample, 0.05 if target is None else target, as_json)
        return
    if target is not None:
        raise UserError("--target is for --regularizer: add it, or leave --target out")
    from embrm.extract.probe import probe
    from embrm.extract.run import EngineName

    if engine is not None and engine not in get_args(EngineName):
        raise UserError(f"--engine {engine!r}: {nearest(engine, get_args(EngineName))}")
    chosen = cast("EngineName | None", engine)
    result = probe(folder, sample=sample, device=device or "auto", engine=chosen)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        rows = [dataclasses.asdict(entry) for entry in result.deviations]
        _table(_filled(rows, "n/a"))
        changed = max(entry.orders_changed or 0 for entry in result.deviations)
        print(
            f"{result.responses} responses, {result.pairs} pairs, made by {result.made_by}, read "
            f"by {result.engine}: order changed in {changed}; "
            f"relative tolerance of {result.dtype}: {result.tolerance:g}"
        )
    if not result.within_tolerance:
        raise UserError(
            f"{folder}: states, S or logsumexp differ by more than the tolerance: see above"
        )


def _probe_estimators(folder: Path, sample: int, target: float, as_json: bool) -> None:
    from embrm.sweep.estimators import advice, measure_estimators

    result = measure_estimators(folder, sample=sample, target=target)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
        return

    def short(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.2g}"

    print("top_k: probability of the tail, and relative errors of ℓ̃ - ℓ, of KL and of gradients")
    _table(
        [
            {
                "drift": entry.drift,
                "top_k": entry.top_k,
                "tail mean": "yes" if entry.tail_mean else "no",
                "tail": short(entry.tail),
                "95 %": short(entry.tail_95),
                "largest": short(entry.tail_max),
                "ℓ̃ - ℓ": short(entry.change),
                "gradient": short(entry.change_gradient),
                "KL": short(entry.kl),
                "its gradient": short(entry.kl_gradient),
            }
            for entry in result.truncation
        ]
    )
    print("\ntoken_rows: standard error of a response's S̃ - S in one minibatch")
    _table(
        [
            {
                "drift": entry.drift,
                "token_rows": entry.token_rows,
                "nats": short(entry.nats),
                "relative": short(entry.relative),
            }
            for entry in result.sampling
        ]
    )
    print(
        f"\n{result.responses} responses, {result.rows:,} token rows, {result.vocabulary:,} "
        f"tokens. For a relative error of {target:g} at drift {result.truncation[-1].drift:g}:"
    )
    grm = result.grm_top_k or f"none cached: {advice(result, 'grm')}"
    preserve = result.preserve_top_k or f"none cached: {advice(result, 'preserve')}"
    error = result.token_rows_error
    known = "" if error is not None and error <= target else f", all cached: error {short(error)}"
    print(f"grm-*: top_k = {grm}")
    print(f"grm-*: token_rows = {result.token_rows}{known}")
    print(f"preserve-*: top_k = {preserve}")


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
    from embrm.sweep.execute import sweep as run_sweep
    from embrm.sweep.ledger import open_results
    from embrm.sweep.plan import plan
    from embrm.train.numerics import Numerics

    if numerics is not None and numerics not in get_args(Numerics):
        raise UserError(f"--numerics {numerics!r}: {nearest(numerics, get_args(Numerics))}")
    mode = cast("Numerics | None", numerics)
    if dry_run:
        _show(plan(spec, cache, jobs=jobs, out=out, numerics=mode), as_json)
        return
    # From here on an interrupt is an exception, so that what has finished becomes readable tables.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = run_sweep(
        spec, cache, jobs=jobs, out=out, numerics=mode, memory=_bytes("--memory", memory)
    )
    runs = open_results(folder).ledger
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
    from embrm.finetune.run import finetune as run_finetune
    from embrm.sweep.ledger import open_results

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
def replay(
    folder: SweepFolder,
    run: Annotated[str | None, typer.Option(help="Run id or CONFIGURATION@SEED.")] = None,
    sample: Annotated[int | None, typer.Option(help="So many runs, evenly spaced.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All runs.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Fail unless every bit is the same.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes [default: cores].")] = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Train runs of a sweep again, each alone, and compare bits, weights and metrics."""
    from embrm.sweep.replay import TOLERANCE
    from embrm.sweep.replay import replay as run_replay

    if (run is not None) + (sample is not None) + every != 1:
        raise UserError("replay needs one of --run ID, --sample N and --all")
    # As an exception, so that the temporary copy of the states goes too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    result = run_replay(
        folder,
        run=run,
        sample=sample,
        cache=cache,
        jobs=jobs,
        memory=_bytes("--memory", memory),
    )
    differing = [entry for entry in result.runs if not entry.same_bits]
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        if differing:
            _table([dataclasses.asdict(entry) for entry in differing])
        for name, (then, now) in result.environment.items():
            print(f"environment: {name} was {_cell(then)}, is {_cell(now)}")
        same = len(result.runs) - len(differing)
        print(f"{same} of {len(result.runs)} runs have the same bits")
    beyond = [entry for entry in differing if verify or not entry.within_tolerance]
    if beyond:
        rule = "the same bits" if verify else f"the tolerance of {TOLERANCE:g}"
        raise UserError(
            f"{len(beyond)} of {len(result.runs)} runs do not replay to {rule}: see above for "
            "what differs in the environment"
        )


@app.command()
def report(
    folder: SweepFolder,
    rank_by: Annotated[
        str | None,
        typer.Option(help="A split, or 'ood' for all ood/... [default: all]."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Configuration to compare with [default: the spec's].")
    ] = None,
    top: Annotated[int, typer.Option(help="Configurations to show.", min=1)] = 20,
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to (over)write report and figures in [the sweep's].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank a sweep's heads, with intervals over prompts and seeds; write tables and figures."""
    from embrm.report.run import report as run_report

    result = run_report(folder, rank_by=rank_by, baseline=baseline, top=top, cache=cache, out=out)
    if as_json:
        print(result.json())
        return
    _report(result.tables, ())
    for note in result.notes:
        print(_cell(note))
    _report((), result.files)


@app.command()
def bon(
    folder: SweepFolder,
    split: Annotated[
        str | None,
        typer.Option(help="One evaluated split with groups [default: all that have some]."),
    ] = None,
    n: Annotated[
        str | None,
        typer.Option(
            help="Numbers of responses to choose from, such as 1,4,16 [default: powers of two that "
            "nine in ten groups are large enough for]."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Configuration to compare with [default: the spec's].")
    ] = None,
    top: Annotated[int, typer.Option(help="Configurations to show.", min=1)] = 20,
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to (over)write bon.* and figures in [the sweep's].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the best of n responses by each head of a sweep; compare its reward with gold."""
    from embrm.report.best_of_n import best_of_n

    ns = _numbers("--n", n) if n is not None else None
    result = best_of_n(folder, split=split, ns=ns, baseline=baseline, top=top, cache=cache, out=out)
    if as_json:
        print(result.json(), end="")
        return
    _report(result.tables, ())
    for note in result.notes:
        print(_cell(note))
    _report((), result.files)


@app.command()
def scores(
    folder: SweepFolder,
    run: Annotated[
        str, typer.Argument(help="Run id, the beginning of one, or CONFIGURATION@SEED.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A .parquet, .jsonl or .csv file [default: print JSON].")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
) -> None:
    """Write every pair's rewards under one run, in reward-bench's field names."""
    import io

    from embrm.files import write_bytes
    from embrm.sweep.scores import scores as run_scores

    writers = {".parquet": "write_parquet", ".jsonl": "write_ndjson", ".csv": "write_csv"}
    if out and out.suffix not in writers:
        raise UserError(f"--out {out}: its name must end in {', '.join(writers)}")
    table = run_scores(folder, run, cache)
    content = io.BytesIO()
    getattr(table, writers[out.suffix] if out else "write_ndjson")(content)
    if out is None:
        sys.stdout.write(content.getvalue().decode())
        return
    write_bytes(out, content.getvalue())
    print(f"wrote {out}: {table.height} pairs")


@app.command()
def suite(
    name: Annotated[
        str,
        typer.Argument(
            help="reward-bench, reward-bench-2, rm-bench, judge-bench, hhh, mt-bench, ppe-human or "
            "ppe-correctness."
        ),
    ],
    scores: Annotated[
        Path, typer.Argument(help="File that embrm scores or embrm score wrote with --out.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Split of the suite [default: ood/NAME, or the only one].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a published benchmark as its own tool does, with 95 % intervals over prompts."""
    from embrm.evaluate.suites import read_scores, score_suite

    rows = score_suite(name, read_scores(scores, name, split)).to_dicts()
    print(json.dumps(rows, indent=1)) if as_json else _table(_filled(rows, "n/a"))


TableOut = Annotated[Path, typer.Option(help="Table to write, such as labels/NAME.parquet.")]


@labels_app.command("annotate")
def labels_annotate(
    spec: Annotated[Path, typer.Argument(help="Sweep spec whose training pairs are labelled.")],
    quality: Annotated[
        float, typer.Option(help="q of P(win) = sigmoid(q * gold difference / gold sd).")
    ],
    out: TableOut,
    seed: Annotated[int, typer.Option(help="Of the annotator's draws.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Cache, instead of the spec's.")] = None,
) -> None:
    """Label training pairs by an annotator that errs where gold scores are close."""
    from embrm.data.label_tables import write_table
    from embrm.sweep.annotation import annotation

    made = annotation(spec, cache, quality=quality, seed=seed)
    write_table(out, made.labels)
    print(
        f"wrote {out}: {made.labels.rows.height} pairs, {made.error:.1%} of the labels wrong "
        f"({made.expected:.1%} expected)"
    )


@labels_app.command("strength")
def labels_strength(
    folder: SweepFolder,
    configuration: Annotated[
        str, typer.Argument(help="Configuration whose seeds are the members.")
    ],
    out: TableOut,
    out_of_fold: Annotated[
        bool,
        typer.Option(
            "--out-of-fold",
            help="Judge each pair by heads that did not see its prompt: CONFIGURATION is an entry "
            "whose grid has all values of fold.",
        ),
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
) -> None:
    """Measure how strongly heads prefer the chosen response of each training pair."""
    from embrm.data.label_tables import write_table
    from embrm.sweep.strength import strengths

    write_table(out, strengths(folder, configuration, cache, out_of_fold=out_of_fold))
    labels_show(out)


@labels_app.command("remedy")
def labels_remedy(
    strengths: Annotated[Path, typer.Argument(help="Table that embrm labels strength wrote.")],
    out: TableOut,
    flip: Annotated[
        str | None, typer.Option(help="Turn labels round; of which share, such as 0:0.1.")
    ] = None,
    smooth: Annotated[str | None, typer.Option(help="Pull labels to their opposite.")] = None,
    epsilon: Annotated[float, typer.Option(help="By so much.")] = 0.1,
    soft: Annotated[str | None, typer.Option(help="Make labels sigmoid(strength).")] = None,
    margin: Annotated[
        str | None, typer.Option(help="Make strengths margins, for runs with margin_scale.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Leave pairs out.")] = None,
    keep: Annotated[str | None, typer.Option(help="Leave all others out.")] = None,
) -> None:
    """Change labels by percentile of strength: LOW:HIGH shares of the pairs, weakest first."""
    from embrm.data.label_tables import read_table, write_table
    from embrm.data.remedies import Remedy, remedied

    given = {"flip": flip, "smooth": smooth, "soft": soft, "margin": margin}
    given |= {"drop": drop, "keep": keep}
    values: dict[str, Any] = {
        name: _range(f"--{name}", text) for name, text in given.items() if text is not None
    }
    remedy = Remedy.parse({**values, "epsilon": epsilon}, "command line")
    write_table(out, remedied(remedy, read_table(strengths, "strengths")))
    labels_show(out)


def _range(option: str, text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        if colon:
            return float(low), float(high)
    except ValueError:
        pass
    raise UserError(f"{option} {text!r}: write LOW:HIGH, shares of the pairs, such as 0:0.1")


@labels_app.command("show")
def labels_show(
    path: Annotated[Path, typer.Argument(help="Table that embrm labels wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to (over)write strength.md and figures of strengths in [none]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a table was made, and what it says: of strengths, by tenths of the pairs."""
    from embrm.data.label_tables import open_table, read_table
    from embrm.sweep.strength import deciles

    table = open_table(path) if out is None else read_table(path, "strengths")
    shown: dict[str, Any] = {"kind": table.kind, "digest": table.digest, **table.provenance}
    if out is not None:
        from embrm.report.strength import strength_report

        files = strength_report(path.stem, table.rows, shown, out)
        if not as_json:
            _report((), files)
            return
    if table.kind == "labels":
        shown["counts"] = table.counts()
        _show(shown, as_json)
        return
    tenths = deciles(table.rows).to_dicts()
    if as_json:
        print(json.dumps({**shown, "deciles": tenths}, indent=1))
        return
    _lines(shown, "")
    _table([{name: "n/a" if v is None else v for name, v in row.items()} for row in tenths])


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
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
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
    from embrm.finetune.confirm import confirm as run_confirm

    result = run_confirm(folder, runs, spec, cache, rank_by=rank_by, device=device, out=out)
    if result is None:
        return  # one of several processes speaks
    if as_json:
        print(result.json())
        return
    _report(result.tables, result.files)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="Results folder of a sweep or a fine-tune, such as sweeps/NAME.")
    ],
    run: Annotated[
        str, typer.Argument(help="Run id, the beginning of one, or CONFIGURATION@SEED.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the reward model.", metavar="DIR")],
    cache: Annotated[Path | None, typer.Option(help="The cache, if it has moved.")] = None,
    model: Annotated[str | None, typer.Option(help="The cache's model, if it has moved.")] = None,
    custom: Annotated[
        bool,
        typer.Option(
            "--custom",
            help="Accept a small class of ours where no stock one fits, or half precision is too "
            "coarse for one.",
        ),
    ] = False,
    sample: Annotated[
        int, typer.Option(help="Responses whose rewards are compared with the run's.", min=1)
    ] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    push: Annotated[
        str | None, typer.Option(help="Hub repository to upload it to; made private if new.")
    ] = None,
) -> None:
    """Write a run as a reward model that transformers loads, checked to score as the run does."""
    from embrm.export.run import export as run_export

    made = run_export(
        source,
        run,
        out,
        cache=cache,
        model=model,
        custom=custom,
        push=push,
        sample=sample,
        device=device,
    )
    for how, difference in made.parity.differences.items():
        share = made.parity.reordered[how]
        print(f"{how}: rewards differ by at most {difference:.1g}, {share:.2%} of twos reordered")
    if made.parity.position_ids:
        print("padded on the left, this architecture needs position_ids: see the folder's README")
    if made.offset:
        print(f"logit = reward + {made.offset:.6g}: stock classes have no bias")
    loads = "stock transformers" if made.stock else "transformers, with trust_remote_code=True"
    print(f"wrote {out}, which loads in {loads}; next: embrm score {out} DATA")


@app.command()
def score(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of embrm export, any sequence classifier with one label (folder or hub "
            "id), or RESULTS_FOLDER:RUN."
        ),
    ],
    data: Annotated[
        list[str],
        typer.Argument(help="[SPLIT=]PATH_OR_HUB_ID of preference or group data; one or more."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A .parquet file of the pairs' rewards; groups go to NAME.members."),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="A run's cache, if it has moved.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a batch, padding included.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 [default: the folder's own]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score preference or group data with a reward model or a run."""
    from embrm.data.sources import parse_source
    from embrm.export.scoring import score as run_score
    from embrm.files import write_bytes
    from embrm.sweep.ledger import parquet

    if out and out.suffix != ".parquet":
        raise UserError(f"--out {out}: its name must end in .parquet")
    dtypes = ("float32", "bfloat16", "float16")
    if dtype is not None and dtype not in dtypes:
        raise UserError(f"--dtype {dtype!r}: {nearest(dtype, dtypes)}")
    found = run_score(
        model,
        [parse_source(entry) for entry in data],
        cache=cache,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
    )
    rows = found.splits.to_dicts()
    if as_json:
        print(json.dumps({"splits": rows, "exclusions": found.exclusions}, indent=1))
    else:
        _table(_filled(rows, "n/a"))
        for reason, count in found.exclusions.items():
            print(f"left out: {count} {reason}")
    if out is None:
        return
    tables = {out: found.pairs, out.with_suffix(".members.parquet"): found.members}
    for path, table in tables.items():
        if table.height:
            write_bytes(path, parquet(table))
            print(f"wrote {path}: {table.height} rows", file=sys.stderr if as_json else sys.stdout)


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


@bench_app.command("cache")
def bench_cache(as_json: Json = False) -> None:
    """Compare encodings of states: bytes on disk and reading time, as ratios."""
    from embrm.bench.encodings import measure_encodings

    rows = measure_encodings()
    print(json.dumps(rows, indent=1)) if as_json else _table(rows)


@bench_app.command("adopt")
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
    print(json.dumps(rows, indent=1)) if as_json else _table(rows)


@bench_app.command("sweep")
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
    _parts(measure_sweep(parts or [], folder, cache), as_json)


@bench_app.command("grm")
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
    print(json.dumps(rows, indent=1)) if as_json else _table(_filled(rows))


@bench_app.command("extract")
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a batch, padding included.")
    ] = None,
    responses: Annotated[int, typer.Option(help="About how many to read.")] = 256,
    rounds: Annotated[int, typer.Option(help="Of every way, in turns.", min=1)] = 3,
    width: Annotated[int, typer.Option(help="Of the model of random weights.", min=64)] = 512,
    layers: Annotated[int, typer.Option(help="Of that model.", min=1)] = 6,
    vocabulary: Annotated[int, typer.Option(help="Of that model.", min=1024)] = 16_384,
    folder: Annotated[Path, typer.Option(help="Where temporary files go.")] = Path(),
    as_json: Json = False,
) -> None:
    """Compare extraction with the bare model, with padded batches, and with writing nothing."""
    from embrm.bench.extraction import Size, measure_extraction

    signal.signal(signal.SIGINT, signal.default_int_handler)
    _parts(
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


@bench_app.command("finetune")
def bench_finetune(
    model: Annotated[
        str | None,
        typer.Option(help="Causal LM to fine-tune, instead of a small one of random weights."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Preference data to train on, instead of made-up pairs.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the arithmetic.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch_pairs: Annotated[int, typer.Option(help="Pairs of a step, a multiple of 4.", min=4)] = 8,
    steps: Annotated[
        int, typer.Option(help="Of the optimizer; the first is not timed.", min=2)
    ] = 4,
    rounds: Annotated[int, typer.Option(help="Of every way, in turns.", min=1)] = 2,
    width: Annotated[int, typer.Option(help="Of the model of random weights.", min=64)] = 512,
    layers: Annotated[int, typer.Option(help="Of that model.", min=1)] = 6,
    vocabulary: Annotated[int, typer.Option(help="Of that model.", min=1024)] = 16_384,
    folder: Annotated[Path, typer.Option(help="Where temporary files go.")] = Path(),
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
    print(json.dumps(rows, indent=1)) if as_json else _table(_filled(rows))


@bench_app.command("evaluate")
def bench_evaluate(as_json: Json = False) -> None:
    """Compare best of n with a bare sort, and the bootstrap with its bare products."""
    from embrm.bench.evaluation import measure_evaluation

    signal.signal(signal.SIGINT, signal.default_int_handler)
    _parts(measure_evaluation(), as_json)


def _report(tables: Iterable["Table"], files: Iterable[Path]) -> None:
    from rich.console import Console

    from embrm.report.table import terminal

    console = Console()
    for table in tables:
        console.print(terminal(table))
        console.print()
    for path in files:
        print(f"wrote {path}")


def _parts(parts: Iterable[tuple[str, list[dict[str, Any]]]], as_json: bool) -> None:
    """The parts of a benchmark: tables as they are there, or one JSON object."""
    measured = {}
    for part, rows in parts:
        measured[part] = rows
        if not as_json:
            print(f"\n{part}")
            _table(_filled(rows))
    if as_json:
        print(json.dumps(measured, indent=1))


def _show(value: dict[str, Any], as_json: bool) -> None:
    """A nested mapping as JSON, or as indented lines in the terminal."""
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        _lines(value, "")


def _lines(value: dict[str, Any], indent: str) -> None:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{name}:")
            _lines(inner, indent + "  ")
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            for number, entry in enumerate(inner, start=1):
                print(f"{indent}{name} {number}:")
                _lines(entry, indent + "  ")
        else:
            print(f"{indent}{name}: {_cell(inner)}")


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    Console().print(table)


def _filled(rows: list[dict[str, Any]], missing: str = "") -> list[dict[str, Any]]:
    """Rows of a table with `missing` where they have no value."""
    return [{name: missing if v is None else v for name, v in row.items()} for row in rows]


def _cell(value: Any) -> str:
    """One line, without control characters: names in data may hold anything."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "".join(char if char.isprintable() else "�" for char in text)
