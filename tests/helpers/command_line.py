"""The command line run in this process, and what a refusal looks like."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


def refused(outcome: Outcome, *parts: str) -> None:
    """The outcome is one error line that holds all `parts`."""
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2, outcome
    assert len(errors) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in errors[0], errors[0]
