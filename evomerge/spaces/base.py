"""What a search space is: dimensions to search and a decoder from genome to recipe.

A space knows model names and the number of their layers, never their weights. Searchers see only its
dimensions; workers see only the recipes it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome


@dataclass(frozen=True, kw_only=True)
class SourceModels:
    """The models a space merges.

    Attributes:
        models: The source models as recipes name them.
        base: The base model, or None.
        num_layers: Number of layers of each.
        dtype: Torch's name of the type their weights are stored in.
    """

    models: tuple[str, ...]
    base: str | None
    num_layers: int
    dtype: str


class SearchSpace(Protocol):
    """Decodes genomes into recipes."""

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """The searched numbers, in the genome's order."""
        ...

    def decode(self, genome: Genome) -> Recipe:
        """Turn a genome into the recipe it stands for; the same genome always gives the same recipe."""
        ...


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Model -> the shortest tail of its path that tells it from the others."""
    parts = {model: model.rstrip("/").split("/") for model in models}
    for length in range(1, max((len(part) for part in parts.values()), default=1) + 1):
        tails = {model: "/".join(part[-length:]) for model, part in parts.items()}
        if len(set(tails.values())) == len(parts):
            return tails
    return {model: model for model in models}
