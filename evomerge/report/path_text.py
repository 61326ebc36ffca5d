"""A path as text for a terminal: a map of hops and layers, then the path in short.

A hop is a sign for the range its scale lies in, in colour on a ground that is blue for scales below 1, grey at 1
and red above. Without colour everything is plain ASCII.
"""

from __future__ import annotations

import textwrap

from rich.text import Text

from evomerge.report.layer_grid import Cell, layer_grid
from evomerge.report.path_map import PathMap, model_labels

LOW, NEUTRAL, HIGH = (0x2F, 0x6F, 0xD6), (0xC0, 0xC0, 0xC0), (0xD4, 0x3D, 0x1F)
"""Red, green and blue of the smallest scale, of 1 and of the largest."""

_ONE = "#"
_SIGNS = (
    (float("-inf"), "!", "below 0"),
    (0.0, ".", "0 to 0.5"),
    (0.5, "-", "0.5 to 0.95"),
    (0.95, _ONE, "about 1"),
    (1.05, "+", "1.05 to 1.5"),
    (1.5, "*", "1.5 and more"),
)
"""Smallest scale, its sign without colour, and the range in words."""


def path_text(path: PathMap, *, width: int, plain: bool) -> list[Text]:
    """Draw a path.

    Args:
        path: The path.
        width: Characters of a line.
        plain: Whether to do without colour and with ASCII alone.
    """
    labels = model_labels(tuple(path.depths))
    cells = {
        (hop.model, hop.layer, column): _cell(hop.scale, path.spread, plain=plain)
        for column, hop in enumerate(path.hops)
    }
    return [
        *wrapped(path.title, width),
        *wrapped(path.summary, width),
        Text(),
        *layer_grid(
            cells, labels=labels, depths=path.depths, num_columns=len(path.hops), axis="hop", width=width
        ),
        Text(),
        *_legend(path, width, plain=plain),
        *_path(path, width),
    ]


def scale_colour(scale: float, spread: float) -> str:
    """The colour of a scale as rich writes it, such as `#c0c0c0`.

    Args:
        scale: The scale.
        spread: Distance from 1 at which the colours end; 0 if nothing is scaled.
    """
    share = min(abs(scale - 1) / spread, 1.0) if spread else 0.0
    end = LOW if scale < 1 else HIGH
    mixed = (round(a + share * (b - a)) for a, b in zip(NEUTRAL, end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def wrapped(text: str, width: int) -> list[Text]:
    """Lines of at most `width` characters, those after the first set in."""
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    return [Text(line) for line in lines]


def _path(path: PathMap, width: int) -> list[Text]:
    unbroken = ", ".join(piece.replace(" ", "\N{NO-BREAK SPACE}") for piece in path.pieces)
    return [
        Text(line.plain.replace("\N{NO-BREAK SPACE}", " ")) for line in wrapped(f"path: {unbroken}", width)
    ]


def _legend(path: PathMap, width: int, *, plain: bool) -> list[Text]:
    if not path.spread:
        return [Text("scale: 1 everywhere")]
    lines = wrapped(f"scale: {path.scale_means}", width)
    entries: list[Text] = []
    for _, sign, meaning in _SIGNS:
        scales = [hop.scale for hop in path.hops if _sign(hop.scale) == sign]
        if scales:
            cell = _cell(sum(scales) / len(scales), path.spread, plain=plain)
            entries.append(Text().append(cell.symbol, style=cell.style).append(f" {meaning}"))
    together = Text("   ").join(entries)
    indent = " " * len("scale: ")
    entries = [together] if len(indent) + len(together) <= width else entries
    return [*lines, *(Text(indent).append(entry) for entry in entries)]


def _cell(scale: float, spread: float, *, plain: bool) -> Cell:
    sign = _sign(scale)
    if plain:
        return Cell(symbol=sign)
    return Cell(symbol=" " if sign == _ONE else sign, style=f"black on {scale_colour(scale, spread)}")


def _sign(scale: float) -> str:
    return next(sign for low, sign, _ in reversed(_SIGNS) if scale >= low)
