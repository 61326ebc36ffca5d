"""Sizes as people write them."""

from __future__ import annotations

import re


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
