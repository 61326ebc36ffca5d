"""Pictures of paths and populations: what is drawn, and that it becomes a PNG."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection

from evomerge.report.figures import GAP, path_figure, population_figure, write_figure
from evomerge.report.path_map import PathMap
from evomerge.report.population import Population
from evomerge.spaces.path import Hop

SCALED = PathMap(
    title="a $title$",
    hops=(
        Hop(model="x/one", layer=0, scale=1.0),
        Hop(model="x/two", layer=2, scale=0.5),
        Hop(model="x/one", layer=3, scale=1.25),
    ),
    depths={"x/one": 4, "x/two": 4},
    scale_means="factor on something",
)


def test_squares_stand_at_their_hops_and_layers_in_the_colour_of_their_scale() -> None:
    figure = path_figure(SCALED)
    axes, bar = figure.axes
    (squares,) = [item for item in axes.collections if isinstance(item, PathCollection)]
    assert np.asarray(squares.get_offsets()).tolist() == [[0, 0], [1, 4 + GAP + 2], [2, 3]]
    assert np.asarray(squares.get_array()).tolist() == [1.0, 0.5, 1.25]
    assert squares.norm(1.0) == 0.5
    assert (squares.norm.vmin, squares.norm.vmax) == (0.5, 1.5)
    (lines,) = [item for item in axes.collections if isinstance(item, LineCollection)]
    ends = [segment.tolist()[-1] for segment in lines.get_segments()]
    assert ends == [[0, 0], [1, 8], [2, 3]]
    widths = np.asarray(lines.get_linewidth()).tolist()
    assert widths[1] < widths[0] < widths[2]
    assert bar.get_ylabel() == "scale"


def test_names_layers_and_titles_are_written_as_they_are() -> None:
    axes = path_figure(SCALED).axes[0]
    assert [text.get_text() for text in axes.texts] == ["A one", "B two"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "3"] * 2
    title = axes.get_title(loc="left").split("\n")
    assert title == ["a $title$", "3 hops over 3 of 8 layers", "colour and width: factor on something"]


def test_a_path_without_scales_has_no_colour_bar() -> None:
    hops = tuple(Hop(model="m", layer=layer) for layer in range(3))
    assert len(path_figure(PathMap(title="", hops=hops, depths={"m": 3}, scale_means="")).axes) == 1


def population(counts: list[list[int]]) -> Population:
    return Population(title="c", sizes=(1,) * len(counts), depths={"m": 2}, counts={"m": np.array(counts)})


def test_a_heat_map_shows_the_shares_and_a_second_one_repetitions() -> None:
    shares = population_figure(population([[1, 0], [1, 1]]))
    assert len(shares.axes) == 2  # the map and its colour bar
    (image,) = shares.axes[0].images
    assert np.asarray(image.get_array()).tolist() == [[1, 1], [0, 1]]
    assert image.get_extent() == [-0.5, 1.5, -0.5, 1.5]
    both = population_figure(population([[1, 0], [3, 1]]))
    assert len(both.axes) == 4
    repeats = next(axes.images[0] for axes in both.axes if "passes" in axes.get_title(loc="left"))
    np.testing.assert_array_equal(np.ma.filled(repeats.get_array(), np.nan), [[1, 3], [np.nan, 1]])


@pytest.mark.parametrize("num_hops", [2, 65, 20_000])
def test_pictures_are_png_files_of_a_size_that_can_be_opened(tmp_path: Path, num_hops: int) -> None:
    hops = tuple(Hop(model="m", layer=hop % 32, scale=1 + hop % 3) for hop in range(num_hops))
    file = tmp_path / "path.png"
    file.write_bytes(b"before")
    write_figure(path_figure(PathMap(title="", hops=hops, depths={"m": 32}, scale_means="")), file)
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert 300 < width < 2**16
    assert 300 < height < 2**16
