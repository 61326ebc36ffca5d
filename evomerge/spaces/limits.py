"""Limits on the size of a merged model, kept by taking the weakest hops off its path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.layout import layout_of
from evomerge.spaces.base import Finding, ModelSize, SourceModels
from evomerge.spaces.data_flow_settings import PathSettings
from evomerge.spaces.steps import Pool, Step


class Limits:
    """Most hops and most parameters of a merged model.

    Args:
        settings: The limits.
        pool: The layers, of the first models of `sources`.
        sources: The models; what lies outside the layers is the first one's.
    """

    def __init__(self, settings: PathSettings, pool: Pool, sources: SourceModels) -> None:
        self._max_hops = settings.max_hops or math.inf
        self._max_parameters = settings.max_parameters or math.inf
        self._layers = [0] * len(pool.layers)
        self._outside = 0
        if settings.max_parameters is not None:
            sizes = [sources.sizes[model] for model in sources.models]
            self._layers = [sizes[model].layers[layer] for model, layer in pool.layers]
            self._outside = sizes[0].outside
        self._fewest = self._outside + self._layers[pool.first] + self._layers[pool.last]

    def faults(self) -> Iterator[Finding]:
        """Hold the limits against the shortest path."""
        if self._max_parameters < self._fewest:
            yield (
                ("max_parameters",),
                f"expected at least {self._fewest}, the parameters of the first and the last layer and of what lies "
                f"outside the layers, got {self._max_parameters}",
            )

    def repair(self, steps: Sequence[Step]) -> list[Step]:
        """Take steps off a path until it keeps the limits.

        The weakest goes first, of equals the one farthest down the path; the first and the last step stay.
        """
        hops = len(steps)
        parameters = self._outside + sum(self._layers[step.layer] for step in steps)
        dropped: set[int] = set()
        if hops > self._max_hops or parameters > self._max_parameters:
            for place in sorted(range(1, hops - 1), key=lambda place: (steps[place].strength, -place)):
                if hops - len(dropped) <= self._max_hops and parameters <= self._max_parameters:
                    break
                dropped.add(place)
                parameters -= self._layers[steps[place].layer]
        return [step for place, step in enumerate(steps) if place not in dropped]


def size_faults(settings: PathSettings, sources: SourceModels) -> Iterator[Finding]:
    """Refuse a limit on parameters over models whose size is unknown."""
    unknown = [model for model in sources.models if model not in sources.sizes]
    if settings.max_parameters is not None and unknown:
        yield ("max_parameters",), f"the number of parameters is unknown of {', '.join(unknown)}"


def size_of(checkpoint: Checkpoint) -> ModelSize:
    """Count the parameters of a model, those that are tied once.

    Raises:
        ValueError: The model cannot be understood; says what was found.
    """
    counts = {
        layer: sum(math.prod(checkpoint.tensors[role.name].shape) for role in roles.values())
        for layer, roles in layout_of(checkpoint).items()
    }
    outside = counts.pop(None, 0)
    return ModelSize(layers=tuple(counts[layer] for layer in range(len(counts))), outside=outside)
