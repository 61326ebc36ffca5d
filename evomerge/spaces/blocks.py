"""Paths by blocks: a few spans of consecutive layers, each of one model, one after the other.

The numbers of a span are its model, its first layer and its length; a span of length 0 is absent. What
reaches beyond the end of its model is cut off there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evomerge.records import Dimension, Kind
from evomerge.spaces.base import Finding
from evomerge.spaces.data_flow_settings import BlocksGenome
from evomerge.spaces.steps import Pool, Step


class Blocks:
    """Three numbers per span.

    Attributes:
        dimensions: `source.1`, `first.1`, `length.1` for the first span, and so on.
        slots: `.0` for the first layer of the path, `.1` for the first span, and so on.
        max_steps: Number of layers when every span is as long as it may be.
    """

    def __init__(self, settings: BlocksGenome, pool: Pool) -> None:
        """Lay out the spans of settings in which `block_faults` found no fault."""
        self._pool = pool
        count = settings.count
        length = settings.max_length or max(1, 2 * _longest_start(settings, pool))
        self.slots: Sequence[str] = tuple(f".{slot}" for slot in range(count + 2))
        self.max_steps = 2 + count * length
        self.dimensions: Sequence[Dimension] = tuple(
            dimension
            for span in range(count)
            for dimension in _dimensions(f".{span + 1}", pool, _start(span, count, pool), length)
        )

    def steps(self, genes: Sequence[float]) -> list[Step]:
        """The path of the spans; only the first layer of each has a slot."""
        steps = [Step(layer=self._pool.first, slot=0)]
        spans = zip(genes[::3], genes[1::3], genes[2::3], strict=True)
        for slot, (source, first_layer, length) in enumerate(spans, start=1):
            model = int(source)
            depth = self._pool.depths[model]
            first = min(int(first_layer), depth - 1)
            steps += [
                Step(layer=self._pool.number(model, layer), slot=slot if layer == first else None)
                for layer in range(first, min(first + int(length), depth))
            ]
        return [*steps, Step(layer=self._pool.last, slot=len(self.slots) - 1)]


def block_faults(settings: BlocksGenome, pool: Pool) -> Iterator[Finding]:
    """Hold the length of the spans against the models."""
    needed = _longest_start(settings, pool)
    if settings.max_length is not None and settings.max_length < needed:
        yield (
            ("genome", "max_length"),
            f"expected at least {needed}, so that {settings.count} spans can start as the {len(pool.inner)} layers "
            f"of {pool.models[0]} between the first and the last layer, got {settings.max_length}",
        )


def _start(span: int, count: int, pool: Pool) -> tuple[int, int]:
    """First layer and length with which a span starts: the spans partition the first model's layers."""
    begin, end = (place * len(pool.inner) // count for place in (span, span + 1))
    return pool.first + 1 + begin, end - begin


def _longest_start(settings: BlocksGenome, pool: Pool) -> int:
    return -(-len(pool.inner) // settings.count)


def _dimensions(slot: str, pool: Pool, start: tuple[int, int], max_length: int) -> Iterator[Dimension]:
    yield Dimension(
        name=f"source{slot}",
        low=0.0,
        high=float(len(pool.models) - 1),
        start=0.0,
        kind=Kind.CATEGORICAL,
        choices=pool.models,
    )
    first, length = start
    high = max(pool.depths) - 1
    yield Dimension(
        name=f"first{slot}", low=0.0, high=float(high), start=float(min(first, high)), kind=Kind.INTEGER
    )
    yield Dimension(
        name=f"length{slot}", low=0.0, high=float(max_length), start=float(length), kind=Kind.INTEGER
    )
