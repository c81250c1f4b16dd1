"""Text from data and from other libraries, as it is shown in errors."""

from collections.abc import Sequence


def quoted(value: object) -> str:
    """`value` as text from data is shown in errors and exclusions: its repr, at most 60 long."""
    text = repr(value if not isinstance(value, str) else value[:80])
    return text if len(text) <= 60 else text[:59] + "…"


def listed(names: Sequence[str]) -> str:
    """Column names for an error, at most 20 of them."""
    shown = [quoted(name) for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def first_line(error: Exception) -> str:
    """The first line of another library's message, cut short."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]
