"""The ask/tell protocol of searchers.

A searcher knows genomes and fitness, nothing of models. It is deterministic: built again with the same
dimensions, options and seed, and told the same fitness, it proposes the same genomes bit for bit. That is
what makes exact resume possible without storing any searcher state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from evomerge.records import Dimension, Genome
from evomerge.search.units import UnitCube

MAX_SIGMA = 1 / 3
"""Largest standard deviation along a coordinate of the unit cube; beyond it samples are all but uniform."""


class Searcher(Protocol):
    """Proposes generations of genomes and learns from their fitness."""

    @property
    def population(self) -> int:
        """Number of genomes in one generation."""
        ...

    def ask(self) -> list[Genome]:
        """Propose the next generation, `population` genomes within the bounds of the dimensions.

        Raises:
            RuntimeError: The previous generation has not been told yet.
        """
        ...

    def tell(self, fitnesses: Sequence[float | None]) -> None:
        """Report the fitness of the generation last asked, in its order.

        Args:
            fitnesses: One number per genome, larger is better; None ranks below every number.

        Raises:
            RuntimeError: No generation is waiting.
            ValueError: The count differs from the generation's, or a fitness is not finite.
        """
        ...


class SearcherOptions(BaseModel):
    """Base of the options of a searcher, declared once beside it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class GenerationalSearcher(ABC):
    """The bookkeeping all searchers share: who asks and tells when, and the unit cube.

    Attributes:
        cube: The unit cube of the dimensions.
    """

    def __init__(self, dimensions: Sequence[Dimension], population: int | None) -> None:
        """Start without a generation.

        Args:
            dimensions: What is searched.
            population: Genomes per generation; None for `default_population`.

        Raises:
            ValueError: The dimensions cannot be searched.
        """
        self.cube = UnitCube(dimensions)
        self._population = default_population(self.cube.size) if population is None else population
        self._waiting = False

    @property
    def population(self) -> int:
        """Number of genomes in one generation."""
        return self._population

    def ask(self) -> list[Genome]:
        """Propose the next generation; see `Searcher.ask`."""
        if self._waiting:
            raise RuntimeError("ask() was called before the previous generation was told")
        self._waiting = True
        return [self.cube.genome(point) for point in self._propose()]

    def tell(self, fitnesses: Sequence[float | None]) -> None:
        """Learn from the generation last asked; see `Searcher.tell`."""
        if not self._waiting:
            raise RuntimeError("tell() was called without a generation from ask()")
        if len(fitnesses) != self.population:
            raise ValueError(f"expected {self.population} fitnesses, one per genome, got {len(fitnesses)}")
        for position, fitness in enumerate(fitnesses):
            if fitness is not None and not math.isfinite(fitness):
                raise ValueError(f"fitness {position} must be finite or None, got {fitness}")
        self._waiting = False
        self._learn(fitnesses)

    @abstractmethod
    def _propose(self) -> Sequence[Sequence[float]]:
        """Return `population` points of the unit cube."""

    @abstractmethod
    def _learn(self, fitnesses: Sequence[float | None]) -> None:
        """Take in the checked fitness of the points last proposed."""


def default_population(num_coordinates: int) -> int:
    """Return 4 + floor(3 ln n), equation 48 of the CMA-ES tutorial, for n coordinates of the unit cube."""
    return 4 + math.floor(3 * math.log(max(num_coordinates, 1)))


def ranks(fitnesses: Sequence[float | None]) -> list[int]:
    """Return for each candidate how many are strictly better; None is worse than every number."""
    losses = [math.inf if fitness is None else -float(fitness) for fitness in fitnesses]
    ascending = sorted(losses)
    return [bisect_left(ascending, loss) for loss in losses]


def places(losses: Sequence[float]) -> list[float]:
    """Return 0.0 for the smallest loss, 1.0 for the next and so on, equals in their order.

    Distinct numbers, so that the outcome does not hang on how an optimiser's sort treats equals.
    """
    found = [0.0] * len(losses)
    for place, position in enumerate(sorted(range(len(losses)), key=losses.__getitem__)):
        found[position] = float(place)
    return found
