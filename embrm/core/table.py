"""A table of plain text, shown on a terminal or as Markdown."""

import re
from dataclasses import dataclass
from typing import Literal

from rich.align import Align
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table as TerminalTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """Plain text cells; the renderers escape them. The first `left` columns are left-aligned.

    note: lines below the table. wide: columns that Markdown shows and the terminal has no room for.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1
    wide: tuple[str, ...] = ()


def terminal(table: Table) -> Group:
    """For `rich.print`; nothing in a cell is read as markup or as a terminal escape."""
    view = TerminalTable(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    kept = [index for index, column in enumerate(table.columns) if column not in table.wide]
    for index in kept:
        header = Text("\n".join(_lines(printable(table.columns[index]), "/_. -", 9)))
        side: Literal["left", "right"] = "left" if index < table.left else "right"
        view.add_column(
            Align(header, side, vertical="bottom"),
            justify=side,
            vertical="top",
            overflow="fold",
        )
    for row in table.rows:
        view.add_row(
            *(
                _Name(printable(row[index])) if index < table.left else Text(printable(row[index]))
                for index in kept
            )
        )
    note = [Text(printable(line), style="dim") for line in table.note.splitlines()]
    return Group(Text(printable(table.title), style="bold underline"), view, *note)


@dataclass(frozen=True)
class _Name:
    """A cell for rich: a name such as bsr[state=mean,bsr=0.01], broken after "[" and ","."""

    name: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(_lines(self.name, "[, ", options.max_width)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max(map(cell_len, _lines(self.name, "[, ", 1)))
        return Measurement(longest, cell_len(self.name)).with_maximum(options.max_width)


def markdown(table: Table) -> str:
    """A pipe table under a heading, every cell escaped."""
    rule = [":--" if index < table.left else "--:" for index in range(len(table.columns))]
    lines = [
        f"## {escape(table.title)}",
        "",
        *(
            "| " + " | ".join(cells) + " |"
            for cells in (
                [escape(column) for column in table.columns],
                rule,
                *([escape(cell) for cell in row] for row in table.rows),
            )
        ),
        *(part for line in table.note.splitlines() for part in ("", escape(line))),
    ]
    return "\n".join(lines) + "\n"


def printable(text: str) -> str:
    """`text` on one line, control characters (terminal escapes, newlines) replaced."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def escape(text: str) -> str:
    """`text` as Markdown that shows exactly it, also inside a pipe table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", printable(text))


def _lines(name: str, after: str, width: int) -> list[str]:
    """A long name on lines of at most `width` terminal cells where breaks `after` these allow."""
    kind = re.escape(after)
    lines = [""]
    for piece in re.findall(f"[^{kind}]+[{kind}]?|[{kind}]", name):
        if lines[-1] and cell_len(lines[-1]) + cell_len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
