"""The table of searchers and how to build one by name.

To add a searcher: one file with its class and its options, one line in `SEARCHERS`. The contract tests
then cover it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.errors import ConfigurationError, nearest
from evomerge.records import Dimension
from evomerge.search.base import Searcher, SearcherOptions
from evomerge.search.cat_cma import CatCma, CatCmaOptions
from evomerge.search.cma_es import CmaEs, CmaEsOptions
from evomerge.search.random_search import RandomOptions, RandomSearch

__all__ = ["SEARCHERS", "Searcher", "SearcherOptions", "SearcherSpec", "build_searcher"]


@dataclass(frozen=True, kw_only=True)
class SearcherSpec:
    """One searcher of the table.

    Attributes:
        summary: What it does, in one line.
        reference: Link to the paper.
        options: Its options with types, defaults, ranges and descriptions.
        build: Makes the searcher from dimensions, seed and an instance of `options`.
    """

    summary: str
    reference: str
    options: type[SearcherOptions]
    build: Callable[..., Searcher]


SEARCHERS: dict[str, SearcherSpec] = {
    "cma-es": SearcherSpec(
        summary="Evolution strategy that learns the step size and the covariance of good genomes.",
        reference="https://arxiv.org/abs/1604.00772",
        options=CmaEsOptions,
        build=CmaEs,
    ),
    "catcma": SearcherSpec(
        summary="CMA-ES for numbers, whole numbers and choices together, each searched in its own way.",
        reference="https://arxiv.org/abs/2504.07884",
        options=CatCmaOptions,
        build=CatCma,
    ),
    "random": SearcherSpec(
        summary="Uniform draws within the bounds; the baseline every searcher should beat.",
        reference="https://www.jmlr.org/papers/v13/bergstra12a.html",
        options=RandomOptions,
        build=RandomSearch,
    ),
}
"""Every searcher, by the name people cite."""


def build_searcher(
    name: str, dimensions: Sequence[Dimension], seed: int, options: SearcherOptions | None = None
) -> Searcher:
    """Build a searcher of the table.

    Args:
        name: Its name in `SEARCHERS`.
        dimensions: What is searched.
        seed: Seed of all its random draws, not negative.
        options: An instance of the searcher's `options`; None for the defaults.

    Raises:
        ConfigurationError: There is no searcher of this name.
        TypeError: The options are those of another searcher.
        ValueError: The dimensions cannot be searched, or the seed is negative.
    """
    spec = SEARCHERS.get(name)
    if spec is None:
        known = ", ".join(sorted(SEARCHERS))
        raise ConfigurationError(f"searcher: expected one of {known}, got '{name}'{nearest(name, SEARCHERS)}")
    if options is None:
        options = spec.options()
    if not isinstance(options, spec.options):
        raise TypeError(f"{name} takes {spec.options.__name__}, got {type(options).__name__}")
    return spec.build(dimensions, seed, options)
