"""The unit cube in which searchers work, and its mapping to genomes.

A searcher should see every dimension on the same scale, whatever its unit and kind:

- a continuous dimension takes one coordinate, along which equal steps are equal differences or, on a log
  scale, equal ratios;
- an integer takes one coordinate, cut into equal bins, one per whole number;
- a choice takes one coordinate per name, and the largest coordinate is chosen, the first among equals. So no
  choice lies between two others.

Uniform points of the cube are therefore uniform over whole numbers and over choices. A dimension with
`low == high` leaves nothing to search and gets no coordinate of the cube.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from evomerge.records import Dimension, Genome, Kind

START_CHOSEN = 0.6
"""Coordinate of the choice that a search starts from."""

START_OTHER = 0.4
"""Coordinate of every other choice of that dimension."""


def check_dimensions(dimensions: Sequence[Dimension]) -> None:
    """Check what every searcher relies on.

    Raises:
        ValueError: There is no dimension, or one is not finite, not ordered `low <= start <= high`,
            logarithmic without being positive and continuous, or an integer or a choice without whole
            numbers, or a choice whose bounds are not the positions of its names.
    """
    if not dimensions:
        raise ValueError("a search needs at least one dimension, got none")
    for dimension in dimensions:
        fault = _fault(dimension)
        if fault:
            raise ValueError(f"dimension {dimension.name}: {fault}, got {dimension}")


def _fault(dimension: Dimension) -> str:
    low, high, start = dimension.low, dimension.high, dimension.start
    if not all(math.isfinite(value) for value in (low, high, start)):
        return "low, high and start must be finite"
    if not low <= start <= high:
        return "expected low <= start <= high"
    if dimension.kind is Kind.CONTINUOUS:
        return "a log scale needs low > 0" if dimension.log and low <= 0 else ""
    if dimension.log:
        return f"a log scale is for continuous dimensions, not {dimension.kind} ones"
    # Beyond 2^53 floats skip whole numbers.
    if not all(float(value).is_integer() and abs(value) <= 2**53 for value in (low, high, start)):
        return f"low, high and start of {dimension.kind} dimensions must be whole numbers up to 2^53"
    if dimension.kind is Kind.CATEGORICAL and (low != 0 or high != len(dimension.choices) - 1):
        return "expected low 0 and high the position of the last of its choices"
    return ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The coordinates of the cube that one dimension takes.

    Attributes:
        dimension: The dimension, not constant.
        first: Position of its first coordinate.
        size: Number of its coordinates.
    """

    dimension: Dimension
    first: int
    size: int

    @property
    def num_values(self) -> int:
        """Number of values of an integer or a choice."""
        assert self.dimension.kind is not Kind.CONTINUOUS
        return int(self.dimension.high) - int(self.dimension.low) + 1

    @property
    def start(self) -> tuple[float, ...]:
        """Where the dimension's starting value lies in these coordinates."""
        dimension = self.dimension
        if dimension.kind is Kind.CONTINUOUS:
            return (_coordinate(dimension),)
        position = int(dimension.start) - int(dimension.low)
        if dimension.kind is Kind.INTEGER:
            return (self.bin_centre(position),)
        return tuple(START_CHOSEN if choice == position else START_OTHER for choice in range(self.size))

    def bin_centre(self, position: int) -> float:
        """Return the middle of an integer's bin, counted from 0 at `low`."""
        return (position + 0.5) / self.num_values

    def value(self, coordinates: Sequence[float]) -> float:
        """Return the dimension's value at `size` coordinates in [0, 1]."""
        dimension = self.dimension
        if dimension.kind is Kind.CONTINUOUS:
            return _value(dimension, coordinates[0])
        if dimension.kind is Kind.INTEGER:
            position = min(int(coordinates[0] * self.num_values), self.num_values - 1)
            return float(int(dimension.low) + position)
        return float(max(range(self.size), key=coordinates.__getitem__))


class UnitCube:
    """Maps points of the cube to genomes.

    Attributes:
        size: Number of coordinates; 0 when all dimensions are constant.
        start: Where the dimensions' starting values lie in the cube: whole numbers in the middle of their
            bin, choices at `START_CHOSEN` with the others of their dimension at `START_OTHER`. For a search
            with a standard deviation of 1/6, that is one deviation to either side of the middle.
        parts: The coordinates of each dimension that is not constant, in the order of the dimensions.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        check_dimensions(dimensions)
        self._dimensions = tuple(dimensions)
        self.size = 0
        parts = []
        for dimension in dimensions:
            if dimension.low < dimension.high:
                taken = len(dimension.choices) if dimension.kind is Kind.CATEGORICAL else 1
                parts.append(Part(dimension=dimension, first=self.size, size=taken))
                self.size += taken
        self.parts = tuple(parts)
        self.start = tuple(coordinate for part in parts for coordinate in part.start)

    def genome(self, point: Sequence[float]) -> Genome:
        """Return the genome at a point, within the bounds of the dimensions.

        Args:
            point: `size` coordinates in [0, 1]; 0 and 1 give the bounds exactly.
        """
        assert len(point) == self.size
        coordinates = [float(coordinate) for coordinate in point]
        values = iter(part.value(coordinates[part.first : part.first + part.size]) for part in self.parts)
        return tuple(
            next(values) if dimension.low < dimension.high else dimension.low
            for dimension in self._dimensions
        )


def _value(dimension: Dimension, u: float) -> float:
    low, high = dimension.low, dimension.high
    # Both forms are exact at 0 and 1 and cannot overflow between finite bounds.
    value = low ** (1 - u) * high**u if dimension.log else low * (1 - u) + high * u
    return min(max(value, low), high)


def _coordinate(dimension: Dimension) -> float:
    low, high, start = dimension.low, dimension.high, dimension.start
    if dimension.log:
        low, high, start = math.log(low), math.log(high), math.log(start)
    # Halved first: the distance of two finite numbers may overflow.
    span = high / 2 - low / 2
    return (start / 2 - low / 2) / span if span > 0 else 0.0
