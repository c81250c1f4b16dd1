"""The one error a user ever sees: a line that names field, value, rule and remedy."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Anything a user can cause. The command line prints it as one line and exits with code 2."""


def nearest(name: object, valid: Iterable[str]) -> str:
    """The remedy clause for a wrong name: the nearest valid one, or all of them."""
    options = sorted(valid)
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(options)}"
