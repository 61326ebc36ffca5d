"""A grid of text: layers of several models upwards, columns to the right; cut into bands that fit the width.

    B math
      5-31
         4     ##
       0-3
    A base
         1  #
         0 #
      hop  0         10

Layers that a band does not use are one row together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.text import Text

TICK = 10
"""Columns between two numbers of the axis."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands where a layer meets a column: one character and rich's name of its style."""

    symbol: str
    style: str = ""


def layer_grid(
    cells: Mapping[tuple[str, int, int], Cell],
    *,
    labels: Mapping[str, str],
    depths: Mapping[str, int],
    num_columns: int,
    axis: str,
    width: int,
) -> list[Text]:
    """Draw a grid.

    Args:
        cells: (model, layer, column) -> cell; other places stay empty.
        labels: Model -> its heading.
        depths: Model -> number of its layers, from the lowest model to the highest.
        num_columns: Number of columns.
        axis: What the columns are.
        width: Characters of a line.

    Returns:
        The lines; bands are set apart by an empty one.
    """
    widest = max(len(f"{max(depth - 2, 0)}-{depth - 1}") for depth in depths.values())
    margin = max(widest, len(axis)) + 2
    per_band = max(width - margin - 1, TICK)
    lines: list[Text] = []
    for start in range(0, num_columns, per_band):
        columns = range(start, min(start + per_band, num_columns))
        if lines:
            lines.append(Text())
        lines += _band(cells, labels, depths, columns, margin)
        lines.append(Text(f"{axis:>{margin}} {_ticks(columns)}"))
    return lines


def _band(
    cells: Mapping[tuple[str, int, int], Cell],
    labels: Mapping[str, str],
    depths: Mapping[str, int],
    columns: range,
    margin: int,
) -> Iterator[Text]:
    shown = set(columns)
    used = {(model, layer) for model, layer, column in cells if column in shown}
    for model in reversed(list(depths)):
        yield Text(labels[model], style="bold")
        for first, last in reversed(_rows(depths[model], {layer for name, layer in used if name == model})):
            line = Text(f"{first if first == last else f'{first}-{last}':>{margin}}")
            for column in columns:
                cell = cells.get((model, first, column)) if first == last else None
                if cell is not None:
                    place = margin + 1 + column - columns[0]
                    line.append(" " * (place - len(line))).append(cell.symbol, style=cell.style)
            yield line


def _rows(depth: int, used: set[int]) -> list[tuple[int, int]]:
    """(first, last) layer of every row: each used layer by itself, others together."""
    rows: list[tuple[int, int]] = []
    for layer in range(depth):
        if rows and layer not in used and rows[-1][1] not in used:
            rows[-1] = (rows[-1][0], layer)
        else:
            rows.append((layer, layer))
    return rows


def _ticks(columns: range) -> str:
    text = ""
    for column in columns:
        if column % TICK == 0 or column == columns[0]:
            place = column - columns[0]
            # The first of a band may stand too close to the next.
            if place >= len(text) + bool(text):
                text += " " * (place - len(text)) + str(column)
    return text
