"""Options and arguments that several commands take, and how their texts are read."""

from pathlib import Path
from typing import Annotated

import typer

from embrm.core.errors import UserError

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
MovedCache = Annotated[Path | None, typer.Option(help="The cache, if it has moved.")]
Baseline = Annotated[
    str | None, typer.Option(help="Configuration to compare with [default: the spec's].")
]
Top = Annotated[int, typer.Option(help="Configurations to show.", min=1)]
TableOut = Annotated[Path, typer.Option(help="Table to write, such as labels/NAME.parquet.")]


def byte_size(option: str, text: str | None) -> int | None:
    """A size such as 4GB, 1.5GB or 800MB; None for none."""
    if text is None:
        return None
    from embrm.core.sizes import parse_bytes

    return parse_bytes(option, text)


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0, separated by commas."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} {text!r}: write whole numbers from 1, such as 1,4,16")
    return numbers


def percentiles(option: str, text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        if colon:
            return float(low), float(high)
    except ValueError:
        pass
    raise UserError(f"{option} {text!r}: write LOW:HIGH, shares of the pairs, such as 0:0.1")
