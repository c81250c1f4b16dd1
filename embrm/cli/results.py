"""What is done with a finished sweep or fine-tune: reports, scores, suites, exports."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from embrm.cli.options import (
    Baseline,
    Json,
    Memory,
    MovedCache,
    SweepFolder,
    Top,
    byte_size,
    whole_numbers,
)
from embrm.cli.printing import cell_text, filled, print_report, print_table
from embrm.core.errors import UserError

app = typer.Typer()


@app.command()
def replay(
    folder: SweepFolder,
    run: Annotated[str | None, typer.Option(help="Run id or CONFIGURATION@SEED.")] = None,
    sample: Annotated[int | None, typer.Option(help="So many runs, evenly spaced.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All runs.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Fail unless every bit is the same.")
    ] = False,
    cache: MovedCache = None,
    jobs: Annotated[int | None, typer.Option(help="Worker processes [default: cores].")] = None,
    memory: Memory = None,
    as_json: Json = False,
) -> None:
    """Train runs of a sweep again, each alone, and compare bits, weights and metrics."""
    from embrm.results.replay import TOLERANCE
    from embrm.results.replay import replay as run_replay

    if (run is not None) + (sample is not None) + every != 1:
        raise UserError("replay needs one of --run ID, --sample N and --all")
    result = run_replay(
        folder,
        run=run,
        sample=sample,
        cache=cache,
        jobs=jobs,
        memory=byte_size("--memory", memory),
    )
    differing = [entry for entry in result.runs if not entry.same_bits]
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        if differing:
            print_table([dataclasses.asdict(entry) for entry in differing])
        for name, (then, now) in result.environment.items():
            print(f"environment: {name} was {cell_text(then)}, is {cell_text(now)}")
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
    baseline: Baseline = None,
    top: Top = 20,
    cache: MovedCache = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to (over)write report and figures in [the sweep's].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rank a sweep's heads, with intervals over prompts and seeds; write tables and figures."""
    from embrm.reports.run import report as run_report

    result = run_report(folder, rank_by=rank_by, baseline=baseline, top=top, cache=cache, out=out)
    if as_json:
        print(result.json())
        return
    print_report(result.tables, result.files, result.notes)


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
    baseline: Baseline = None,
    top: Top = 20,
    cache: MovedCache = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to (over)write bon.* and figures in [the sweep's].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the best of n responses by each head of a sweep; compare its reward with gold."""
    from embrm.studies.best_of_n.table import best_of_n

    ns = whole_numbers("--n", n) if n is not None else None
    result = best_of_n(folder, split=split, ns=ns, baseline=baseline, top=top, cache=cache, out=out)
    if as_json:
        print(result.json(), end="")
        return
    print_report(result.tables, result.files, result.notes)


@app.command()
def scores(
    folder: SweepFolder,
    run: Annotated[
        str, typer.Argument(help="Run id, the beginning of one, or CONFIGURATION@SEED.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="A .parquet, .jsonl or .csv file [default: print JSON].")
    ] = None,
    cache: MovedCache = None,
) -> None:
    """Write every pair's rewards under one run, in reward-bench's field names."""
    from embrm.results.rewards import scores as run_scores
    from embrm.results.table_files import check_table_name, write_table

    if out:
        check_table_name(out)
    table = run_scores(folder, run, cache)
    if out is None:
        sys.stdout.write(table.write_ndjson())
        return
    write_table(out, table)
    print(f"wrote {out}: {table.height} pairs")


@app.command()
def suite(
    name: Annotated[
        str,
        typer.Argument(
            help="reward-bench, reward-bench-2, rm-bench, judge-bench, hhh, mt-bench, ppe-human, "
            "ppe-correctness or ppe-best-of-k."
        ),
    ],
    scores: Annotated[
        Path,
        typer.Argument(
            help="File that embrm scores or embrm score wrote with --out; of ppe-best-of-k its "
            "NAME.members.parquet."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Split of the suite [default: ood/NAME, or the only one].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a published benchmark as its own tool does, with 95 % intervals over prompts.

    Items that the file holds only in part, and rows that it repeats, are left out and counted.
    """
    from embrm.suites.scoring import check_items, read_scores, score_suite

    table = read_scores(scores, name, split)
    found = score_suite(name, table)
    if as_json:
        print(json.dumps(found.to_dicts(), indent=1))
    else:
        print_table(filled(found.drop("incomplete", "repeated").to_dicts(), "n/a"))
    for note in check_items(name, table).notes:
        print(f"{name}: {note}", file=sys.stderr)


@app.command()
def suites(
    folder: SweepFolder,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="SPLIT=SUITE: an evaluated split that is not called after its suite; repeatable."
        ),
    ] = None,
    baseline: Baseline = None,
    top: Top = 20,
    cache: MovedCache = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to (over)write suites.* in [the sweep's].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score all runs of a sweep on its published benchmarks, in one table."""
    from embrm.studies.benchmarks.table import suites as run_suites

    named = {}
    for text in suite or ():
        split, equals, name = text.rpartition("=")
        if not (split and equals and name):
            raise UserError(f"--suite {text!r}: write SPLIT=SUITE, such as ood/hhh-2=hhh")
        named[split] = name
    result = run_suites(folder, named=named, baseline=baseline, top=top, cache=cache, out=out)
    if as_json:
        print(result.json(), end="")
        return
    print_report(result.tables, result.files, result.notes)


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="Results folder of a sweep or a fine-tune, such as sweeps/NAME.")
    ],
    run: Annotated[
        str, typer.Argument(help="Run id, the beginning of one, or CONFIGURATION@SEED.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the reward model.", metavar="DIR")],
    cache: MovedCache = None,
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
    from embrm.exports.run import export as run_export

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
        print(
            f"{how}: rewards differ by at most {difference:.1g}, "
            f"{share:.2%} of pairs of responses reordered"
        )
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
        typer.Option(
            help="A .parquet, .jsonl or .csv file of the pairs' rewards; the members of groups go "
            "to NAME.members beside it."
        ),
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
    from embrm.exports.scoring import score as run_score
    from embrm.results.table_files import check_table_name, write_table

    if out:
        check_table_name(out)
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
        print_table(filled(rows, "n/a"))
        for reason, count in found.exclusions.items():
            print(f"left out: {count} {reason}")
    if out is None:
        return
    tables = {out: found.pairs, out.with_suffix(f".members{out.suffix}"): found.members}
    for path, table in tables.items():
        if table.height:
            write_table(path, table)
            print(f"wrote {path}: {table.height} rows", file=sys.stderr if as_json else sys.stdout)
