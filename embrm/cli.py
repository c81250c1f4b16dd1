"""The command line: parse, call, print. One command per stage; the stages do the work.

Stage modules are imported inside the commands, so `embrm --help` stays fast and a sweep never
loads transformers.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from embrm import __version__
from embrm.errors import UserError

app = typer.Typer(
    name="embrm",
    help="Pay for the language model once, then train hundreds of reward heads on its states.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(
    help="List, show, verify and probe caches.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(cache_app, name="cache")
bench_app = typer.Typer(
    help="Measure ratios on this machine.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
CacheFolder = Annotated[Path, typer.Argument(help="Cache folder, such as cache/NAME.")]
SweepFolder = Annotated[Path, typer.Argument(help="Results folder, such as sweeps/NAME.")]


def main() -> None:
    """Run the command line; what a user can cause ends in one line and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        print(
            "interrupted: finished work is kept; run the same command again to go on",
            file=sys.stderr,
        )
        sys.exit(130)


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
        typer.Option(help="[SPLIT=]PATH_OR_HUB_ID of preference data; repeat for more."),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="auto, chat or plain [default: auto].")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens a row [2048].")] = None,
    truncation: Annotated[
        str | None,
        typer.Option(help="Over-long rows: drop, or cut the prompt's left [default: drop]."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 [default: float32].")
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(help="Comma-separated: last, mean, prenorm, layer:K [default: last]."),
    ] = None,
    token_rows: Annotated[
        int | None, typer.Option(help="Sampled response positions a row [default: 0].")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Logits kept a token row [32].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the position sampling [0].")] = None,
    limit: Annotated[
        int | None, typer.Option(help="First N pairs (prompts, for groups) of every split.")
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(help="Token budget of a batch, padding included.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, tokens, bytes and time; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Cache a language model's final states and LM statistics over preference data."""
    from embrm.data.sources import parse_source
    from embrm.extract.run import ExtractSpec, plan
    from embrm.extract.run import extract as run_extract
    from embrm.specs import read_toml

    values: dict[str, Any] = read_toml(spec) if spec else {}
    folder = out or (Path(values["out"]) if "out" in values else None)
    values.pop("out", None)
    given = {
        "model": model,
        "revision": revision,
        "data": [parse_source(entry) for entry in data] if data else None,
        "template": template,
        "max_length": max_length,
        "truncation": truncation,
        "dtype": dtype,
        "states": [view.strip() for view in states.split(",")] if states else None,
        "token_rows": token_rows,
        "top_k": top_k,
        "seed": seed,
        "limit": limit,
        "pad_token": pad_token,
        "allow_pad_eos": allow_pad_eos,
        "trust_remote_code": trust_remote_code,
    }
    values |= {name: value for name, value in given.items() if value is not None}
    parsed = ExtractSpec.parse(values, str(spec) if spec else "command line")
    if dry_run:
        _show(plan(parsed, device=device, batch_tokens=batch_tokens), as_json)
        return
    if folder is None:
        raise UserError("--out is missing: name the cache folder to write, such as cache/NAME")
    run_extract(parsed, folder, device=device, batch_tokens=batch_tokens)
    cache_show(folder, as_json=as_json)


@cache_app.command("ls")
def cache_ls(
    root: Annotated[Path, typer.Argument(help="Folder that holds caches.")] = Path("cache"),
    as_json: Json = False,
) -> None:
    """List the caches below a folder."""


@cache_app.command("show")
def cache_show(folder: CacheFolder, as_json: Json = False) -> None:
    """Show a cache's identity, splits, exclusions, leaks and size."""


@cache_app.command("verify")
def cache_verify(folder: CacheFolder) -> None:
    """Check every byte of a cache against its manifest."""


@cache_app.command("probe")
def cache_probe(
    folder: CacheFolder,
    sample: Annotated[int, typer.Option(help="Responses to extract again.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Json = False,
) -> None:
    """Extract a sample again at other batch sizes; report errors and changed pair orders."""


@app.command()
def sweep() -> None:
    """Train the reward heads of a sweep on a cache."""


@app.command()
def report() -> None:
    """Rank a sweep's heads, with intervals over prompts and seeds."""


@app.command()
def scores() -> None:
    """Write every pair's rewards under one run, in reward-bench's field names."""


@app.command()
def demo() -> None:
    """Run the whole lab offline on a synthetic preference world with known gold reward."""


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
