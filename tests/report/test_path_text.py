"""A path as text, with and without colour."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomerge.report.path_map import SCALE_MEANS, PathMap
from evomerge.report.path_text import path_text, scale_colour
from evomerge.spaces.path import Hop


def path(*hops: tuple[str, int, float], **depths: int) -> PathMap:
    places = tuple(Hop(model=model, layer=layer, scale=scale) for model, layer, scale in hops)
    return PathMap(title="a title", hops=places, depths=depths, scale_means="factor on something")


MAP = """\
a title
4 hops over 4 of 12 layers

B two
  2-3
    1  *
    0
A one
    7    #
  4-6
    3   .
  1-2
    0 +
  hop 0

scale: factor on something
       . 0 to 0.5   # about 1   + 1.05 to 1.5   * 1.5 and more
path: A 0 x1.25, B 1 x2, A 3 x0, A 7"""


def test_without_colour_a_map_of_signs_is_drawn() -> None:
    found = path(("one", 0, 1.25), ("two", 1, 2.0), ("one", 3, 0.0), ("one", 7, 1.0), one=8, two=4)
    lines = [line.plain.rstrip() for line in path_text(found, width=80, plain=True)]
    assert "\n".join(lines) == MAP
    assert all(not line.spans for line in path_text(found, width=80, plain=True) if " x" in line.plain)


def test_the_documentation_shows_what_is_drawn() -> None:
    places = ["m0", "m1", "m2", "m3", "j2", "j3", "m4", "m5", "j6", "m5", "m6", "m7"]
    scales = {"m2": 0.85, "j2": 1.2, "j3": 1.6, "j6": 0.7}
    models = {"m": "zoo/math", "j": "zoo/japanese"}
    found = PathMap(
        title="trial 41 of runs/my-run, fitness 0.7312 on the search documents",
        hops=tuple(
            Hop(model=models[place[0]], layer=int(place[1]), scale=scales.get(place, 1.0)) for place in places
        ),
        depths={"zoo/math": 8, "zoo/japanese": 8},
        scale_means=SCALE_MEANS["branch"],
    )
    drawn = "\n".join(line.plain for line in path_text(found, width=80, plain=True))
    page = Path(__file__).parents[2] / "docs" / "paths.md"
    assert f"```\n{drawn}\n```" in page.read_text(encoding="utf-8")


def test_a_path_without_scales_has_no_legend() -> None:
    lines = [line.plain for line in path_text(path(("a", 0, 1.0), a=1), width=80, plain=True)]
    assert lines[-2:] == ["scale: 1 everywhere", "path: A 0"]


def test_in_colour_the_ground_is_the_scale() -> None:
    found = path(("a", 0, 0.5), ("a", 1, 1.0), ("a", 2, 1.25), a=3)
    lines = path_text(found, width=80, plain=False)
    rows = {line.plain.split()[0]: line for line in lines if line.plain[:6].strip().isdigit()}
    grounds = [str(rows[str(layer)].spans[0].style) for layer in range(3)]
    assert grounds == [f"black on {scale_colour(scale, 0.5)}" for scale in (0.5, 1.0, 1.25)]
    assert [rows[str(layer)].plain[-1] for layer in range(3)] == ["-", " ", "+"]


def test_colours_run_from_blue_over_grey_to_red() -> None:
    assert scale_colour(1.0, 0.0) == scale_colour(1.0, 0.5) == "#c0c0c0"
    assert scale_colour(0.5, 0.5) == "#2f6fd6"
    assert scale_colour(1.5, 0.5) == "#d43d1f"
    assert scale_colour(1.25, 0.5) == "#ca7e70"


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("width", [40, 80])
def test_every_hop_is_on_the_map_and_no_line_is_too_wide(plain: bool, width: int) -> None:
    hops = [("a", index * 7 % 32, 1 + index / 200) for index in range(150)]
    lines = [line.plain for line in path_text(path(*hops, a=32, b=32), width=width, plain=plain)]
    assert max(map(len, lines)) <= width
    if plain:
        rows = [line[7:] for line in lines[: lines.index("scale: factor on something")] if line.strip()]
        body = [row for row in rows if row.strip() and set(row.strip()) <= set("# +*")]
        assert sum(len(row.replace(" ", "")) for row in body) == len(hops)
