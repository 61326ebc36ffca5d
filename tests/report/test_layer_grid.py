"""The grid of layers and columns that maps are drawn in."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.report.layer_grid import Cell, layer_grid


def draw(
    places: Mapping[tuple[str, int, int], str], *, num_columns: int, width: int = 80, **depths: int
) -> str:
    cells = {place: Cell(symbol=symbol) for place, symbol in places.items()}
    labels = {model: model.upper() for model in depths}
    lines = layer_grid(cells, labels=labels, depths=depths, num_columns=num_columns, axis="x", width=width)
    return "\n".join(line.plain for line in lines)


def test_layers_go_upwards_and_the_first_model_is_at_the_bottom() -> None:
    found = draw({("a", 0, 0): "1", ("a", 1, 1): "2", ("b", 1, 2): "3"}, num_columns=3, a=2, b=2)
    assert found.split("\n") == ["B", "    1   3", "    0", "A", "    1  2", "    0 1", "    x 0"]


def test_unused_layers_next_to_each_other_share_a_row() -> None:
    found = draw({("a", 3, 0): "#", ("a", 12, 1): "#"}, num_columns=2, a=20)
    rows = [line.split()[0] for line in found.split("\n")[1:-1]]
    assert rows == ["13-19", "12", "4-11", "3", "0-2"]


def test_a_model_without_cells_is_one_row() -> None:
    assert draw({("a", 0, 0): "#"}, num_columns=1, a=1, b=32).split("\n")[:2] == ["B", "   0-31"]


def test_more_columns_than_the_width_takes_go_into_bands() -> None:
    # The labels take 6 of 26 characters, so bands have 20 columns, and each shows only what it uses.
    found = draw(
        {("a", 0, 0): "#", ("a", 1, 19): "#", ("a", 2, 20): "#", ("a", 3, 44): "#"},
        num_columns=45,
        width=26,
        a=4,
    )
    bands = [band.split("\n") for band in found.split("\n\n")]
    assert bands[0] == ["A", "  2-3", "    1" + " " * 20 + "#", "    0 #", "    x 0         10"]
    assert bands[1] == ["A", "    3", "    2 #", "  0-1", "    x 20        30"]
    assert bands[2] == ["A", "    3     #", "  0-2", "    x 40"]


def test_the_number_that_opens_a_band_keeps_clear_of_the_next() -> None:
    found = draw({("a", 0, 0): "#"}, num_columns=40, width=6 + 19, a=1).split("\n")
    assert [line for line in found if line.startswith("    x")] == [
        "    x 0         10",
        "    x 19         30",
        "    x 38",
    ]
