"""Findings: what is odd about adopted arrays, and what was done about it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One oddity of one source's split, as it is printed and recorded."""

    source: str
    split: str
    """ "" where it is about all of them."""
    check: str
    """What was looked for, in a word or two."""
    done: Literal["fixed", "excluded", "reported"]
    """fixed: the cache differs from the files in it; excluded: the rows are left out and listed;
    reported: nothing was changed."""
    count: int | None
    """Of the rows or prompts that the detail speaks of; None where it is about all of them."""
    detail: str
