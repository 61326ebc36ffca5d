"""The part of a genome that stands for a path with scales: which layers, in which order, scaled by how much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from evomerge.errors import ConfigurationError
from evomerge.merge.anatomy import Anatomy
from evomerge.records import Dimension
from evomerge.spaces.base import Finding
from evomerge.spaces.data_flow_settings import PathSettings
from evomerge.spaces.folding import LARGEST, path_recipe
from evomerge.spaces.limits import Limits
from evomerge.spaces.path import Hop
from evomerge.spaces.scales import build_scales
from evomerge.spaces.steps import Encoding, Pool

MAX_PRODUCT = 2.0**40
"""Most by which the scales of a `stream` may enlarge or shrink it from the first hop to any other.

Beyond, what the earlier hops wrote is lost in the rounding of what the later ones write, or the other way
round, and not much further the squares that norms take leave the range of float32.
"""


class PathGenes:
    """Reads paths from genes.

    Attributes:
        dimensions: What is searched, the path before its scales.
    """

    def __init__(self, settings: PathSettings, pool: Pool, encoding: Encoding, limits: Limits) -> None:
        self._settings = settings
        self._encoding = encoding
        self._limits = limits
        self._scales = build_scales(settings.scales, pool, encoding)
        self.dimensions: Sequence[Dimension] = (*encoding.dimensions, *self._scales.dimensions)

    def hops(self, genes: Sequence[float]) -> list[tuple[int, float]]:
        """Number in the pool and scale of every hop of a path.

        Args:
            genes: One number per dimension.
        """
        count = len(self._encoding.dimensions)
        steps = self._limits.repair(self._encoding.steps(genes[:count]))
        scales = self._scales.values(genes[count:], steps)
        return [(step.layer, scale) for step, scale in zip(steps, self._bounded(scales), strict=True)]

    def _bounded(self, scales: Sequence[float]) -> Iterator[float]:
        """Scales that can be folded into weights."""
        if isinstance(self._settings.scales, str):
            yield from scales
            return
        least = self._settings.scales.min_scale
        first, *others = scales
        product = math.copysign(max(abs(first), least), first)
        yield product
        if self._settings.semantics == "branch":
            yield from (scale if abs(scale) * LARGEST >= 1 else 0.0 for scale in others)
            return
        for scale in others:
            size = max(abs(scale), least)
            if not 1 / MAX_PRODUCT <= size * abs(product) <= MAX_PRODUCT:
                size = min(max(size * abs(product), 1 / MAX_PRODUCT), MAX_PRODUCT) / abs(product)
            product *= math.copysign(size, scale)
            yield math.copysign(size, scale)


def folding_faults(
    settings: PathSettings, pool: Pool, layers: Sequence[tuple[str, int]], anatomies: Mapping[str, Anatomy]
) -> Iterator[Finding]:
    """Hold scales against the models: tries a path through all layers of each.

    Args:
        settings: The settings.
        pool: The layers.
        layers: Number in the pool -> model and layer.
        anatomies: Model -> its anatomy.
    """
    if settings.scales == "none":
        return
    for position, depth in enumerate(pool.depths):
        through = [layers[pool.number(position, layer)] for layer in range(depth)]
        hops = [
            Hop(model=model, layer=layer, scale=1.0 if number else 0.5)
            for number, (model, layer) in enumerate([layers[pool.first], *through, layers[pool.last]])
        ]
        try:
            path_recipe(hops, settings.semantics, anatomies, dtype="float32")
        except ConfigurationError as error:
            yield from ((("scales",), f"{through[0][0]}: {fault.reason}") for fault in error.faults)
