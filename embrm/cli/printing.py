"""How commands print: nested values, tables, reports, or JSON for machines."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embrm.core.table import Table


def print_report(
    tables: Iterable["Table"], files: Iterable[Path], notes: Iterable[str] = ()
) -> None:
    """Tables, then notes, then which files were written."""
    from rich.console import Console

    from embrm.core.table import terminal

    console = Console()
    for table in tables:
        console.print(terminal(table))
        console.print()
    for note in notes:
        print(cell_text(note))
    for path in files:
        print(f"wrote {path}")


def print_parts(parts: Iterable[tuple[str, list[dict[str, Any]]]], as_json: bool) -> None:
    """The parts of a benchmark: tables as they are there, or one JSON object."""
    measured = {}
    for part, rows in parts:
        measured[part] = rows
        if not as_json:
            print(f"\n{part}")
            print_table(filled(rows))
    if as_json:
        print(json.dumps(measured, indent=1))


def show(value: dict[str, Any], as_json: bool) -> None:
    """A nested mapping as JSON, or as indented lines in the terminal."""
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        print_lines(value, "")


def print_lines(value: dict[str, Any], indent: str) -> None:
    for name, inner in value.items():
        if isinstance(inner, dict) and inner:
            print(f"{indent}{name}:")
            print_lines(inner, indent + "  ")
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            for number, entry in enumerate(inner, start=1):
                print(f"{indent}{name} {number}:")
                print_lines(entry, indent + "  ")
        else:
            empty = inner is None or inner in ({}, [], "")
            print(f"{indent}{name}: {'none' if empty else cell_text(inner)}")


def print_table(rows: list[dict[str, Any]], whole: Collection[str] = ()) -> None:
    """Print rows as a table; columns named in `whole` are never broken over lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name in whole)
    for row in rows:
        table.add_row(*(Text(cell_text(value)) for value in row.values()))
    Console().print(table)


def filled(rows: list[dict[str, Any]], missing: str = "") -> list[dict[str, Any]]:
    """Rows of a table with `missing` where they have no value."""
    return [{name: missing if v is None else v for name, v in row.items()} for row in rows]


def cell_text(value: Any) -> str:
    """One line, without control characters: names in data may hold anything."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "".join(char if char.isprintable() else "�" for char in text)
