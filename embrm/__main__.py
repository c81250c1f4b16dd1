"""The program `embrm`, also as `python -m embrm`."""

import signal

from embrm.core.interrupts import stop


def main() -> None:
    """Run the command line; an interrupt is one line while that is still loading, too."""
    signal.signal(signal.SIGINT, stop)
    from embrm.cli import main as run

    run()


if __name__ == "__main__":
    main()
