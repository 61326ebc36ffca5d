"""The unit cube in which searchers work, and its mapping to genomes.

A searcher should see every dimension on the same scale, whatever its unit. Dimensions with `low == high`
leave nothing to search and get no coordinate of the cube.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from evomerge.records import Dimension, Genome


def check_dimensions(dimensions: Sequence[Dimension]) -> None:
    """Check what every searcher relies on.

    Raises:
        ValueError: There is no dimension, or one is not finite, not ordered `low <= start <= high`, or
            logarithmic without being positive.
    """
    if not dimensions:
        raise ValueError("a search needs at least one dimension, got none")
    for dimension in dimensions:
        low, high, start = dimension.low, dimension.high, dimension.start
        if not all(math.isfinite(value) for value in (low, high, start)):
            raise ValueError(
                f"dimension {dimension.name}: low, high and start must be finite, got {dimension}"
            )
        if not low <= start <= high:
            raise ValueError(f"dimension {dimension.name}: expected low <= start <= high, got {dimension}")
        if dimension.log and low <= 0:
            raise ValueError(f"dimension {dimension.name}: a log scale needs low > 0, got {dimension}")


class UnitCube:
    """Maps points of the cube to genomes, one coordinate per dimension that is not constant.

    Attributes:
        size: Number of coordinates; 0 when all dimensions are constant.
        start: Where the dimensions' starting values lie in the cube.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        check_dimensions(dimensions)
        self._dimensions = tuple(dimensions)
        self.start = tuple(
            _coordinate(dimension) for dimension in dimensions if dimension.low < dimension.high
        )
        self.size = len(self.start)

    def genome(self, point: Sequence[float]) -> Genome:
        """Return the genome at a point, within the bounds of the dimensions.

        Args:
            point: `size` coordinates in [0, 1]; 0 and 1 give the bounds exactly.
        """
        assert len(point) == self.size
        coordinates = iter(point)
        return tuple(
            _value(dimension, float(next(coordinates))) if dimension.low < dimension.high else dimension.low
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
