"""Findings: problems that were noticed in adopted arrays, and what was done about each."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """A problem in one split of one source. It is printed, and recorded in the cache's manifest."""

    source: str
    split: str
    """ "" if the finding is about the whole source."""
    check: str
    """Short name of the check."""
    done: Literal["fixed", "excluded", "reported"]
    """fixed: the cache differs from the files in this respect; excluded: the rows are left out, and
    listed in the exclusions; reported: nothing was changed."""
    count: int | None
    """Number of affected rows or prompts, as `detail` says; None if all are."""
    detail: str
