"""Sizes and durations as people write them."""

from __future__ import annotations

import re
from typing import Any


def parse_size(text: str) -> int:
    """Read a number of bytes such as `500MB`, `2GB` or `4GiB`.

    Raises:
        ValueError: The text is not a size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match is not None:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if size == 0:
        raise ValueError(f"expected a size such as 500MB or 2GB, got {text!r}")
    return size


def as_seconds(value: Any) -> Any:
    """Read `90`, `90s`, `30m` or `2h` as seconds; what is neither text nor a whole number stays as it is.

    Raises:
        ValueError: The text is not a duration.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", value.strip())
        if match is None:
            raise ValueError(f"expected a duration such as 90s, 30m or 2h, got {value!r}")
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
