"""Hand-written model outputs with the judgement they deserve; the fields are explained in the first table."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

TABLES = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.glob("answers_*.yml"))
}
ROWS = [
    (f"{name}:{number}", row) for name, rows in TABLES.items() for number, row in enumerate(rows, start=1)
]


def number_of(row: dict[str, Any]) -> Fraction | None:
    """The number that must be read from the row's text."""
    return None if row["number"] is None else Fraction(str(row["number"]))
