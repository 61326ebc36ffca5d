"""The layers that a path may take, and a path before its hops have scales.

Layers of all models are numbered in one sequence, the pool: those of the first model, then those of the
second, and so on. How a genome stands for a path is left to `indicators.py`, `slots.py` and `blocks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from evomerge.records import Dimension


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The layers that paths are made of.

    Attributes:
        models: What messages call the models, in their order.
        depths: Number of layers of each.
        first: Layer of the first model that starts every path.
        last: Layer of the first model that ends every path; lies behind `first`.
    """

    models: tuple[str, ...]
    depths: tuple[int, ...]
    first: int
    last: int

    @cached_property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Number in the pool -> position of the model and layer in it."""
        return tuple((model, layer) for model, depth in enumerate(self.depths) for layer in range(depth))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Number in the pool -> what tables and messages call the layer, such as `math.3`."""
        return tuple(f"{self.models[model]}.{layer}" for model, layer in self.layers)

    @property
    def inner(self) -> range:
        """The layers between first and last on the path that the search starts from, the first model's own."""
        return range(self.first + 1, self.last)

    def number(self, model: int, layer: int) -> int:
        """Number in the pool of a layer."""
        return sum(self.depths[:model]) + layer


@dataclass(frozen=True, kw_only=True)
class Step:
    """One hop of a path, still without its scale.

    Attributes:
        layer: Number in the pool of its layer.
        slot: The slot of the genome that it stems from, or None for one that merely follows another.
        strength: How firmly it is on the path; the weakest leave a path that is too long.
    """

    layer: int
    slot: int | None
    strength: float = 0.0


class Encoding(Protocol):
    """How a genome stands for a path. The first and the last step are the pool's, in slots of their own."""

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """What is searched."""
        ...

    @property
    def slots(self) -> Sequence[str]:
        """What the names of the dimensions of each slot end in."""
        ...

    @property
    def max_steps(self) -> int:
        """Most steps that a path can have."""
        ...

    def steps(self, genes: Sequence[float]) -> list[Step]:
        """The path of one number per dimension."""
        ...
