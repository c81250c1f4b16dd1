"""Progress of long work: a bar with an ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_UNTIL_A_LINE = 1.0
"""Work that takes no longer needs no report."""


class Progress:
    """A count of finished units, reported as it advances. Create it with `progress`."""

    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._done = self._start_done = done
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[note]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as finished."""
        self._done += amount
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-9)
        speed = (self._done - self._start_done) / elapsed
        note = f"{speed:,.0f} {self._unit}/s" if speed >= 10 else f"{speed:.2f} {self._unit}/s"
        if self._bar:
            self._bar.update(self._task, completed=self._done, note=note)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or (
            self._done >= self._total and elapsed >= _SECONDS_UNTIL_A_LINE
        ):
            self._last_line = now
            left = (self._total - self._done) / speed if speed else 0.0
            print(
                f"{self._title}: {self._done:,.0f} of {self._total:,.0f} {self._unit}, {note}, "
                f"ETA {_clock(left)}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar:
            self._bar.stop()


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Report work of `total` units, `done` of them finished before (a resumed command)."""
    bar = Progress(title, total, unit, done)
    try:
        yield bar
    finally:
        bar.close()


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
