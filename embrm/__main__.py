"""The program `embrm`, also as `python -m embrm`."""

import signal

from embrm.core.interrupts import stop
from embrm.core.threads import set_thread_defaults


def main() -> None:
    """Run the command line. An interrupt ends it with one line, even while it is loading."""
    signal.signal(signal.SIGINT, stop)
    set_thread_defaults()
    from embrm.cli import main as run

    run()


if __name__ == "__main__":
    main()
