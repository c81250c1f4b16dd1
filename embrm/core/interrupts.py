"""What Ctrl-C does, from the first moment on: it loads nothing."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def stop(*_: object) -> NoReturn:
    """End now, wherever the process is: a handler of SIGINT.

    Every write survives a kill, and an exception would come out of whatever is being imported.
    """
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar has hidden it
    line = f"{cursor}interrupted: finished work is kept; run the same command again to go on\n"
    os.write(2, line.encode())
    os._exit(130)


@contextmanager
def raised_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the block, where `stop` is what handles it.

    For work that has something to put in order first. Whatever it needs is imported before the
    block, because an exception in the middle of an import can leave a library broken.
    """
    if signal.getsignal(signal.SIGINT) is not stop:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, stop)
