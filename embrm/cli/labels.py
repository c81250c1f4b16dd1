"""embrm labels: tables of labels for a sweep's training pairs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from embrm.cli.options import Json, MovedCache, SweepFolder, TableOut, percentiles
from embrm.cli.printing import print_lines, print_report, print_table, show

app = typer.Typer(
    help="Make tables of labels for a sweep's training pairs, and show them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("annotate")
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
    from embrm.data.label_tables import write_label_table
    from embrm.studies.annotation import annotation

    made = annotation(spec, cache, quality=quality, seed=seed)
    write_label_table(out, made.labels)
    print(
        f"wrote {out}: {made.labels.rows.height} pairs, {made.error:.1%} of the labels wrong "
        f"({made.expected:.1%} expected)"
    )


@app.command("strength")
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
    cache: MovedCache = None,
) -> None:
    """Measure how strongly heads prefer the chosen response of each training pair."""
    from embrm.data.label_tables import write_label_table
    from embrm.studies.strength.measure import strengths

    write_label_table(out, strengths(folder, configuration, cache, out_of_fold=out_of_fold))
    labels_show(out)


@app.command("remedy")
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
    from embrm.data.label_tables import read_label_table, write_label_table
    from embrm.data.remedies import Remedy, apply_remedy

    given = {"flip": flip, "smooth": smooth, "soft": soft, "margin": margin}
    given |= {"drop": drop, "keep": keep}
    values: dict[str, Any] = {
        name: percentiles(f"--{name}", text) for name, text in given.items() if text is not None
    }
    remedy = Remedy.parse({**values, "epsilon": epsilon}, "command line")
    write_label_table(out, apply_remedy(remedy, read_label_table(strengths, "strengths")))
    labels_show(out)


@app.command("show")
def labels_show(
    path: Annotated[Path, typer.Argument(help="Table that embrm labels wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to (over)write strength.md and figures of strengths in [none]."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a table was made, and what it says: of strengths, by tenths of the pairs."""
    from embrm.data.label_tables import open_label_table, read_label_table
    from embrm.studies.strength.measure import deciles

    table = open_label_table(path) if out is None else read_label_table(path, "strengths")
    shown: dict[str, Any] = {"kind": table.kind, "digest": table.digest, **table.provenance}
    if out is not None:
        from embrm.studies.strength.table import strength_report

        files = strength_report(path.stem, table.rows, shown, out)
        if not as_json:
            print_report((), files)
            return
    if table.kind == "labels":
        shown["counts"] = table.counts()
        show(shown, as_json)
        return
    tenths = deciles(table.rows).to_dicts()
    if as_json:
        print(json.dumps({**shown, "deciles": tenths}, indent=1))
        return
    print_lines(shown, "")
    print_table([{name: "n/a" if v is None else v for name, v in row.items()} for row in tenths])
