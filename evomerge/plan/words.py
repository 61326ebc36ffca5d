"""Sizes, counts and durations as people read them."""

from __future__ import annotations

from evomerge.plan.records import Span

_UNITS = ((60.0, "s"), (60.0, "min"), (48.0, "h"), (float("inf"), "days"))


def size(nbytes: float) -> str:
    """Such as `260 MB` or `14.5 GB`."""
    return f"{_short(nbytes, ('B', 'kB', 'MB', 'GB', 'TB'))}"


def count(number: float) -> str:
    """Such as `580`, `33.6 k` or `7.24 B`; B for thousands of millions."""
    return _short(number, ("", "k", "M", "B", "T")).rstrip()


def flops(per_second: float) -> str:
    """Such as `70.6 GFLOP/s`."""
    return _short(per_second, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"))


def _short(number: float, units: tuple[str, ...]) -> str:
    place = 0
    while number >= 999.5 and place < len(units) - 1:
        number /= 1000
        place += 1
    digits = f"{number:.0f}" if place == 0 else f"{number:.3g}"
    return f"{digits} {units[place]}"


def duration(seconds: float) -> str:
    """Such as `0.4 s`, `20 s`, `12 min`, `3.5 h` or `4 days`; rough, as what it tells."""
    value, unit = _scaled(seconds)
    return f"{value} {unit}"


def durations(span: Span) -> str:
    """Such as `20 to 45 s`, `20 s to 3 min`, or one of them where both are the same."""
    (low, unit), (high, other) = _scaled(span.low), _scaled(span.high)
    if (low, unit) == (high, other):
        return f"{low} {unit}"
    return f"{low} to {high} {unit}" if unit == other else f"{low} {unit} to {high} {other}"


def _scaled(seconds: float) -> tuple[str, str]:
    value = seconds
    for limit, unit in _UNITS:
        if value < limit * 1.5 or unit == "days":
            break
        value /= limit if unit != "h" else 24
    return (f"{value:.0f}" if value >= 10 else f"{value:.2g}"), unit
