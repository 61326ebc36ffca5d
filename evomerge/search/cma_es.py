"""CMA-ES: a normal distribution whose mean, step size and covariance follow the better half.

pycma (`import cma`) does the numerics and is imported nowhere else. Left to the caller: when to stop. None
of pycma's termination criteria is asked, nothing restarts, and nothing is printed or written.

What is decided here:

- pycma searches without bounds; its points are mapped into the unit cube here. `transform` folds space at
  the cube's surface smoothly, so that a bound is approached and hardly ever hit. `penalty` clips, so that
  many genomes lie exactly on a bound, and draws the mean back by a penalty for the way clipped off.
- pycma is told places, 0 for the best, never fitness: the search does not depend on the scale of fitness,
  and a candidate without fitness simply comes last. Equals keep the order in which they were proposed.
- A generation of equals says nothing and is not told. Selecting among equals would only let the step size
  drift, for small populations towards 0.

The genomes depend in their last bits on the linear algebra below numpy: on another kind of processor, or
with another number of BLAS threads in about a hundred dimensions and more, a replay may differ.

Source: Nikolaus Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, https://arxiv.org/abs/1604.00772.
The penalty follows Nikolaus Hansen, Andre S. P. Niederberger, Lino Guzzella and Petros Koumoutsakos, "A
Method for Handling Uncertainty in Evolutionary Optimization With an Application to Feedback Control of
Combustion", 2009, https://inria.hal.science/inria-00276216, except that its weights are not adapted: the
paper lets them grow slowly, which suits fitness, whose differences fade as the steps shrink; ranks do not
fade, and a coordinate that strayed beyond its bound would stay there. pycma's own `BoundPenalty` does not
serve: given as an option it penalises the clipped points, that is nothing, and it adapts its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy
from pydantic import Field

from evomerge.records import Dimension
from evomerge.search.base import MAX_SIGMA, GenerationalSearcher, SearcherOptions, places, ranks


class CmaEsOptions(SearcherOptions):
    """Options of CMA-ES."""

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
        description="Initial standard deviation, as a fraction of each dimension's range.",
    )
    bounds: Literal["transform", "penalty"] = Field(
        default="transform",
        description="transform approaches a bound smoothly and hardly ever hits it; penalty clips, so that "
        "values exactly on a bound are common (suits weights that may well be 0).",
    )


class CmaEs(GenerationalSearcher):
    """CMA-ES in the unit cube, started at the dimensions' starting values."""

    def __init__(self, dimensions: Sequence[Dimension], seed: int, options: CmaEsOptions) -> None:
        """Place the initial distribution.

        Args:
            dimensions: What is searched.
            seed: Seed of this searcher's own generator, not negative.
            options: The options.

        Raises:
            ValueError: The dimensions cannot be searched, or the seed is negative.
        """
        super().__init__(dimensions, options.population)
        rng = numpy.random.Generator(numpy.random.PCG64(seed))
        # pycma fails in one dimension; its author advises a second coordinate that the fitness ignores
        # (https://github.com/CMA-ES/pycma/issues/86).
        start = numpy.array([*self.cube.start, *[0.5] * (2 - self.cube.size)])
        self._penalised = options.bounds == "penalty"
        self._points: list[Any] = []

        # pycma loads scipy.stats and pyplot, over half a second; without matplotlib it warns that it cannot
        # plot, and it adds warning filters of its own.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not import matplotlib", category=UserWarning)
            import cma

            self._transform = cma.BoundTransform([0, 1])
            self._strategy = cma.CMAEvolutionStrategy(
                start if self._penalised else self._transform.inverse(start),
                options.sigma,
                {
                    "popsize": self.population,
                    "maxstd": MAX_SIGMA,
                    # Cumulation in any dimension: from 300 on pycma would switch to a rule, and for
                    # populations below 6 to mirrored samples, that fail when a generation is not told.
                    "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
                    "CMA_mirrors": 0,
                    # All draws come from our own generator; numpy's global one is not even seeded.
                    "seed": numpy.nan,
                    "randn": lambda *shape: rng.standard_normal(shape),
                    # Prints nothing, writes no logs, reads no file of signals.
                    "verbose": -10,
                },
            )

    def _propose(self) -> Sequence[Sequence[float]]:
        self._points = self._strategy.ask()
        into_cube = _clip if self._penalised else self._transform.repair
        return [into_cube(point)[: self.cube.size].tolist() for point in self._points]

    def _learn(self, fitnesses: Sequence[float | None]) -> None:
        losses: list[float] = [float(rank) for rank in ranks(fitnesses)]
        if self._penalised:
            losses = [loss + self._penalty(point) for loss, point in zip(losses, self._points, strict=True)]
        if min(losses) == max(losses):
            return
        self._strategy.tell(self._points, places(losses))

    def _penalty(self, point: Any) -> float:
        # The paper's starting weight, 2 delta_fit / sigma_i^2, with the interquartile range of ranks,
        # population / 2, as delta_fit.
        excess = (point - _clip(point)) / self._strategy.stds
        return self.population * float(numpy.mean(excess**2))


def _clip(point: Any) -> Any:
    return numpy.clip(point, 0.0, 1.0)
