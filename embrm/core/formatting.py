"""Numbers as the cells of a table."""

from collections.abc import Mapping

MISSING = "n/a"


def value_text(value: float | None, metric: str, sign: str = "") -> str:
    """Accuracy in percent, anything else as it is."""
    if value is None:
        return MISSING
    return f"{100 * value:{sign}.1f}" if metric == "accuracy" else f"{value:{sign}.3f}"


def range_text(low: float | None, high: float | None, metric: str, sign: str = "") -> str:
    """An interval in square brackets, or nothing."""
    return (
        ""
        if low is None
        else f"[{value_text(low, metric, sign)}, {value_text(high, metric, sign)}]"
    )


def with_range_text(row: Mapping[str, float | None], name: str, sign: str = "") -> str:
    """A value and its interval, `name`_low to `name`_high."""
    interval = range_text(row[f"{name}_low"], row[f"{name}_high"], "", sign)
    return f"{value_text(row[name], '', sign)} {interval}".rstrip()


def difference_text(row: dict[str, float | None], metric: str) -> str:
    """A difference, its interval, and a triangle where that excludes 0."""
    value = value_text(row["difference"], metric, "+")
    interval = range_text(row["difference_low"], row["difference_high"], metric, "+")
    return " ".join(part for part in (value, interval, mark_text(row)) if part)


def short_text(row: dict[str, float | None], metric: str, sign: str = "") -> str:
    """An estimate, plus or minus half the width of its interval."""
    return value_text(row["estimate"], metric, sign) + _half(row["low"], row["high"], metric)


def short_difference_text(row: dict[str, float | None], metric: str) -> str:
    """As `difference_text`, plus or minus half the width."""
    half = _half(row["difference_low"], row["difference_high"], metric)
    return value_text(row["difference"], metric, "+") + half + mark_text(row)


def _half(low: float | None, high: float | None, metric: str) -> str:
    return "" if low is None or high is None else f"±{value_text((high - low) / 2, metric)}"


def mark_text(row: dict[str, float | None]) -> str:
    """A triangle where the interval of a difference excludes 0."""
    low, high = row["difference_low"], row["difference_high"]
    if low is None or high is None:
        return ""
    return "▲" if low > 0 else "▼" if high < 0 else ""


def p_text(value: float | None) -> str:
    """A p value."""
    if value is None:
        return ""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def number_text(value: float | None) -> str:
    """Three decimals; three digits of what is large."""
    return MISSING if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def small_text(value: float | None) -> str:
    """Two digits, whatever the size."""
    return MISSING if value is None else f"{value:.2g}"
