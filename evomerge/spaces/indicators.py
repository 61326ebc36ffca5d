"""Paths by indicators: the layers of the pool in sequence, repeated, each on the path or not.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.2: M layers r times in sequence are T = M r slots, and slot i is on the path iff I_i > 0. The slots
of the first and the last layer of the path, in the first repetition, are not searched.
"""

from __future__ import annotations

from collections.abc import Sequence

from evomerge.records import Dimension
from evomerge.spaces.data_flow_settings import IndicatorSettings
from evomerge.spaces.steps import Pool, Step


class Indicators:
    """An indicator per slot, in [-1, 1].

    Attributes:
        dimensions: The indicators of the searched slots, `use[math.3].0` for the first repetition.
        slots: `[math.3].0` and so on: the first layer, the searched slots, the last layer.
        max_steps: T.
    """

    def __init__(self, settings: IndicatorSettings, pool: Pool) -> None:
        ends = (pool.first, pool.last)
        searched = [
            (repeat, layer)
            for repeat in range(settings.repeats)
            for layer in range(len(pool.layers))
            if repeat > 0 or layer not in ends
        ]
        places = [(0, pool.first), *searched, (0, pool.last)]
        self._layers = [layer for _, layer in places]
        self.slots: Sequence[str] = tuple(
            f"[{pool.labels[layer]}]" + (f".{repeat}" if settings.repeats > 1 else "")
            for repeat, layer in places
        )
        self.max_steps = len(places)
        unused = -settings.start if settings.start_unused is None else settings.start_unused
        self.dimensions: Sequence[Dimension] = tuple(
            Dimension(
                name=f"use{slot}",
                low=-1.0,
                high=1.0,
                start=settings.start if repeat == 0 and layer in pool.inner else unused,
            )
            for (repeat, layer), slot in zip(searched, self.slots[1:-1], strict=True)
        )

    def steps(self, genes: Sequence[float]) -> list[Step]:
        """The path of the indicators; strong indicators are strong steps."""
        first, *searched, last = self._layers
        return [
            Step(layer=first, slot=0),
            *(
                Step(layer=layer, slot=slot, strength=gene)
                for slot, (layer, gene) in enumerate(zip(searched, genes, strict=True), start=1)
                if gene > 0
            ),
            Step(layer=last, slot=len(self._layers) - 1),
        ]
