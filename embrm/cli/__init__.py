"""The command line: parse, call, print. One command per stage; the stages do the work.

Stage modules are imported inside the commands, so `embrm --help` stays fast and a sweep never
loads transformers.
"""

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from embrm import __version__
from embrm.cli import benches, caches, labels, results, stages
from embrm.core.errors import UserError
from embrm.core.extras import missing_extra
from embrm.core.interrupts import stop

app = typer.Typer(
    name="embrm",
    help="Pay for the language model once, then train hundreds of reward heads on its states.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(stages.app)
app.add_typer(results.app)
app.add_typer(caches.app, name="cache")
app.add_typer(labels.app, name="labels")
app.add_typer(benches.app, name="bench")


def main() -> None:
    """Run the command line; what a user can cause ends in one line and exit code 2."""
    before = signal.signal(signal.SIGINT, stop)
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        stop()
    except SystemExit as end:
        if end.code == 130:  # typer's word for an interrupt inside a command
            stop()
        raise
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        _fail(str(missing))
    except BrokenPipeError:
        os._exit(1)  # the reader has gone; flushing would fail again
    except OSError as error:
        name = error.filename or "standard output"
        _fail(f"{name}: {error.strerror or error}: check the path, its permissions and the disk")
    finally:
        signal.signal(signal.SIGINT, before)


def _fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
