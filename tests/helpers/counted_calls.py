"""Work measured without a clock: how many functions are called, the same on a busy machine."""

import sys
from collections.abc import Callable


def calls_of(work: Callable[[], object]) -> int:
    """The number of calls, of functions of Python and of C, while `work` runs in this thread."""
    count = 0

    def seen(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count
