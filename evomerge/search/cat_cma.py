"""CatCMA with Margin: a normal distribution for numbers joined with one of probabilities for choices.

The package `cmaes` (class `CatCMAwM`) does the numerics and is imported nowhere else. Left to the caller:
when to stop. Its termination criteria are not asked, and nothing restarts.

Integers are rounded from the normal distribution, whose margin keeps their neighbours in reach however
small the steps become; a choice has a probability per name, and a margin keeps each above zero.

What is decided here:

- Numbers are searched in the unit cube, integers among the middles of their bins, so that all steps are
  fractions of a range. Beyond a bound numbers are clipped and penalised, so that many lie exactly on it.
- An integer of two values is searched as a choice, as the package advises. One of more than a thousand is
  searched as a continuous number, which the cube rounds: to it a single bin is no obstacle.
- The starting values are the mean of the numbers. The starting choice has a quarter of the probability to
  itself, and all choices share the rest alike: a start is worth more than chance, and a wrong one is left
  soon.
- The package is told places, 0 for the best, never fitness, and a generation of equals is not told, both
  as in `cma_es.py`. Telling equals would narrow the probabilities by chance as well.
- Numbers inside the package that drift without end are held back, see `CatCma._restrain`. They are private
  to it, hence the upper bound on its version.

The genomes depend on the linear algebra below numpy and on whether scipy is installed: on another kind of
processor, or with another number of BLAS threads in about a hundred dimensions and more, a replay may differ.

Source: Ryoki Hamano, Masahiro Nomura, Shota Saito, Kento Uchida and Shinichi Shirakawa, "CatCMA with Margin:
Stochastic Optimization for Continuous, Integer, and Categorical Variables", 2025,
https://arxiv.org/abs/2504.07884v5.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy
from pydantic import Field

from evomerge.records import Dimension, Kind
from evomerge.search.base import MAX_SIGMA, GenerationalSearcher, SearcherOptions, places, ranks
from evomerge.search.units import Part

START_SHARE = 0.25
"""Share of the probability that goes to the starting choice alone; the rest goes to all choices alike."""

MOST_VALUES = 1000
"""Most values of an integer that is searched as one; the package keeps a table of them."""

EIGENVALUE_FLOOR = 1e-14
"""Smallest eigenvalue of the covariance, as a share of the largest."""


class CatCmaOptions(SearcherOptions):
    """Options of CatCMA with Margin."""

    population: int | None = Field(
        default=None,
        ge=4,
        description="Genomes per generation; null for 4 + floor(3 ln n) with n dimensions to search, "
        "a choice counting once per name.",
    )
    sigma: float = Field(
        default=1 / 6,
        gt=0,
        le=MAX_SIGMA,
        description="Initial standard deviation of numbers, as a fraction of each dimension's range.",
    )


class CatCma(GenerationalSearcher):
    """CatCMA with Margin in the unit cube, started at the dimensions' starting values."""

    def __init__(self, dimensions: Sequence[Dimension], seed: int, options: CatCmaOptions) -> None:
        """Place the initial distribution.

        Args:
            dimensions: What is searched.
            seed: Seed of this searcher's own generator, not negative.
            options: The options.

        Raises:
            ValueError: The dimensions cannot be searched, or the seed is negative.
        """
        super().__init__(dimensions, options.population)
        generator = numpy.random.PCG64(seed)
        parts = self.cube.parts
        self._continuous = [part for part in parts if _searched_as(part) is Kind.CONTINUOUS]
        self._integers = [part for part in parts if _searched_as(part) is Kind.INTEGER]
        self._choices = [part for part in parts if _searched_as(part) is Kind.CATEGORICAL]
        self._solutions: list[Any] = []
        self._strategy: Any = None  # all dimensions are constant
        if not parts:
            return

        mean = [part.start[0] for part in (*self._continuous, *self._integers)]
        # The package loads scipy.stats where that is installed, which adds warning filters of its own.
        with warnings.catch_warnings():
            from cmaes import CatCMAwM

            self._strategy = CatCMAwM(
                x_space=[(0.0, 1.0)] * len(self._continuous) or None,
                z_space=[
                    [part.bin_centre(position) for position in range(part.num_values)]
                    for part in self._integers
                ]
                or None,
                c_space=[part.num_values for part in self._choices] or None,
                population_size=self.population,
                mean=numpy.array(mean),
                sigma=options.sigma,
                # By default the package starts with steps as wide as the way from the mean to its nearest
                # bound, none for a start on a bound.
                cov=numpy.eye(len(mean)),
                cat_param=_starting_probabilities(self._choices),
                seed=generator,
            )

    def _propose(self) -> Sequence[Sequence[float]]:
        if self._strategy is None:
            return [()] * self.population
        self._solutions = [self._strategy.ask() for _ in range(self.population)]
        return [self._point(solution) for solution in self._solutions]

    def _point(self, solution: Any) -> list[float]:
        point = [0.0] * self.cube.size
        for parts, coordinates in ((self._continuous, solution.x), (self._integers, solution.z)):
            for index, part in enumerate(parts):
                point[part.first] = float(coordinates[index])
        for index, part in enumerate(self._choices):
            chosen = int(solution.c[index].argmax())
            if part.dimension.kind is Kind.INTEGER:
                point[part.first] = part.bin_centre(chosen)
            else:
                point[part.first + chosen] = 1.0
        return point

    def _learn(self, fitnesses: Sequence[float | None]) -> None:
        losses = ranks(fitnesses)
        if self._strategy is None or not any(losses):
            return
        self._strategy.tell(list(zip(self._solutions, places(losses), strict=True)))
        self._restrain()

    def _restrain(self) -> None:
        """Keep the package's inner numbers, which it lets drift, within the reach of floats."""
        strategy = self._strategy
        if self._continuous or self._integers:
            # Only the product of step size and covariance matters, and in thousands of generations one of
            # them leaves the range of floats: scaled back here, with the evolution path. The floor keeps the
            # covariance regular.
            _, roots = strategy._eigen_decomposition()
            size = float(roots.max())
            strategy._sigma *= size
            strategy._pc /= size
            strategy._C = strategy._C / size**2 + EIGENVALUE_FLOOR * numpy.eye(len(roots))
            strategy._D = numpy.sqrt((roots / size) ** 2 + EIGENVALUE_FLOOR)
            # Past the last value of an integer all samples are equal, and nothing else ends the growth of
            # its step.
            widest = float((strategy._sigma * strategy._A * numpy.sqrt(numpy.diag(strategy._C))).max())
            strategy._sigma *= min(1.0, MAX_SIGMA / widest)
        if self._choices:
            # When generation after generation agrees, the accuracy Delta is divided without end, until the
            # factor of the cumulation, 1 / (Delta sqrt(n)) for n free probabilities, exceeds 2 and the root
            # of a negative number is taken. The cumulation is an average for factors up to 1.
            strategy._Delta = max(strategy._Delta, float(strategy._param_sum) ** -0.5)


def _searched_as(part: Part) -> Kind:
    kind = part.dimension.kind
    if kind is not Kind.INTEGER:
        return kind
    if part.num_values == 2:
        return Kind.CATEGORICAL
    return Kind.INTEGER if part.num_values <= MOST_VALUES else Kind.CONTINUOUS


def _starting_probabilities(choices: Sequence[Part]) -> Any:
    """Return probabilities, one row per dimension, padded with zeros to the longest; None without rows."""
    if not choices:
        return None
    found = numpy.zeros((len(choices), max(part.num_values for part in choices)))
    for row, part in zip(found, choices, strict=True):
        row[: part.num_values] = (1 - START_SHARE) / part.num_values
        row[int(part.dimension.start) - int(part.dimension.low)] += START_SHARE
    return found
