"""Paths by slots: each is skipped or takes one of the layers that lie about as deep in their models.

Slots lie at even distances between the first and the last layer of the path. The depth of a slot is
proportional: halfway down one model is halfway down every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evomerge.records import Dimension, Kind
from evomerge.spaces.base import Finding
from evomerge.spaces.data_flow_settings import PathGenome
from evomerge.spaces.steps import Pool, Step


class Slots:
    """A choice per slot.

    Attributes:
        dimensions: The choices of the searched slots, `layer.1` for the first.
        slots: `.0` for the first layer of the path, `.1` for the first searched slot, and so on.
        max_steps: Number of slots, the first and the last layer included.
    """

    def __init__(self, settings: PathGenome, pool: Pool) -> None:
        """Lay out the slots of settings in which `slot_faults` found no fault."""
        count = settings.slots or len(pool.inner)
        self._ends = (pool.first, pool.last)
        self._choices: list[tuple[int | None, ...]] = []
        self.slots: Sequence[str] = tuple(f".{slot}" for slot in range(count + 2))
        self.max_steps = count + 2
        dimensions: list[Dimension] = []
        placed: set[int] = set()
        for slot in range(1, count + 1):
            nearest = [_nearest(pool, model, slot, count) for model in range(len(pool.depths))]
            layers = [
                pool.number(model, layer)
                for model, centre in enumerate(nearest)
                for layer in range(pool.depths[model])
                if abs(layer - centre) <= settings.window
            ]
            self._choices.append((None, *layers))
            # With more slots than layers, the first of those closest to a layer starts with it.
            own = nearest[0]
            start = 1 + layers.index(own) if own in pool.inner and own not in placed else 0
            placed.add(own)
            dimensions.append(
                Dimension(
                    name=f"layer.{slot}",
                    low=0.0,
                    high=float(len(layers)),
                    start=float(start),
                    kind=Kind.CATEGORICAL,
                    choices=("skip", *(pool.labels[layer] for layer in layers)),
                )
            )
        self.dimensions: Sequence[Dimension] = tuple(dimensions)

    def steps(self, genes: Sequence[float]) -> list[Step]:
        """The path of the choices."""
        first, last = self._ends
        steps = [Step(layer=first, slot=0)]
        for slot, (choices, gene) in enumerate(zip(self._choices, genes, strict=True), start=1):
            layer = choices[int(gene)]
            if layer is not None:
                steps.append(Step(layer=layer, slot=slot))
        return [*steps, Step(layer=last, slot=len(self._choices) + 1)]


def slot_faults(settings: PathGenome, pool: Pool) -> Iterator[Finding]:
    """Hold the number of slots against the models."""
    if settings.slots is None and not pool.inner:
        reason = (
            f"{pool.models[0]} has no layers between the first and the last one; say how many slots there are"
        )
        yield ("genome", "slots"), reason
    elif settings.slots is not None and settings.slots < len(pool.inner):
        yield (
            ("genome", "slots"),
            f"expected at least the {len(pool.inner)} layers of {pool.models[0]} between the first and the last "
            f"layer, from which the search starts, got {settings.slots}; paths may skip slots",
        )


def _nearest(pool: Pool, model: int, slot: int, count: int) -> int:
    """The layer of a model at the proportional depth of a slot, in integers to be exact."""
    # Depth in layers of the first model: first + (last - first) slot / (count + 1).
    depth = pool.first * (count + 1) + (pool.last - pool.first) * slot
    numerator, denominator = depth * (pool.depths[model] - 1), (count + 1) * (pool.depths[0] - 1)
    return (2 * numerator + denominator) // (2 * denominator)
