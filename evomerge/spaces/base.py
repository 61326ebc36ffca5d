"""What a search space is: dimensions to search and a decoder from genome to recipe.

A space knows model names and the number of their layers, never their weights. Searchers see only its
dimensions; workers see only the recipes it decodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from evomerge.errors import ConfigurationError
from evomerge.merge.anatomy import Anatomy
from evomerge.recipe import Recipe
from evomerge.records import Dimension, Genome
from evomerge.yaml_file import Document, FieldPath

Finding = tuple[FieldPath, str]
"""What is wrong in a search space: the place of a field and the reason."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Number of parameters of one model.

    Attributes:
        layers: Of each layer, from first to last.
        outside: Of everything outside the layers.
    """

    layers: tuple[int, ...]
    outside: int


@dataclass(frozen=True, kw_only=True)
class SourceModels:
    """The models a space merges.

    Attributes:
        models: The source models as recipes name them.
        base: The base model, or None.
        num_layers: Number of layers of the base, or without one of the first source.
        dtype: Torch's name of the type their weights are stored in.
        depths: Model -> number of its layers, for every source and the base.
        anatomies: Model -> what its layers are made of; empty unless the space moves layers.
        sizes: Model -> its number of parameters, for every source.
    """

    models: tuple[str, ...]
    base: str | None
    num_layers: int
    dtype: str
    depths: Mapping[str, int] = field(default_factory=dict)
    anatomies: Mapping[str, Anatomy] = field(default_factory=dict)
    sizes: Mapping[str, ModelSize] = field(default_factory=dict)


class SearchSpace(Protocol):
    """Decodes genomes into recipes."""

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """The searched numbers, in the genome's order."""
        ...

    def decode(self, genome: Genome) -> Recipe:
        """Turn a genome into the recipe it stands for; the same genome always gives the same recipe."""
        ...


def refuse(document: Document | None, found: Sequence[Finding]) -> None:
    """Refuse a search space in which something is wrong.

    Args:
        document: The search space as it was read, if it was.
        found: What is wrong.

    Raises:
        ConfigurationError: Carries everything found, unless that is nothing.
    """
    if found:
        document = document or Document(data=None)
        raise ConfigurationError([document.fault(place, reason) for place, reason in found])


def check_length(genome: Genome, dimensions: Sequence[Dimension]) -> None:
    """Check that a genome has a number for every dimension.

    Raises:
        ValueError: It has another count.
    """
    if len(genome) != len(dimensions):
        raise ValueError(f"expected {len(dimensions)} numbers, got {len(genome)}")


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Model -> the shortest tail of its path that tells it from the others."""
    parts = {model: model.rstrip("/").split("/") for model in models}
    for length in range(1, max((len(part) for part in parts.values()), default=1) + 1):
        tails = {model: "/".join(part[-length:]) for model, part in parts.items()}
        if len(set(tails.values())) == len(parts):
            return tails
    return {model: model for model in models}
