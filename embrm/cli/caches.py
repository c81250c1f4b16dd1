"""embrm cache: adopt, list, show, verify, merge and probe caches."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from embrm.cli.options import CacheFolder, Json
from embrm.cli.printing import filled, print_lines, print_report, print_table, show
from embrm.core.errors import UserError

app = typer.Typer(
    help="Adopt, list, show, verify, merge and probe caches.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("adopt")
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
        typer.Option(help="[SPLIT=]PATH of a table with one row per state, for (rows, width)."),
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
    from embrm.adoption.run import adopt
    from embrm.adoption.spec import AdoptSpec, parse_arrays
    from embrm.core.specs import read_toml

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


@app.command("ls")
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
        used = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
        shown = [{name: row[name] for name in used} for row in rows]
        print_table(filled(shown), whole=("cache_id", "responses", "pairs", "bytes"))
    else:
        print(f"no caches in {root}")


@app.command("show")
def cache_show(
    folder: CacheFolder,
    everything: Annotated[
        bool, typer.Option("--all", help="Identity, environment and spec too.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a cache's splits, exclusions, leaks and size."""
    from embrm.cache.listing import describe_cache, splits

    described = describe_cache(folder)
    if as_json or everything:
        show(described, as_json)
        return
    words = ("name", "state", "cache_id", "model", "dtype", "width", "views", "responses",
             "token_rows", "top_k", "tail_mean", "bytes")  # fmt: skip
    print_lines({word: described[word] for word in words}, "")
    print_table(splits(folder))
    if described["lint"]:
        print("what adopting its arrays found:")
        columns = ("source", "split", "check", "done", "count", "detail")
        print_table(
            [
                {name: "" if row[name] is None else row[name] for name in columns}
                for row in described["lint"]
            ]
        )


@app.command("verify")
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


@app.command("merge")
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


@app.command("probe")
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
    from embrm.extraction.probe import probe

    result = probe(folder, sample=sample, device=device or "auto", engine=engine)
    if as_json:
        verdict = {"within_tolerance": result.within_tolerance}
        print(json.dumps(dataclasses.asdict(result) | verdict, indent=1))
    else:
        rows = [dataclasses.asdict(entry) for entry in result.deviations]
        print_table(filled(rows, "n/a"))
        changed = max(entry.orders_changed or 0 for entry in result.deviations)
        print(
            f"{result.responses} responses, {result.pairs} pairs, made by {result.made_by}, read "
            f"by {result.engine}: order changed in {changed}"
        )
    limit = f"the tolerance of {result.dtype}, {result.tolerance:g}"
    if not result.within_tolerance:
        raise UserError(f"{folder}: a relative error is over {limit}: see above")
    if not as_json:
        print(f"every relative error is within {limit}")


def _probe_estimators(folder: Path, sample: int, target: float, as_json: bool) -> None:
    from embrm.studies.estimators.measure import measure_estimators

    result = measure_estimators(folder, sample=sample, target=target)
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
        return
    from embrm.studies.estimators.table import estimator_tables, recommendations

    print_report(estimator_tables(result), (), recommendations(result))
