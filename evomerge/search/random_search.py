"""Random search: every genome is drawn uniformly from the unit cube, whatever the fitness.

The baseline a searcher has to beat at the same number of evaluations. Log dimensions are drawn
log-uniformly, all whole numbers and all choices are equally likely; the start of a dimension plays no part.

Source: James Bergstra and Yoshua Bengio, "Random Search for Hyper-Parameter Optimization", 2012,
https://www.jmlr.org/papers/v13/bergstra12a.html
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from pydantic import Field

from evomerge.records import Dimension
from evomerge.search.base import GenerationalSearcher, SearcherOptions


class RandomOptions(SearcherOptions):
    """Options of random search."""

    population: int | None = Field(
        default=None,
        ge=1,
        description="Genomes per generation; null for 4 + floor(3 ln n) with n dimensions to search, "
        "a choice counting once per name.",
    )


class RandomSearch(GenerationalSearcher):
    """Uniform draws from the unit cube."""

    def __init__(self, dimensions: Sequence[Dimension], seed: int, options: RandomOptions) -> None:
        """Seed the draws.

        Args:
            dimensions: What is searched.
            seed: Seed of this searcher's own generator, not negative.
            options: The options.

        Raises:
            ValueError: The dimensions cannot be searched, or the seed is negative.
        """
        super().__init__(dimensions, options.population)
        self._rng = numpy.random.Generator(numpy.random.PCG64(seed))

    def _propose(self) -> Sequence[Sequence[float]]:
        points: list[list[float]] = self._rng.random((self.population, self.cube.size)).tolist()
        return points

    def _learn(self, fitnesses: Sequence[float | None]) -> None:
        del fitnesses  # random search learns nothing
