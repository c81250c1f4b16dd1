"""Evenly spaced samples of rows."""

import numpy as np
import numpy.typing as npt


def evenly_spaced(count: int, size: int, *, nearest: bool = False) -> npt.NDArray[np.int64]:
    """Indices of at most `size` of `count` rows, evenly spaced from the first to the last.

    Returns int64 [min(count, size)], ascending and distinct. A position between two rows is
    rounded down, or with `nearest` to the nearest row; stored results depend on either rule.
    """
    positions = np.linspace(0, count - 1, min(count, size))
    return (positions.round() if nearest else positions).astype(np.int64)
