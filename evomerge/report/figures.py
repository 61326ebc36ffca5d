"""Pictures: a path, and a population of paths; the only importer of matplotlib.

Layers go upwards, model A at the bottom, hops or generations to the right, as in the text that the terminal
shows. Figures are drawn without pyplot, so that nothing is kept and no display is looked for.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evomerge.checkpoints.durable import write_atomic
from evomerge.report.path_map import PathMap, model_labels
from evomerge.report.path_text import HIGH, LOW, NEUTRAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from evomerge.report.population import Population

DPI = 150
_LARGEST = 100.0  # inches; pictures end at 2**16 dots
GAP = 2
"""Rows between two models, where the upper one's name stands."""

_TINTS = ("#e9eff7", "#faf0e0", "#e9f5e9", "#f4eaf5")
_SCALE_COLOURS = LinearSegmentedColormap.from_list(
    "scale", [tuple(part / 255 for part in colour) for colour in (LOW, NEUTRAL, HIGH)]
)


def path_figure(path: PathMap) -> Figure:
    """A path as a picture: a square per hop, joined in their order, with the scale as colour and width."""
    offsets = _offsets(path.depths)
    rows = np.array([offsets[hop.model] + hop.layer for hop in path.hops], dtype=float)
    columns = np.arange(len(rows), dtype=float)
    scales = np.array([hop.scale for hop in path.hops])
    figure = _figure(width=2.6 + 0.15 * len(rows), height=1.7 + 0.11 * _num_rows(path.depths))
    axes = figure.add_subplot()
    _draw_models(axes, path.depths, offsets, tints=_TINTS)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("hop")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    titles = [path.title, path.summary]
    if path.spread:
        titles.append(f"colour and width: {path.scale_means}")
    axes.set_title("\n".join(titles), fontsize=9, loc="left", parse_math=False)
    spread = path.spread or 1.0
    norm = Normalize(1 - spread, 1 + spread)
    # What a hop's scale acts on comes from the hop before it, or for the first one from the embedding.
    before = np.concatenate([rows[:1], rows[:-1]])
    starts = np.stack([np.maximum(columns - 1, -0.7), before], axis=1)
    lines = LineCollection(
        list(np.stack([starts, np.stack([columns, rows], axis=1)], axis=1)),
        cmap=_SCALE_COLOURS,
        norm=norm,
        linewidths=0.5 + 2 * np.minimum(np.abs(scales), 2),
        # Leaps would hide what they cross.
        alpha=np.where(np.abs(rows - before) <= 1, 1.0, 0.4),
    )
    lines.set_array(scales)
    axes.add_collection(lines)
    squares = axes.scatter(
        columns,
        rows,
        c=scales,
        cmap=_SCALE_COLOURS,
        norm=norm,
        marker="s",
        s=44,
        edgecolors="#333333",
        linewidths=0.6,
        zorder=3,
    )
    if path.spread:
        figure.colorbar(squares, ax=axes, fraction=0.03, pad=0.02, aspect=30, label="scale")
    return figure


def population_figure(population: Population) -> Figure:
    """A population as heat maps: the share of candidates that keep a layer, and how often they repeat it."""
    offsets = _offsets(population.depths)
    repeats = population.repeats
    most = max(float(values.max()) for values in repeats.values())
    maps = [("share of the candidates that keep a layer", population.shares, Normalize(0, 1))]
    if most > 1:
        seen = {model: np.where(values > 0, values, np.nan) for model, values in repeats.items()}
        maps.append(("passes of a layer by paths that keep it (white: none does)", seen, Normalize(1, most)))
    generations = len(population.sizes)
    figure = _figure(
        width=len(maps) * max(4.5, 2.2 + 0.07 * generations),
        height=1.5 + 0.11 * _num_rows(population.depths),
    )
    figure.suptitle(population.title, fontsize=10, x=0.01, ha="left", parse_math=False)
    for position, (title, values, norm) in enumerate(maps, 1):
        axes = figure.add_subplot(1, len(maps), position)
        _draw_models(axes, population.depths, offsets, tints=("white",))
        drawn = ScalarMappable(norm=norm, cmap="YlGnBu")
        for model, array in values.items():
            low = offsets[model] - 0.5
            axes.imshow(
                array,
                origin="lower",
                aspect="auto",
                interpolation="nearest",
                cmap=drawn.get_cmap(),
                norm=norm,
                extent=(-0.5, generations - 0.5, low, low + array.shape[0]),
                zorder=2,
            )
        axes.set_xlim(-0.5, generations - 0.5)
        axes.set_ylim(-1, _num_rows(population.depths) - 0.5)
        axes.set_xlabel("generation")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(title, fontsize=9, loc="left")
        figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    return figure


def write_figure(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG file, whole or not at all; an existing file is replaced.

    Raises:
        OSError: The file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    write_atomic(file, picture.getvalue())


def _figure(*, width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    sides = min(max(width, 6.0), _LARGEST), min(max(height, 3.0), _LARGEST)
    return Figure(figsize=sides, layout="constrained")


def _offsets(depths: Mapping[str, int]) -> dict[str, int]:
    """Model -> row of its first layer."""
    offsets: dict[str, int] = {}
    row = 0
    for model, depth in depths.items():
        offsets[model] = row
        row += depth + GAP
    return offsets


def _num_rows(depths: Mapping[str, int]) -> int:
    return sum(depths.values()) + GAP * len(depths)


def _draw_models(
    axes: Axes, depths: Mapping[str, int], offsets: Mapping[str, int], *, tints: Sequence[str]
) -> None:
    """Draw the models' bands, names and layer numbers."""
    labels = model_labels(tuple(depths))
    ticks: list[tuple[int, int]] = []
    for index, (model, depth) in enumerate(depths.items()):
        low = offsets[model]
        axes.axhspan(low - 0.5, low + depth - 0.5, color=tints[index % len(tints)], linewidth=0, zorder=0)
        axes.annotate(
            labels[model],
            (0, low + depth - 0.5),
            xycoords=("axes fraction", "data"),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=8,
            fontweight="bold",
            parse_math=False,
        )
        step = 4 if depth > 12 else 1
        ticks += [(low + layer, layer) for layer in range(0, depth, step)]
    axes.set_yticks([row for row, _ in ticks], [str(layer) for _, layer in ticks], fontsize=7)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", color="white", linewidth=0.8, zorder=1)
    axes.set_ylim(-1, _num_rows(depths) - 0.5)
    axes.set_ylabel("layer")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
